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
# # Start here: what conditional computation is
#
# A trained network computes every neuron for every input, although for any one input many are at zero and more hardly
# matter. *Conditional computation* evaluates only the part of the network that an input needs. This companion
# sets out to reproduce the texts on it (see the references) and to measure what they promised; below stands how far it
# has come.
#
# - **What you will do**: train a small network on handwritten digits, watch which of its neurons fire, skip the rest,
#   and see what that costs and saves.
# - **What you will learn**: what the words mean that all notebooks use (target network, partition, policy, lazy
#   network), and how much there is to gain before any of them is at work.
# - **What you need**: basic PyTorch. No GPU, no download.
# - **How long it takes**: ten minutes to read, under a minute to run.

# %%
from IPython.display import Markdown, display
import matplotlib.pyplot as plt
import pandas as pd
import torch

from condcomp_lib import claims, paths, plots, studies, tables
from condcomp_lib.runs import RunStore
from condcomp_lib.studies import start
from condcomp_lib.targets import multiply_adds
from condcomp_lib.training import obtain_target

plots.use_style()
torch.set_num_threads(1)  # results depend on it, and networks this small gain nothing from more
pd.set_option("display.width", 160, "display.max_columns", 20, "display.max_colwidth", None)

# %% [markdown]
# Every notebook has one cell of parameters. `paper` reads the finished runs that come with this companion (seconds, no
# data needed); `quick` computes small ones on digits, here and now.

# %% tags=["parameters"]
profile: str = "paper"  # "paper": stored runs; "quick": computed now, on digits
example: int = 3  # which test digit to look at (0 to 359)

# %% [markdown]
# ## Meet the words
#
# | word | meaning | symbol |
# |---|---|---|
# | target network | the trained network that does the task, evaluated in full | $T_\theta$ |
# | partition | an assignment of its hidden neurons to groups | $\mathcal{P} = \{\mathcal{H}_1, ..., \mathcal{H}_k\}$ |
# | policy | maps an input to the probability of evaluating each group | $\pi_\omega(M \mid X)$ |
# | mask | the bits drawn from it: one per group and example | $M$ |
# | lazy network | target, partition and policy together, evaluated only where the mask says | $Z$ |
# | activity | share of hidden neurons that are evaluated | |
# | compute | share of the target's multiply-adds that are spent, the policy's own included | |
# | accuracy ratio | accuracy of the lazy network over that of its target, on the same examples | |
#
# The chain is short. A policy looks at the input and says which groups of neurons are worth computing; the others
# count as zero:
#
# $$ h_i = \begin{cases} \max(0, \mathbf{w}_i^\top \mathbf{x} + b_i) & \text{if } M_{g(i)} = 1 \\
# 0 & \text{otherwise}\end{cases} \qquad\text{with } M_g \sim \mathrm{Bernoulli}\big(\pi_\omega(X)_g\big), $$
#
# where $g(i)$ is the group of neuron $i$. Nothing is saved unless the skipped neurons are really not computed, and
# nothing is worth saving unless the answer stays right. Everything in this companion is about those two conditions.

# %% [markdown]
# ## Move a slider
#
# Before any detail: a trained network, and the share of its neurons that are evaluated under your finger. A policy has
# learned which of 50 groups in each layer an input needs. Run the cell (*Run > Run All Cells*), and drag: the left
# side shows what the accuracy does, the right side what is evaluated for one example, and for which class. Where no
# kernel runs, you see a picture of it.

# %%
from condcomp_lib.widgets import sparsity

sparsity.explore(activity=25, example=example)

# %% [markdown]
# Try: how low can the activity go before the answers change? Does a random partition do as well as one from
# coactivation? And what is the time below the picture, which is measured on your machine once a slider rests, worth on
# a network this small? (The curves are of stored runs. The two small networks are one of these, with weights of 8 bits, whose
# policy was trained at 15% activity and is asked for more or fewer groups; on SVHN each point of the curve has a policy of its
# own, and the one in your hands was trained at 25%.)

