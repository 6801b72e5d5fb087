# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own network: from a trained model to a lazy, faster one
#
# The other notebooks take up the papers. This one is for a network that you have already: a plain torch model, which knows
# nothing of this library, becomes a lazy network that evaluates the share of its neurons that you ask for, says what that
# costs in accuracy and saves in time, and can be saved, loaded, exported and put into other modules.
#
# - **What you will do**: train a model with plain torch code, convert it in ten lines, read its report, save and load it; then
#   make the feed-forward blocks of a small transformer lazy.
# - **What you will learn**: what can be converted, what is kept at which activity, and when nothing is to be gained.
# - **What you need**: basic PyTorch; `00_start_here` for the words. No GPU, no download.
# - **How long it takes**: ten minutes to read, a minute to run.

# %%
from pathlib import Path
import tempfile

from IPython.display import Markdown, display
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from condcomp_lib import claims, plots, studies, tables, time_plots
from condcomp_lib.conversion import export, install, lazify, load, report, save
from condcomp_lib.studies import conversion

plots.use_style()
torch.set_num_threads(1)
pd.set_option("display.width", 160, "display.max_columns", 20, "display.max_colwidth", None)

# %% [markdown]
# `paper` reads the finished runs that come with this companion; `quick` computes a small one here and now.

# %% tags=["parameters"]
profile: str = "paper"  # "paper": stored runs; "quick": computed now, on digits
activity: float = 0.25  # share of the hidden neurons to evaluate, above 0 up to 1

# %% [markdown]
# ## Train a model with plain torch code
#
# Odd widths, batch normalisation, dropout: nothing here comes from this library. Of the images that scikit-learn ships, 1,400
# are for training and 397 for testing.

# %%
from sklearn.datasets import load_digits

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

torch.manual_seed(0)
model = nn.Sequential(
    nn.Flatten(),
    nn.Linear(64, 301), nn.BatchNorm1d(301), nn.ReLU(), nn.Dropout(0.2),
    nn.Linear(301, 203), nn.BatchNorm1d(203), nn.ReLU(), nn.Dropout(0.2),
    nn.Linear(203, 10),
)  # fmt: skip
optimiser = torch.optim.Adam(model.parameters(), 2e-3)
for _ in range(20):
    for rows in train[torch.randperm(len(train))].split(32):
        optimiser.zero_grad()
        cross_entropy(model(images[rows]), labels[rows]).backward()
        optimiser.step()
model.eval()
with torch.no_grad():
    right = (model(images[test]).argmax(1) == labels[test]).double().mean()
print(f"test accuracy {right:.3f}")

# %% [markdown]
# ## Convert it
#
# One call. It reads the chain of layers (normalisation is folded into them), lets an oracle choose the partition, tries policies
# briefly with several ways to spread the activity over the layers, trains the best of them to follow the oracle and then to keep
# the right answers and the model's, decides between thresholds and a budget on examples held back, and compiles the result. The
# model is not changed. `epochs` instead of `seconds` makes the result the same on every machine; labels are optional (without them
# the model's answers are what is learned); nothing is learned from `test`, on which the result is reported.

# %%
fast = lazify(model, (images[train], labels[train]), activity, test=(images[test], labels[test]),
              epochs=60, progress=False)  # fmt: skip

# %% tags=["nbval-check-output"]
scores, mask = fast.evaluate(images[test].flatten(1))
close = torch.allclose(scores, fast.lazy.evaluate(images[test].flatten(1)).scores, atol=1e-4)
share = fast.lazy.partition.activity(mask).mean().item()
print(
    f"scores are the reference's: {close}; within two points of what was asked: {abs(share - activity) < 0.02}"
)
print(f"images as the model takes them: {torch.equal(fast(images[test]), scores)}")

# %% [markdown]
# ## Read its report
#
# On the test examples, which neither the model nor the conversion has seen (without `test`, on a fifth of the examples, held back
# from the conversion: where the model has learned from these, they flatter it and its lazy copy, but not the dense net of equal
# compute beside it). *kept by* is the oracle ladder: single neurons ranked by an oracle, the groups of this partition ranked by it
# (greedily: landmarks, no bounds), the policy, and a blind draw. The dense net is distilled from the same model on the same
# examples.

# %% tags=["live"]
rows = pd.DataFrame(report.rows(fast.report), columns=["", "value"])
display(Markdown(tables.markdown(rows)))
fig, axes = plt.subplots(1, 2, figsize=(10, 3.3))
time_plots.converted(fast.report, axes)
plt.show()

# %% [markdown]
# On a net as small as this one a dense engine takes microseconds, and there is little to gain; where there is nothing, the report
# says so. Below are networks of 2 and 4.5 million weights.
#
# ## Save, load, export
#
# One file of safetensors with everything else as JSON in its header: no pickle. Loaded again it gives the same numbers to the
# bit. The ONNX graph is that of the reference (everything computed, then masked), for other runtimes.

