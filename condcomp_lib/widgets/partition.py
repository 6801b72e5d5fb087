"""The partition explorer: what a split of the neurons is worth before any policy is trained."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from condcomp_lib import coactivation, datasets, widgets
from condcomp_lib.lazy import LazyNetwork, evaluate
from condcomp_lib.oracle import Oracle
from condcomp_lib.partitioners.clustering import activation_partition, spectral_partition, weight_partition
from condcomp_lib.partitions import KINDS, Partition, make_partition
from condcomp_lib.plots import BLUE, GREEN, GREY, ORANGE, VERMILION
from condcomp_lib.policies import Budget
from condcomp_lib.studies import explorer
from condcomp_lib.targets import MLP
from condcomp_lib.widgets import Canvas, Choice, Explorer, State, sparsity_data

NAMES = {name: dataset for name, dataset in sparsity_data.DATASETS.items() if dataset != sparsity_data.LARGE}
CLUSTERED = {"coactivation": activation_partition, "spectral": spectral_partition}
SPLITS = (*KINDS, "k-means", *CLUSTERED)
EXAMPLES = 1000  # to read a split off, and as many others to judge it by
POINTS = 10  # of a curve over activity
MOST = 40  # groups


@dataclass(frozen=True)
class Target:
    """A network to split: its neurons' firing on examples that splits are made from (bool, examples x neurons), and
    other examples `x`, `y` with the coactivation `c` of the neurons on them (float32, neurons x neurons)."""

    target: MLP
    patterns: Tensor
    x: Tensor
    y: Tensor
    c: Tensor


@dataclass(frozen=True)
class Split:
    """A partition and its worth: when an oracle chooses 1, 2, ... of its groups for each example, the activity and the
    accuracy (numbers of groups); how much of the coactivation it explains, of all and of what is beyond rates."""

    partition: Partition
    activity: np.ndarray
    accuracy: np.ndarray
    explained: float
    beyond: float


@functools.lru_cache(maxsize=4)
def target(dataset: str, pretraining: str) -> Target:
    """The network of a data set and a pretraining, from the stored ones."""
    data = datasets.load(dataset, download=False)
    record = sparsity_data.pretrainings(dataset)[pretraining]
    net = explorer.network(record, explorer.PARTITIONERS[0], data.shape).mlp
    x, y = (torch.from_numpy(part[:EXAMPLES]) for part in (data.valid.x, data.valid.y))
    learning = coactivation.firing_patterns(net, torch.from_numpy(data.train.x[:EXAMPLES]))
    return Target(net, learning, x, y, coactivation.network_coactivation(net, x))


@functools.lru_cache(maxsize=64)
def split(dataset: str, pretraining: str, name: str, groups: int) -> Split:
    """The target's neurons split into so many groups that span its layers."""
    own = target(dataset, pretraining)
    partition = _partition(own, name, groups)
    oracle = Oracle(own.target, partition)
    lazy, logits = LazyNetwork(own.target, partition, oracle, Budget((groups,))), oracle.logits(0, own.x)
    masks = [Budget((count,))(logits, 0) for count in range(1, groups + 1)]  # ranked once: the gate reads x alone
    right = [(lazy.masked_scores(own.x, mask).argmax(1) == own.y).double().mean().item() for mask in masks]
    share = [partition.activity(mask).mean().item() for mask in masks]
    members = torch.cat(partition.membership)
    whole = coactivation.explained(own.c, members), coactivation.explained(coactivation.beyond_rates(own.c), members)
    return Split(partition, np.array(share), np.array(right), *whole)


def _partition(own: Target, name: str, groups: int) -> Partition:
    generator, hidden = torch.Generator().manual_seed(0), own.target.hidden
    if name in KINDS:
        return make_partition(name, hidden, groups, generator)
    if name == "k-means":
        return weight_partition(own.target, groups, generator)
    return CLUSTERED[name](own.patterns, hidden, groups, generator)


@functools.lru_cache(maxsize=4)
def neurons(dataset: str, pretraining: str) -> tuple[np.ndarray, np.ndarray]:
    """Activity and accuracy (points) when the oracle chooses single neurons of each layer: a landmark, no bound."""
    own = target(dataset, pretraining)
    alone = Partition(tuple(torch.arange(width) for width in own.target.hidden), max(own.target.hidden), "layer")
    oracle, shares = Oracle(own.target, alone), np.geomspace(0.02, 1, POINTS)
    nets = [LazyNetwork(own.target, alone, oracle, Budget.of(float(share), alone, oracle)) for share in shares]
    return shares, np.array([(evaluate(net, own.x).scores.argmax(1) == own.y).double().mean() for net in nets])