# %% [markdown]
# ## Train a network on digits
#
# The live part of each notebook uses the 8 x 8 digits that come with scikit-learn: 1,077 to train on, 360 to choose
# the epoch by, 360 to test. The target has two hidden layers of 64 ReLU neurons.

# %%
data = studies.dataset("digits")
spec = start.target_of(
    {"dataset": "digits", "architecture": "2x64", "pretraining": "none", "target_seed": 0}
)
target, record = obtain_target(spec, data, RunStore(paths.artefacts("quick")))
print(
    f"test accuracy {record.result['test_accuracy']:.3f} after {record.result['epochs']} epochs"
)

# %% [markdown]
# ## Watch which neurons fire
#
# One digit goes in. The darker a cell below, the larger the activation; white neurons are at exactly zero. The network
# computed the white ones all the same: a weighted sum of all inputs each, to find out that the answer is nothing. And
# most of the pale ones change little in what comes out.

# %%
x = torch.from_numpy(data.test.x[example : example + 1])
with torch.inference_mode():
    first = target.activation(target.layers[0](x))
    second = target.activation(target.layers[1](first))
    answer = target.layers[2](second).argmax().item()

fig, axes = plt.subplots(1, 2, figsize=(8, 1.9), width_ratios=(1, 5))
plots.digit(data.test.x[example].reshape(8, 8), f"read as {answer}", axes[0])
plots.firing([first[0].numpy(), second[0].numpy()], axes[1])
axes[1].set_title(
    f"layer 1: {(first > 0).sum()} of 64 neurons fire, layer 2: {(second > 0).sum()} of 64"
)
plt.show()

# %% [markdown]
# ## Skip neurons, well and badly
#
# If someone told us beforehand which neurons matter, we could compute only those. Two landmarks for what a policy can
# do: an **oracle** has seen all activations and keeps, for each digit, the neurons that contribute most to the next
# layer ($|h_i|$ times the norm of the outgoing weights); a **blind** choice keeps as many at random. They are no
# bounds. The oracle's rule is greedy, and a learned choice might do better; but no policy sees what it sees, and a
# policy must pay for its own computation, which neither of these does.

# %%
generator = torch.Generator().manual_seed(0)
for share in (1.0, 0.5, 0.25, 0.1):
    best = start.skipped_accuracy(target, data, share, "best")
    blind = start.skipped_accuracy(target, data, share, "random", generator)
    print(f"{share:4.0%} of the neurons: oracle {best:.2f}, blind {blind:.2f} test accuracy")

# %% [markdown]
# ## Count what skipping saves
#
# The papers' usual network on SVHN has 3,072 inputs, three hidden layers of 800 and ten outputs. Between two hidden
# layers, skipping works on both sides: a quarter of the neurons leaves a sixteenth of the products. The first layer is
# different, because the pixels are never skipped, and it holds two thirds of the work.

# %% tags=["nbval-check-output"]
widths = [3072, 800, 800, 800, 10]
full = multiply_adds(widths)
for share in (1.0, 0.5, 0.25, 0.1):
    lazy = multiply_adds(widths, [share] * 3)
    by_layer = " ".join(f"{part / whole:7.4f}" for part, whole in zip(lazy, full, strict=True))
    print(f"{share:4.0%} of neurons: {by_layer} by layer, {sum(lazy) / sum(full):.3f} in all")

# %% [markdown]
# > **The slides say** (*slides*, conclusion, id `Send.01`) that a quarter of the units means about 6.25% of the
# > computation.
#
# That holds for a product between two hidden layers. For this whole network the share printed above is three times as
# much, and its inverse bounds any speed-up at 25% activity, before a policy has been paid for.

# %% [markdown]
# ## Measure it on real networks
#
# Now the same two extremes over several seeds: dense networks as the papers used them as baselines, trained here with
# Adam and a learning rate that falls to zero. Thin lines are single runs, thick lines their medians.

# %%
records = studies.records("start", profile)
groups = start.by_network(records)
size = (2.3 * len(groups) + 0.6, 3.0)
fig, axes = plt.subplots(1, len(groups), figsize=size, sharey=True, squeeze=False)
for ax, ((dataset, architecture), group) in zip(axes[0], groups.items(), strict=True):
    plots.skipping(start.curves(group), ax)
    ax.set(title=f"{dataset}, {architecture}", xlabel="neurons evaluated (%)")
    ax.label_outer()
fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
plots.save_figure(fig, "start_skipping", records, profile)
plt.show()

# %%
fig, ax = plt.subplots(figsize=(1.6 * len(groups) + 2.2, 3.1))
plots.activity_by_layer(start.activities(groups), ax)
plots.save_figure(fig, "start_activity", records, profile)
plt.show()

# %% [markdown]
# Every number is an interquartile mean over seeds with a 95% bootstrap interval, never the best run. The intervals speak
# of seeds only, not of the test set's own error, and with few seeds they are too narrow: `condcomp_lib.stats` gives
# their measured coverage, below 90% for five runs or fewer. Read "holds" and "refuted" below with that in mind.

# %% tags=["nbval-check-output"]
summary = tables.frame(start.summary(records))
tables.save_table(summary, "start_targets", records, profile)
display(Markdown(tables.markdown(summary)))

# %% [markdown]
# ## Judge the claims
#
# Each notebook states its claims as tests and judges them by their intervals: a claim *holds*, is *refuted*, or is
# *undecided*. What was found once is recorded; a refuted claim stays in, and a verdict that changes is an error.

# %% tags=["nbval-check-output"]
judged = claims.check_verdicts(start.claims(records), profile)
rows = tables.frame(tables.claim_rows(judged))
display(Markdown(tables.markdown(rows[["claim", "found", "holds if", "verdict"]])))

# %% [markdown]
# ## Find your way
#
# Where each part of the papers is taken up, and how far it has come:

# %%
display(Markdown(tables.markdown(pd.DataFrame(studies.items()))))

# %% [markdown]
# ## Compare: published and ours
#
# All numbers that this companion works on, with ours beside them as they arrive. "Lost" marks cells that the paper
# itself could not report, "described" what it says in words only. Ours always come from the stored runs of the paper
# profile.

# %%
overview = pd.DataFrame(studies.overview())
if profile == "paper":
    tables.save_table(overview, "overview", studies.everything(profile), profile)
rows = tables.compact(overview)
answered, waiting = rows[rows.ours != "not yet"], rows[rows.ours == "not yet"]
display(Markdown(studies.progress()))
display(Markdown(tables.markdown(answered)))
table = tables.markdown(waiting.drop(columns="ours"))
title = f"{len(answered)} of {len(overview)} numbers have ours; click for those still to come"
display(Markdown(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"))

# %% [markdown]
# ## What we found

# %%
display(Markdown(start.findings(records)))

# %% [markdown]
# ## What differs from the papers
#
# - **SVHN without its extra set.** The papers trained on about 600,000 digits; the 531,131 of the "extra" set are not
#   used here, so targets reach a lower accuracy. Compare ratios, not levels. Digits of one photo are neighbours in the
#   file, hence contiguous ranges: 57,257 to train, 6,000 to validate, 10,000 to test, all from the train file.
# - **Adam with a falling learning rate for 12 to 20 epochs** instead of plain gradient descent for up to 1,000; the
#   weights of the epoch with the best validation accuracy.
# - **Intervals over seeds** instead of the best runs of a search.
#
# ## References
#
# - *partitions*: V. Antaki, E. Bengio. Applying conditional computation methods by learning neuron partitions.
# - *dropout-policies*: P.-L. Bacon, E. Bengio, J. Pineau, D. Precup. Conditional computation in neural networks using a
#   decision-theoretic approach. RLDM 2015.
# - *faster-models*: E. Bengio, P.-L. Bacon, J. Pineau, D. Precup. Conditional computation in neural networks for faster
#   models. arXiv:1511.06297, 2015.
# - *slides*: E. Bengio, P.-L. Bacon, R. Lowe, J. Pineau, D. Precup. Reinforcement learning of conditional computation
#   policies for neural networks. June 2016.
# - *retrospective*: E. Bengio. Retrospective on *faster-models*. ML Retrospectives, 2019.
