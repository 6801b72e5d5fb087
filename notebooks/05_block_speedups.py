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
# # Block speedups: turn skipped groups into saved time
#
# The earlier notebooks counted multiply-adds. A processor counts microseconds, and is at its best with dense products:
# *retrospective* calls it hard to compete with them, and the papers' kernels were never usable by others. Here a lazy network
# becomes one compiled call, from a plain `pip install`, which gives the same scores in the time of what its masks ask for.
#
# - **What you will do**: see which weights an input reads, multiply by blocks yourself, compile a lazy network, and
#   hold it against the fastest dense engines.
# - **What you will learn**: when skipping pays (few examples at a time, or many), when it does not, and what a trained lazy
#   network is worth beside a dense one that takes as long.
# - **What you need**: `01_partitioning`; `02_policies` for the trained networks. No GPU, no download.
# - **How long it takes**: fifteen minutes to read, a minute to run.

# %%
from IPython.display import Markdown, display
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from condcomp_lib import claims, datasets, kernels, paths, plots, studies, tables, time_plots
from condcomp_lib.kernels import timing
from condcomp_lib.lazy import LazyNetwork, decided_by
from condcomp_lib.partitions import make_partition
from condcomp_lib.policies import Budget, Policy, Sample
from condcomp_lib.policy_training import policy_plan, train_policy
from condcomp_lib.runs import RunStore
from condcomp_lib.studies import block_results, blocks_accuracy, targets
from condcomp_lib.training import obtain_target

plots.use_style()
torch.set_num_threads(1)
pd.set_option("display.width", 160, "display.max_columns", 20, "display.max_colwidth", None)

# %% [markdown]
# `paper` reads the finished runs that come with this companion; `quick` measures small ones here and now.

# %% tags=["parameters"]
profile: str = "paper"  # "paper": stored runs; "quick": computed now
groups: int = 8  # groups over the digits network below (1 to 64)
tau: float = 0.25  # share of its neurons that are evaluated, above 0 up to 1

# %% [markdown]
# ## See which weights an input reads
#
# A network on digits, cut into groups that span its layers, and a policy trained for a few seconds (by straight-through
# gradients, see `02_policies`). Each digit gets the groups with the highest logits, as many for all.

# %%
settings = {"dataset": "digits", "architecture": "2x64", "target_seed": 0}
data = datasets.load("digits")
target, _ = obtain_target(
    targets.target_of({**settings, "pretraining": "none", "dropout_eps": None}),
    data,
    RunStore(paths.artefacts("quick")),
)
generator = torch.Generator().manual_seed(0)
partition = make_partition("balanced", target.hidden, groups, generator)
policy = Policy(partition, inputs=64, generator=generator)
lazy = LazyNetwork(target, partition, policy, Sample(generator))
plan = policy_plan(
    estimator="straight-through", sparsity="rate", lambda_s=1.0, tau=tau, batch=32, epochs=8,
    learning_rate=5e-3,
)  # fmt: skip
train_policy(lazy, data, plan, torch.Generator().manual_seed(0))
lazy = decided_by(lazy, Budget.of(tau, partition, policy))

# %% [markdown]
# Between two hidden layers an input reads the weights from the groups it evaluates below to those it evaluates above: a
# quarter of the neurons is a sixteenth of these weights. Two digits, and what a minibatch of eight reads between them: the
# **union** of its masks, which grows with every example. That is why one at a time is the best case, and why a minibatch must
# be put together group by group.

# %%
x = torch.from_numpy(data.test.x)
masks = lazy.evaluate(x[:8]).mask
sizes = [torch.bincount(members, minlength=groups).tolist() for members in partition.membership]
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.6))
for ax, chosen, name in zip(
    axes,
    (masks[:1], masks[1:2], masks),
    ("one digit", "another digit", "eight digits"),
    strict=True,
):
    bits = chosen.float().numpy()
    time_plots.block_product((bits.T @ bits) > 0, *sizes, ax)
    ax.set_title(f"{name}: {ax.get_title()}", fontsize=9)
    ax.label_outer()
plt.show()

# %% [markdown]
# ## Multiply by blocks
#
# Sort the neurons by group, and each group's weights are a contiguous **panel**. For one example, take the panels of the
# groups that its mask names; by hand, on the first layer:

# %% tags=["nbval-check-output"]
order = torch.argsort(partition.membership[0], stable=True)
panels = target.linears[0].weight[order].split(sizes[0])
biases = target.linears[0].bias[order].split(sizes[0])
found = lazy.evaluate(x[:1])
wanted = [group for group in range(groups) if found.mask[0, group]]
with torch.no_grad():
    rows = [torch.relu(panels[group] @ x[0] + biases[group]) for group in wanted]