# %% tags=["nbval-check-output"]
with tempfile.TemporaryDirectory() as folder:
    path = save(fast, Path(folder) / "fast.safetensors")
    again = load(path)
    print("the same to the bit:", torch.equal(again(images[test]), fast(images[test])))
    graph = export(fast, Path(folder) / "fast.onnx")
    print("exported:", graph.name)

# %% [markdown]
# It is an `nn.Module`, for evaluation only: part of other modules, picklable, usable from several threads.
#
# ## Blocks inside a larger model
#
# `path` names a chain of layers inside a model, or a `TransformerEncoderLayer`, whose feed-forward part is meant. Here each digit
# is a sentence of eight rows. What is kept is the block's output itself, for it has no labels; the report counts the share of its
# variance. `install` returns a copy of the model with the lazy block in place.


# %%
class Rows(nn.Module):
    """A small transformer that reads a digit row by row."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = (
            nn.Linear(8, 32),
            nn.Parameter(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) / 6),
        )
        layer = nn.TransformerEncoderLayer(32, 4, 256, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x[:, 0]) + self.place).mean(1))


torch.manual_seed(0)
reader = Rows()
optimiser = torch.optim.Adam(reader.parameters(), 2e-3)
for _ in range(12):
    for rows in train[torch.randperm(len(train))].split(32):
        optimiser.zero_grad()
        cross_entropy(reader(images[rows]), labels[rows]).backward()
        optimiser.step()
reader.eval()

lazy_reader = reader
for index in range(2):
    block = lazify(lazy_reader, images[train], 0.25, path=f"encoder.layers.{index}", epochs=10,
                   finetune=True, control=False, progress=False)  # fmt: skip
    lazy_reader = install(lazy_reader, f"encoder.layers.{index}", block)

# %%
with torch.no_grad():
    for name, net in (("whole", reader), ("lazy blocks", lazy_reader)):
        right = (net(images[test]).argmax(1) == labels[test]).double().mean()
        print(f"{name:<12} {right:.3f} test accuracy")

# %% [markdown]
# ## At real sizes
#
# Models of the same kind, odd widths, plain torch code, on MNIST (1201 and 1003 neurons) and SVHN (1021, 807 and 603), converted
# at activities from 2% to 80%: without fine-tuning, with it, and on SVHN with it for eight minutes; all others within three minutes,
# on two cores. Everything is measured on test data, which neither the model nor its conversion has seen; *ratio* is the lazy
# network's accuracy over the full one's, *dense, equal compute* that of a dense net of as many multiply-adds, distilled from the
# same model on the same examples. Speed-ups are over the fastest dense engine of the machine, one thread, the slower seed's.

# %%
records = studies.records("conversion", profile)
fig, axes = plt.subplots(1, 2, figsize=(10, 4))
time_plots.kept_and_gained(conversion.fronts(records), axes)
plots.save_figure(fig, "conversion_activity", records, profile)
plt.show()

# %% tags=["nbval-check-output"]
table = tables.frame(conversion.table(records))
tables.save_table(table, "conversion_table", records, profile)
display(Markdown(tables.markdown(table)))

# %% [markdown]
# ## Judge the claims

# %% tags=["nbval-check-output"]
judged = claims.check_verdicts(conversion.claims(records), profile)
claim_table = tables.frame(tables.claim_rows(judged))
shown = ["claim", "found", "holds if", "verdict"]
display(
    Markdown(tables.markdown(claim_table[shown]) if judged else "Too little is converted here.")
)

# %% [markdown]
# ## What we found

# %%
display(Markdown(conversion.finding(records)))

# %% [markdown]
# ## What it cannot do
#
# - **Layers**: Linear, ReLU or Tanh, BatchNorm1d, Dropout, Flatten, in a chain; no GELU, under which no neuron is ever at zero, and
#   no convolutions (`06_joint_training` has lazy conv nets, trained for it). What is not supported is named, and the model left alone.
# - **Evaluation only**, on a processor, in float32.
# - **Small networks gain little**: a dense engine is done in microseconds; where nothing is gained, the report says so.
# - **Accuracy is not guaranteed**: a policy is trained, within the time given. The report measures it, beside a dense net of equal
#   compute, which keeps as much or more in almost every row above: where a new, smaller network will do, train that.
#
# ## References
#
# - *partitions*: V. Antaki, E. Bengio. Applying conditional computation methods by learning neuron partitions.
# - *faster-models*: E. Bengio, P.-L. Bacon, J. Pineau, D. Precup. Conditional computation in neural networks for faster
#   models. arXiv:1511.06297, 2015.
