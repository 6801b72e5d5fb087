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
# # Joint training: network and policy learned together
#
# So far a trained network was made lazy afterwards. The first two papers start from nothing: a policy for each layer switches
# single units (*dropout-policies*, 2015) or blocks of them (*faster-models*, 2015) while the network learns, and the network learns
# what its policies leave on. Here is every row of their tables and every figure for fully connected nets, trained as they did and
# by today's means, beside dense nets.
#
# - **What you will do**: train a conditional network on digits, look at its policy, and compare those of the papers with dense nets of
#   equal compute.
# - **What you will learn**: what REINFORCE sees of the sparsity loss, why policies of two layers are hard to start, and
#   where a conditional network beats a dense one of equal compute, and where it does not.
# - **What you need**: `02_policies` for the estimators, `05_block_speedups` for the kernels. No GPU, no download.
# - **How long it takes**: thirty minutes to read, a minute to run.

# %%
from IPython.display import Markdown, display
import matplotlib.pyplot as plt
import pandas as pd
import torch

from condcomp_lib import claims, joint_plots, paths, plots, studies, tables
from condcomp_lib.joint_training import joint_spec, obtain_jointly
from condcomp_lib.lazy import evaluate
from condcomp_lib.runs import RunStore
from condcomp_lib.studies import (
    conv_results,
    conv_time,
    joint_first,
    joint_results,
    joint_search,
    joint_switches,
    joint_time,
)

plots.use_style()
torch.set_num_threads(1)  # results depend on it
pd.set_option("display.width", 160, "display.max_columns", 20, "display.max_colwidth", None)

# %% [markdown]
# `paper` reads the finished runs that come with this companion; `quick` computes small ones on digits, here and now.

# %% tags=["parameters"]
profile: str = "paper"  # "paper": stored runs; "quick": computed now, on digits
tau: float = 0.25  # sparsity target of the digits network below, above 0 up to 1
lambda_s: float = 0.3  # weight of the losses that hold it there, 0 or more

# %% [markdown]
# ## One minibatch, two gradients
#
# Layer $l$ has a policy $\sigma = \mathrm{sigm}(Z s + o)$ that reads the layer below after its own mask (the first one reads the input)
# and sets a bit for each unit, or for each block of units. A minibatch is evaluated under sampled masks, and
#
# - the network's weights follow the gradient of the negative log likelihood under these masks;
# - the policy follows REINFORCE, $(C - b)\, \nabla \log \pi(u \mid s)$ with $C$ the example's cost, at a learning rate of its own.
#
# A cost vector times the Jacobian of $\log \pi$ is one backward pass; the Jacobian is never formed:

# %% tags=["nbval-check-output"]
timed = studies.records("joint-time", profile)
print(
    joint_time.memory_finding(timed) if profile == "paper" else "Measured in the paper profile."
)

# %% [markdown]
# What keeps blocks off differs between the papers, over units or blocks $j$ and examples $i$:
#
# | | added to | |
# |---|---|---|
# | *dropout-policies*, (6) | REINFORCE's cost | $\lambda \sum_j \mathrm{KL}(\sigma_{ij} \,\Vert\, q)$, $q$ the base rate |
# | *faster-models*, text | the loss | $\lambda_s (L_b + L_e) + \lambda_v L_v$ with $L_b = \sum_j \lvert \overline{\sigma}_j - \tau \rvert$, $L_e = \overline{\lvert \overline{\sigma}_i - \tau \rvert}$, $L_v = -\sum_j \mathrm{var}_i\, \sigma_{ij}$ |
# | *faster-models*, code | the loss | the same with squares, $L_e$ times 0.001, and a tenth of the variance across units |
#
# > **We differ here, because** the divergence inside REINFORCE's cost has *no* influence on the gradient, on average, in a network with one hidden
# > layer: it depends on the input but not on the sampled bits, so it acts as a baseline does. (With two layers the divergence of the second
# > depends on the bits of the first.) *KL corrected* adds what is missing, the divergence's own gradient. Tests hold both against exact gradients.
#
# Now on digits: 64 units in 8 blocks, one gate, the text's losses; the network is trained dense, by REINFORCE, and by sending the gradient of
# the scores through the bits of a budget.