full = torch.split(found.hidden[0][0, order], sizes[0])
same = all(torch.allclose(a, full[g], atol=1e-5) for a, g in zip(rows, wanted, strict=True))
print(f"{len(wanted)} of {groups} panels, the same activations: {same}")

# %% [markdown]
# For many examples with masks of their own, turn the loop around: for each *group*, list the examples that want it, and
# multiply them by its panel together, so that a weight is read once for all of them, while the next panel is on its way into
# the cache. Above the first layer both sides are sparse, and there are three ways to add up what lies below, of which every
# call takes the one that should cost least for its masks: *lists* of the neurons below that are not zero after their ReLU, each
# of which adds a row of the panel above (few examples); for each *pair* of groups, the examples that want both (many, and wide
# groups); or products with all that lies below, skipped neurons as zeros (narrow groups, or little skipped). The kernels do this
# with register tiles written as vector code (`kernels/tiles.py`), sixteen numbers wide where the processor has AVX-512 and eight
# elsewhere; decision and policy are in the same call.
#
# ## Compile a lazy network
#
# One call. The result takes and gives tensors or arrays; its scores are those of the reference, which computes everything and
# then masks.

# %% tags=["nbval-check-output"]
fast = kernels.compile(lazy, batch="one")
together = kernels.compile(lazy, batch="per-example")
for compiled in (fast, together):
    scores, mask = compiled.evaluate(x)
    reference = lazy.evaluate(x)
    agree = (mask == reference.mask).double().mean()
    accuracy = (scores.argmax(1) == torch.from_numpy(data.test.y)).double().mean()
    print(
        f"{compiled.batch:<12} masks agree {agree:.3f}, "
        f"scores agree {torch.allclose(scores, reference.scores, atol=1e-3)}, accuracy {accuracy:.3f}"
    )

# %% [markdown]
# Time on this machine, now: engines in turn, medians. (On a net this small a call costs more than its arithmetic, and a
# dense engine loses by its overhead. The rest of the notebook is about networks of a real size.)

# %% tags=["live"]
inputs = [np.ascontiguousarray(data.test.x[i : i + 1]) for i in range(64)]
engines, skipped = timing.dense_engines(target, 1, ["eager", "onnxruntime"])
times = timing.interleaved({"lazy": fast, **engines}, inputs, repeats=5)
for name, micro in times.items():
    print(f"{name:<12} {np.median(micro):6.1f} microseconds for one digit")
for name, why in skipped.items():
    print(f"{name:<12} skipped: {why}")

# %% [markdown]
# ## Speed-up against sparsity
#
# The papers' SVHN network, 3072-800-800-800-10, cut into groups that span the layers; a policy on the raw pixels, evaluated and
# timed too. Untrained weights, and standard normal inputs, whose masks differ from example to example as much as masks can
# (time does not depend on what a network has learned; trained ones follow below). Each row sets the compiled
# network against the **fastest** of eager PyTorch, `torch.compile` and ONNX Runtime: interleaved repeats, at least 64 different
# inputs in turn, one thread, float32. Left: one example at a time; more groups cost more policy, and a
# group's neurons come in fours and rows of weights in eights, so that groups of three (256 over the layers) read more than
# they need. Right: 16 groups, one mask shared by the examples of a minibatch, as in *dropout-policies*.

# %%
records = studies.records("blocks", profile)
lines = (block_results.by_groups(records, 1), block_results.by_sharing(records))
fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
for ax, drawn in zip(axes, lines, strict=True):
    time_plots.speedups(drawn, ax)
axes[0].set_title("one example, by number of groups")
axes[1].set(title="one mask for a minibatch", ylabel="")
plots.save_figure(fig, "blocks_sparsity", records, profile)
plt.show()

# %% [markdown]
# ## Where it pays
#
# Masks for single examples, 16 groups. A number is how many times as fast as the fastest dense engine the lazy network is;
# red cells: slower. Few examples at a time read nearly all the weights (their union) for little arithmetic; many give every
# group enough examples for full tiles.

# %%
batches, activities, grid = block_results.surface(records)
fig, ax = plt.subplots(figsize=(7.5, 0.9 + 0.36 * len(batches)))
time_plots.speedup_surface(batches, activities, grid, ax)
plots.save_figure(fig, "blocks_surface", records, profile)
plt.show()