class Scene:
    """The explorer's figure: who fires with whom, in the order of the groups, and what the groups are worth."""

    def __init__(self, dataset: str, pretraining: str) -> None:
        own, known = target(dataset, pretraining), neurons(dataset, pretraining)
        with widgets.styled():
            self.figure = Figure(figsize=(9.4, 4.3))
            left, right = self.figure.subplots(1, 2, width_ratios=(1, 1.35))
            self.figure.subplots_adjust(left=0.05, right=0.985, bottom=0.125, top=0.86, wspace=0.18)
            self.image = left.imshow(own.c.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
            self.borders = left.add_collection(LineCollection([], colors=VERMILION, linewidths=0.6))
            left.set(xticks=[], yticks=[], xlabel="neurons, group after group", ylabel="neurons")
            left.spines[:].set_visible(True)
            left.grid(visible=False)
            right.plot(100 * known[0], known[1], color=GREEN, linewidth=1.2, label="oracle, single neurons")
            full = (own.target(own.x).argmax(1) == own.y).double().mean().item()
            right.axhline(full, color=GREY, linewidth=0.9, linestyle=":", label="full network")
            (self.base,) = right.plot([50], [0.5], "--", color=ORANGE, label="oracle, random groups")
            (self.curve,) = right.plot([50], [0.5], "o-", color=BLUE, markersize=4, label="oracle, these groups")
            (self.here,) = right.plot(
                [50], [0.5], "o", color=VERMILION, markersize=9, clip_on=False, label="here and now"
            )
            widgets.activity_axis(right)
            right.set(ylim=(0, 1.03), ylabel="accuracy on validation examples")
            right.legend(loc="lower right", fontsize=8)
            self.title = self.figure.text(0.012, 0.985, "", va="top", fontsize=11, weight="bold")
            moving = [self.image, self.borders, self.base, self.curve, self.here, self.title]
            self.canvas = Canvas(self.figure, moving)

    def png(self, own: Target, found: Split, chance: Split, count: int, title: str) -> bytes:
        """The picture of a split beside a random one, with so many groups evaluated."""
        members = torch.cat(found.partition.membership)
        order, ends = members.argsort(stable=True), torch.bincount(members).cumsum(0)[:-1].numpy() - 0.5
        n = len(order) - 0.5
        self.image.set_data(own.c[order][:, order].numpy())
        self.borders.set_segments([((at, -0.5), (at, n)) for at in ends] + [((-0.5, at), (n, at)) for at in ends])
        self.curve.set_data(100 * found.activity, found.accuracy)
        self.base.set_data(100 * chance.activity, chance.accuracy)
        self.here.set_data([100 * found.activity[count - 1]], [found.accuracy[count - 1]])
        self.title.set_text(title)
        return self.canvas.png()


_scene = functools.lru_cache(maxsize=1)(Scene)


def shown(state: State) -> tuple[bytes, str]:
    """The picture and the numbers of a state: "dataset", "pretraining", "split", "groups", "activity" (percent)."""
    key = NAMES[state["dataset"]], state["pretraining"]
    own, found = target(*key), split(*key, state["split"], state["groups"])
    chance = split(*key, "random", state["groups"])
    count = int(np.abs(found.activity - state["activity"] / 100).argmin()) + 1  # whole groups only
    at, kept, by_chance = found.activity[count - 1], found.accuracy[count - 1], chance.accuracy[count - 1]
    title = (
        f"{count} of {state['groups']} groups, {state['split']}: {100 * kept:.0f}% right at {100 * at:.0f}% activity"
    )
    sizes, others = found.partition.sizes, chance.partition.sizes
    rows = [
        ("", "this split", "a random one"),
        (f"accuracy by the oracle, {count} groups", f"{kept:.3f}", f"{by_chance:.3f}"),
        ("activity", f"{100 * at:.1f}%", f"{100 * chance.activity[count - 1]:.1f}%"),
        ("coactivation explained", f"{found.explained:.2f}", f"{chance.explained:.2f}"),
        ("the same, beyond firing rates", f"{found.beyond:.2f}", f"{chance.beyond:.2f}"),
        ("neurons of a group", f"{sizes.min()} to {sizes.max()}", f"{others.min()} to {others.max()}"),
    ]
    return _scene(*key).png(own, found, chance, count, title), widgets.table(rows)


def adapt(state: State, controls: Mapping[str, Any]) -> None:
    """Offer the pretrainings that the chosen data set has."""
    controls["pretraining"].offer(dict.fromkeys(sparsity_data.pretrainings(NAMES[state["dataset"]])))


def explore(groups: int = 16, activity: int = 25) -> Explorer:
    """The partition explorer, its sliders at a number of groups and an activity (percent)."""
    options = {name: reason for name, reason in sparsity_data.networks().items() if name in NAMES}
    first = next(name for name, reason in options.items() if reason is None)
    controls = {
        "dataset": Choice("network", options),
        "pretraining": Choice("pretraining", dict.fromkeys(sparsity_data.pretrainings(NAMES[first]))),
        "split": Choice("partition", dict.fromkeys(SPLITS), "coactivation"),
        "groups": widgets.slider("groups", groups, 2, MOST),
        "activity": widgets.slider("activity, %", activity, 2, 100),
    }
    return Explorer(controls, shown, adapt=adapt)