# %%
data = studies.dataset("digits")
artefacts = RunStore(paths.artefacts(profile))
common = {"epochs": 40, "batch": 32, "network_rate": 3e-3, "learning_rate": 3e-3, "tau": tau}
ways = {
    "dense": {"estimator": "dense"},
    "REINFORCE": {"estimator": "reinforce", "lambda_s": lambda_s, "lambda_v": lambda_s},
    "budget, straight through": {
        "estimator": "budget-through",
        "lambda_s": lambda_s,
        "lambda_v": lambda_s,
        "rates": [tau],
    },
}
x, y = torch.from_numpy(data.test.x), torch.from_numpy(data.test.y)
for name, how in ways.items():
    spec = joint_spec("digits", "64", 8, seed=0, **common, **how)
    lazy, trained = obtain_jointly(spec, data, artefacts)
    with torch.inference_mode():
        found = evaluate(lazy, x)
        scores = lazy.target(x) if name == "dense" else found.scores
    share = 1.0 if name == "dense" else lazy.partition.activity(found.mask).mean()
    wrong = (scores.argmax(1) != y).double().mean()
    print(f"{name:<26} wrong {100 * wrong:4.1f}%, units evaluated {100 * share:3.0f}%")

# %% [markdown]
# How likely the last network's blocks are for each class; with sampled masks a block is on as often as its row is dark.

# %%
with torch.inference_mode():
    sigma = evaluate(lazy, x).logits.sigmoid()
rates = torch.stack([sigma[y == label].mean(0) for label in range(10)]).numpy()
fig, ax = plt.subplots(figsize=(5, 3.4))
fig.colorbar(joint_plots.by_class(rates, ax), label="mean probability")
plt.show()

# %% [markdown]
# ## *dropout-policies*: single units
#
# > **The paper says** (section 4): 500 units on MNIST, policy started at 10-15% active units: 2.0% test error with about 30% of the units
# > active, 1.7% without a policy. With 800-800 units and $\lambda = 0.0001$ the first layer's activity rises faster than the second's. The entropy
# > of the policy falls (Figure 1 a, b, c).
#
# The mean of three runs with the divergence in the cost as published; each run is a thin line.

# %%
records = studies.records("joint", profile)
data_sets = list(dict.fromkeys(record.spec.settings["dataset"] for record in records))
groups = joint_results.networks(records)
paper = profile == "paper"
shown = (
    (("mnist", "500"), ("mnist", "800-800"))
    if paper
    else (("digits", "64"), ("digits", "48-32"))
)
fig, axes = plt.subplots(1, 3, figsize=(10, 3.2))
for ax, (dataset, architecture) in zip(axes, shown, strict=False):
    layers = 100 * joint_results.curves(
        groups[dataset, architecture, joint_results.PAPER], "activity"
    )
    plots.over_epochs({f"layer {i + 1}": layers[:, :, i] for i in range(layers.shape[2])}, ax)
    ax.set(
        title=f"{dataset} {architecture}", xlabel="epoch", ylabel="active (%)", ylim=(0, None)
    )
    ax.legend()
entropy = {
    architecture: joint_results.curves(
        groups[dataset, architecture, joint_results.PAPER], "entropy"
    )[:, :, 0]
    for dataset, architecture in shown
}
plots.over_epochs(entropy, axes[2])
axes[2].set(title="first policy", xlabel="epoch", ylabel="entropy (nats a bit)", ylim=(0, None))
axes[2].legend()
plots.save_figure(fig, "joint_curves", records, profile)
plt.show()