# %% [markdown]
# The rows that this companion makes promises about, each measured in two separate runs, of which the table shows the
# slower. *control* is the dense net of equal multiply-adds on its fastest engine; *masked dense* is what the papers timed
# their kernels against, the net computed in full and then masked. *share of roofline*: the least time that this core's measured
# peak of multiply-adds and its measured bandwidth allow for what must be computed and read, over the time it took. Rows with
# bfloat16 and int8 weights round the target (the dense engines stay at float32).

# %% tags=["nbval-check-output"]
table = tables.frame(block_results.rows(block_results.promised(records), records), 2)
tables.save_table(table, "blocks_table", records, profile)
display(Markdown(tables.markdown(table)))

# %% tags=["nbval-check-output"]
print(block_results.measured_on(records[0]) if profile == "paper" else "measured now")

# %% [markdown]
# ## Time against accuracy
#
# The trained networks of `02_policies` (SVHN, 100 groups a layer, pooled pictures): accuracy and time from the same compiled
# object, on test digits one at a time. Grey: dense nets of 64 to 320 units a layer, distilled from the same target, each on
# its fastest engine; dashed, two that learned from moved pictures (192 and 288 units), as the fine-tuned network did. A point
# left of a grey line and above it beats the dense net of equal time; beyond 320 units the table interpolates towards the target
# itself (fine-tuned in full, for moved pictures).

# %%
trained = studies.records("blocks-accuracy", profile)
widest = blocks_accuracy.rivals(trained)
fig, ax = plt.subplots(figsize=(7.5, 4.4))
time_plots.time_and_accuracy(blocks_accuracy.points(trained, widest), ax)
fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
plots.save_figure(fig, "blocks_accuracy", [*trained, *widest], profile)
plt.show()

# %% tags=["nbval-check-output"]
table = tables.frame(blocks_accuracy.table(trained, widest))
tables.save_table(table, "blocks_accuracy_table", [*trained, *widest], profile)
display(Markdown(tables.markdown(table)))

# %% [markdown]
# ## Explore speed
#
# Your machine instead of ours: when a slider rests, the network in question is compiled and timed beside the dense engines
# (a second; the very first time the kernels are compiled, too), and its point appears beside the line of the multiply-adds, the
# speed-up if both were as busy, and the stored runs of the table above.

# %%
from condcomp_lib.widgets import speed as speed_explorer

speed_explorer.explore()

# %% [markdown]
# ## Judge the claims
#
# A speed-up must lie above its level in both runs; the interval is that of the slower run's repeats, on one machine.

# %% tags=["nbval-check-output"]
judged = claims.check_verdicts(
    [*block_results.claims(records), *blocks_accuracy.claims(trained)], profile
)
claim_table = tables.frame(tables.claim_rows(judged))
shown = ["claim", "source", "found", "holds if", "verdict"]
display(
    Markdown(tables.markdown(claim_table[shown]) if judged else "Too little is timed here.")
)

# %% [markdown]
# ## Compare: published and ours
#
# Ours are always those of the paper profile. The papers' machines and dense rivals were others, so the numbers say that
# a claim of this kind holds today, not that ours is the same measurement.

# %%
overview = tables.compact(pd.DataFrame(studies.overview()))
here = overview[overview.id.isin(["Ds4.06", "Fs41.01", "Sfc.01"])]
display(Markdown(tables.markdown(here)))

# %% [markdown]
# ## What we found

# %%
display(Markdown(blocks_accuracy.finding(trained, widest)))

# %% [markdown]
# ## What differs from the papers
#
# - **The rival** is the fastest dense engine of today. *faster-models* times its kernel against the same net computed in full
#   and then masked; that column is there, too.
# - **One core of a processor**, float32. The papers also have kernels for graphics processors; ours for those give the same
#   scores under an interpreter and claim no speed until one is measured.
# - **The policy is in every timer.** *dropout-policies* leaves it out of its 10%.
# - **A shared mask** is decided from the mean of its examples' logits; the paper does not say how.
#
# ## References
#
# - *faster-models*: E. Bengio, P.-L. Bacon, J. Pineau, D. Precup. Conditional computation in neural networks for faster
#   models. arXiv:1511.06297, 2015.
# - *dropout-policies*: P.-L. Bacon, E. Bengio, J. Pineau, D. Precup. Conditional computation in neural networks using a
#   decision-theoretic approach. RLDM 2015.
# - *retrospective*: E. Bengio. ML Retrospectives, 2019.
# - S. Williams, A. Waterman, D. Patterson. Roofline: an insightful visual performance model for multicore architectures.
#   Communications of the ACM 52(4), 2009.