# %% [markdown]
# The paper drops "the same units for all instances in a block" of 32 and leaves open what that costs. *One mask for 32 examples* shares one,
# decided from the mean logits, in training and in tests; it is to be compared with *KL corrected*, which has the same weight (and starts
# as sparse), because as published nothing keeps activity low. *Today's* is straight-through with Adam and thresholds calibrated
# to 14%. A policy for single units costs as many multiply-adds as its layer, so none of these saves computation: that is why the next paper
# has blocks.
#
# ## *faster-models*: blocks
#
# Each table: the network, the paper's error, ours with the interval over three seeds, what share of the hidden units an example evaluates
# (and of each layer), its multiply-adds with the policy's, and the error of the dense net that takes as many, trained as long on the same
# pictures.

# %% tags=["nbval-check-output"]
for dataset in data_sets:
    table = tables.frame(joint_results.table(records, dataset))
    tables.save_table(table, f"joint_{dataset}_table", records, profile)
    display(Markdown(f"**{joint_results.DATA[dataset]}**\n\n{tables.markdown(table)}"))

# %%
fig, axes = plt.subplots(
    1, len(data_sets), figsize=(10, 3.8) if len(data_sets) > 1 else (5, 3.8), squeeze=False
)
handles: dict = {}
for ax, dataset in zip(axes[0], data_sets, strict=True):
    joint_plots.errors(joint_results.errors(records, dataset), ax)
    ax.set(
        title=joint_results.DATA[dataset],
        ylabel="" if ax is not axes[0][0] else "test error (%)",
    )
    handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
plots.save_figure(fig, "joint_errors", records, profile)
plt.show()

# %% [markdown]
# ## What a policy looks like
#
# Figure 1 of *faster-models*: how likely each block is for each class and over all of them, as published and by today's means, and the
# weights of the first policy as pictures: a bright pixel speaks for the block where it is blue, against it where it is red.

# %%
kind = ("mnist", "256") if paper else ("digits", "64")
blocks = {
    way: joint_results.networks(records)[*kind, way][0]
    for way in (joint_results.PAPER, joint_results.OURS)
}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for ax, (way, record) in zip(axes, blocks.items(), strict=True):
    used = "sigma" if way == joint_results.PAPER else "set"
    picture = joint_plots.by_class(record.arrays()[used].astype(float), ax)
    ax.set(title=f"{way}: {'mean probability' if used == 'sigma' else 'share of examples'}")
axes[1].set_ylabel("")
fig.colorbar(picture, ax=axes)
plots.save_figure(fig, "joint_policy", records, profile)
plt.show()

# %%
gates = {way: record.arrays()["gate"] for way, record in blocks.items()}
high = -(-len(gates[joint_results.OURS]) // 8)
fig, axes = plt.subplots(2 * high, 8, figsize=(8, 2.1 * high))
for way, part in zip(blocks, (axes[:high], axes[high:]), strict=True):
    joint_plots.weights(gates[way], part.ravel())
    part[0, 0].set_title("")
    part[0, 0].set_title(f"{way}: 0", loc="left", fontsize=8, pad=2)
plots.save_figure(fig, "joint_gates", records, profile)
plt.show()

# %% [markdown]
# ## Every run of a search
#
# Figure 3 of *faster-models* plots its search, time against error, and the retrospective regrets that only the best points were reported. This is
# ours, declared before: sixteen conditional nets and eight dense ones drawn once from the same widths and learning rates (block size, $\tau$,
# $\lambda_s$, $\lambda_v$ for the conditional ones), three epochs of SVHN, REINFORCE and Adam; every run is shown. Times are those of compiled
# kernels, policy included, and of the faster of PyTorch and ONNX Runtime for dense nets.

# %%
tried = studies.records("joint-search", profile)
fig, ax = plt.subplots(figsize=(6, 3.8))
joint_plots.searched(joint_search.searched(tried), ax)
ax.legend()
plots.save_figure(fig, "joint_search", tried, profile)
plt.show()

# %% tags=["nbval-check-output"]
table = tables.frame(joint_search.table(tried))
tables.save_table(table, "joint_search_table", tried, profile)
display(Markdown(tables.markdown(table) if paper else "Times of this machine."))

# %% [markdown]
# ## What the weights do
#
# Figure 5 of *faster-models*: (a) more $\lambda_s$ makes the network faster and worse; (b) $\lambda_v$ in the first epochs. The network is that of
# Figure 2 with 16 + 32 blocks of 16, the other weight stays where it is.

# %%
weights, values = joint_search.swept(tried, joint_search.SWEEP_S)
fig, axes = plt.subplots(1, 3, figsize=(10, 3.2))
joint_plots.sweep(
    weights, {"test error (%)": values["error"], "us an example": values["us"]}, axes
)
for ax in axes[:2]:
    ax.set_xlabel("lambda_s")
plots.over_epochs(
    {f"{weight:g}": found for weight, found in joint_search.first_epochs(tried).items()},
    axes[2],
)
axes[2].set(xlabel="epoch", ylabel="validation error (%)", title="lambda_v")
axes[2].legend(fontsize=8)
plots.save_figure(fig, "joint_sweeps", tried, profile)
plt.show()

# %% tags=["nbval-check-output"]
table = tables.frame(joint_search.sweep_table(tried))
tables.save_table(table, "joint_sweeps_table", tried, profile)
display(Markdown(tables.markdown(table) if paper else "Times of this machine."))

# %% [markdown]
# ## The retrospective's advice, one switch at a time
#
# > **The retrospective says**: Adam or RMSprop could have made the results much better; variance makes learning slow. *dropout-policies* adds: switch the policy on
# > after the network has matured, and replace the episode's cost by "a more sequential notion of return".
#
# Two layers of 8 blocks of 16 on MNIST, $\tau = 1/8$, eight epochs. Optimisers stand beside the paper's SGD; every switch below beside Adam. *To go*: a gate's cost
# holds the divergences of the gates above it only. Batch size 1 is timed in the next section throughout. Points of error say nothing where a switch
# leaves over three points more units active: those rows are judged by no claim (a limit that we set after seeing the table).

# %%
switched = studies.records("joint-switches", profile)
fig, ax = plt.subplots(figsize=(8.5, 5.6 if paper else 3))
joint_plots.switches(joint_switches.points(switched), ax)
plots.save_figure(fig, "joint_switches", switched, profile)
plt.show()

# %% tags=["nbval-check-output"]
table = tables.frame(joint_switches.table(switched))
tables.save_table(table, "joint_switches_table", switched, profile)
display(Markdown(tables.markdown(table)))

# %% [markdown]
# ## The network first, then its policy
#
# > **The paper says** (*dropout-policies*, section 6): the network could first be trained normally and given its policy after a sufficient number of steps.
#
# By what `02_policies` found best: trained densely with dropout at random rates, split into many small groups that fire together, a policy that starts
# from the oracle's groups, then weights and policy together under hard masks, on pictures moved by up to two pixels. The control is the dense
# net of equal compute, distilled from the same network on pictures moved as much.

# %% tags=["nbval-check-output"]
first = studies.records("joint-first", profile)
table = tables.frame(joint_first.table(first, records))
tables.save_table(table, "joint_first_table", first, profile)
display(Markdown(tables.markdown(table)))

# %% [markdown]
# Tree-structured groups, and several passes through the same layers (as in adaptive computation time), which the retrospective also wishes for, are later work.
#
# ## Time
#
# > **The paper says** (Figures 2 and 4): fifty examples at a time its kernel passes the test data up to 5.7 times as fast as the same network
# > computed densely and then masked; training takes 1.5 to 3 times as long as for a dense net.
#
# One thread, compiled kernels with the policy in the timer, each ratio from turns side by side. The last two columns are one example at a time: what the
# retrospective says it should have looked at. Against the fastest dense engine (the same architecture without a policy) a ratio below 1 is a loss.

# %% tags=["nbval-check-output"]
table = tables.frame(joint_time.table(timed))
tables.save_table(table, "joint_time_table", timed, profile)
display(Markdown(tables.markdown(table) if paper else "Times of this machine."))

# %% [markdown]
# Training steps (forward, backward, update), conditional and dense:

# %% tags=["nbval-check-output"]
table = tables.frame(joint_time.step_table(timed))
tables.save_table(table, "joint_steps_table", timed, profile)
display(Markdown(tables.markdown(table) if paper else "Times of this machine."))

# %% [markdown]
# ## Whole filters: convolutional policies
#
# > **The slides say**: conditional convolutional nets on CIFAR-10, each layer with a policy that reads the mean of every channel below and switches whole
# > filters: 15.7% wrong in 1.03 s at $\tau = 0.5$, 17.6% in 0.66 s at $\tau = 0.2$; the dense net 15.9% in 1.07 s.
#
# A filter that is off is a channel less for the layer above, so at activity $a$ a layer takes about $a^2$ of its multiply-adds. *As published* is
# REINFORCE with probabilities kept within [0.1, 0.75] and sampled masks, from the start. *Today's* begins with the trained dense net, whose filters are
# then switched by thresholds calibrated to $\tau$, with the gradient sent through them; its first policy reads the picture in squares of 4 x 4 pixels, since the three
# channel means that the paper's reads say little. Those at 0.65 learn from the labels (on CIFAR-10 for twice as many epochs as the others), those that keep less also
# from the dense net. The slides do not define $N$; we take it for the number of layers. The
# dense net that a row is compared with is the best one of those with and without additional epochs; the dense net of equal compute is narrower in all layers and learns as long as both together. Time is that of our compiled kernel, policy included, over that of the dense net by the fastest
# engine on one thread.

# %% tags=["nbval-check-output"]
conv_records = studies.records("conv", profile, partial=True)
conv_timed = studies.records("conv-time", profile, partial=True)
display(Markdown(studies.progress() if paper else ""))
table = tables.frame(conv_results.table(conv_records, conv_timed))
tables.save_table(table, "conv_table", conv_timed, profile)
display(Markdown(tables.markdown(table) if paper else "Times of this machine."))

# %%
conv_data = list(dict.fromkeys(record.spec.settings["dataset"] for record in conv_records))
fig, axes = plt.subplots(
    1, 2 * len(conv_data), figsize=(10, 3.4) if paper else (7, 3), squeeze=False
)
handles = {}
for number, (dataset, batch) in enumerate(
    (dataset, batch) for dataset in conv_data for batch in ("one", "many")
):
    points = conv_results.traded(conv_records, conv_timed, dataset, batch)
    ax = joint_plots.traded(points, axes[0][number])
    ax.set(title=f"{dataset}, {'one' if batch == 'one' else 64} at a time", ylim=(0, None))
    if number:
        ax.set_ylabel("")
    handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
plots.save_figure(fig, "conv_times", conv_timed, profile)
plt.show()

# %% [markdown]
# Time falls with the filters that are on, though less than the multiply-adds do; errors do not stay. By today's means a conditional net comes to about where its
# teacher is, at either sparsity target of SVHN, while the dense net that learns on by itself goes past that teacher: a teacher that has learned for longer is the
# next thing to try. Where half the filters may be on, the policy is worth more than a narrower net; where two thirds may, no more (CIFAR-10: less).
#
# How often each filter is evaluated for each class, by today's means with seed 0, layers one after the other: a dark column is a filter that is always on, a
# pale one is never used, what varies down a column belongs to some classes.

# %%
shown = [
    record for dataset in conv_data for record in conv_results.pictured(conv_records, dataset)
]
fig, axes = plt.subplots(len(shown), 1, figsize=(9, 1.9 * len(shown) + 0.6), squeeze=False)
for ax, record in zip(axes[:, 0], shown, strict=True):
    picture = joint_plots.by_class(record.arrays()["set"].astype(float), ax)
    settings = record.spec.settings
    ax.set(title=f"{settings['dataset']}, {settings['architecture']}, tau {settings['tau']:g}")
    ax.set_xlabel("filter" if ax is axes[-1, 0] else "")
    for end in conv_results.ends(settings["architecture"]):
        ax.axvline(end - 0.5, color="black", linewidth=1)
fig.colorbar(picture, ax=axes, label="share of examples", aspect=70)
plots.save_figure(fig, "conv_filters", conv_records, profile)
plt.show()

# %% [markdown]
# ## Judge the claims

# %% tags=["nbval-check-output"]
judged = claims.check_verdicts(
    [
        *joint_results.claims(records),
        *joint_search.claims(tried),
        *joint_switches.claims(switched),
        *joint_first.claims(first, records),
        *(joint_time.claims(timed) if paper else []),
        *conv_results.claims(conv_records),
        *conv_time.claims(conv_timed),
    ],
    profile,
)
columns = ["claim", "source", "found", "holds if", "verdict"]
claim_table = (
    tables.markdown(tables.frame(tables.claim_rows(judged))[columns]) if judged else ""
)
display(
    Markdown(
        claim_table
        or "One small run of each says nothing: claims are judged in the paper profile."
    )
)

# %% [markdown]
# ## Compare: published and ours
#
# Ours are always those of the paper profile.

# %%
overview = tables.compact(pd.DataFrame(studies.overview()))
here = overview[overview.id.str.startswith(("Ds", "Fs42", "Ff", "Sconv"))]
display(Markdown(tables.markdown(here)))

# %% [markdown]
# ## What we found

# %%
display(Markdown(joint_results.finding(records)))

# %% [markdown]
# ## What differs from the papers
#
# - **Data**: SVHN without its extra set and with a validation part held out of training; CIFAR-10 from a JPEG copy. Compare with our own dense rows.
# - **Minibatches** of 128 examples with rates scaled to them (*dropout-policies* has 20), and 40 epochs for MNIST's blocks, ten or fewer for the others, where
#   the papers allow 1000; each table names the best epoch.
# - **As published** on MNIST: stochastic gradient descent at the published rates, sums over a minibatch turned into means, masks sampled in training and in
#   tests. On CIFAR-10 and SVHN the papers do not say their rates and weights. SGD did not learn there in any of the six settings that we tried (81% to 90%
#   wrong): $L_v$ is a sum over blocks, $L_e$ a mean, so at equal weights the cheapest policy makes all blocks of a layer copies of one another, all on for
#   some inputs and all off for the others. Those rows are trained by Adam with $\lambda_s = 0.2$ and $\lambda_v = 0.03$.
# - **Dense nets** of the tables learn by Adam for 20 (MNIST), 12 (CIFAR-10) or 8 epochs (SVHN), with the epoch of the best validation accuracy kept; *as published*
#   has 10 (40 for blocks), 8 and 6. The control of a *today's* row learns as long as that network, on pictures moved as much: 40 epochs beside 16 blocks of 16, 15 on CIFAR-10.
# - **Today's means**: straight-through with calibrated thresholds on SVHN and for single units; a budget of blocks (the rest is off for every input) with the first
#   block of each layer always on for CIFAR-10; for MNIST's single layer *sum-and-sample*, which tries every block for every example in training, at
#   about twice the cost of a dense step (the table of steps has it). Estimators, weights and rates were chosen in some forty trials with seed 0, looking at test errors too;
#   the intervals do not know of that.
# - **Conv nets**: 96 filters a layer as in the authors' code, but strides of 2 in the first two layers, means over the last layer's pictures in place of fully
#   connected layers, and 12 epochs (SVHN: 5) in place of 50; $\lambda_s$ and $\lambda_v$ are not known for them.
# - **Figure 3** has our own space, since the paper's is not given, and one seed a run.
#
# ## References
#
# - *dropout-policies*: P.-L. Bacon, E. Bengio, J. Pineau, D. Precup. Conditional computation in neural networks using a decision-theoretic approach. RLDM 2015.
# - *faster-models*: E. Bengio, P.-L. Bacon, J. Pineau, D. Precup. Conditional computation in neural networks for faster models. 2015.
# - *retrospective*: E. Bengio, ML Retrospectives, 2019.
# - C. Liang et al. Memory augmented policy optimization (2018); W. Kool et al. Estimating gradients for discrete random variables by sampling without
#   replacement (2020): sum-and-sample.
