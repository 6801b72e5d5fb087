"""The sparsity explorer: what a network keeps of its accuracy, and saves, at the activity under one's fingers."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from condcomp_lib import kernels, published, widgets
from condcomp_lib.kernels import timing
from condcomp_lib.plots import BLUE, GREY, VERMILION
from condcomp_lib.studies import explorer
from condcomp_lib.studies.explorer import DECISIONS, SAMPLED
from condcomp_lib.widgets import Canvas, Choice, Explorer, State
from condcomp_lib.widgets.sparsity_data import (
    DATASETS,
    LARGE,
    Explored,
    Network,
    explored,
    names,
    network,
    networks,
    pretrainings,
)

CHOICES = ("dataset", "pretraining", "partitioner", "decision")  # of a state, on which all but the sliders depends
TIMED, REPEATS = 64, 5
# The papers' numbers on these data, each with the id of its activity, or with the sparsity target of its training.
PUBLISHED: dict[str, tuple[tuple[str, str | float], ...]] = {
    "mnist": (("Fs42.01", 100 / 16), ("Ds4.02", "Ds4.03")),
    LARGE: (("Ps52.02", "Ps52.03"), ("Ps52.05", "Ps52.06")),
}


def published_points(dataset: str) -> list[tuple[float, float]]:
    """The papers' (activity in percent, accuracy as a share) on a data set."""
    rows, found = published.load(), []
    for id, at in PUBLISHED.get(dataset, ()):
        share = rows[at].value if isinstance(at, str) else at
        value = rows[id].value
        if share is not None and value is not None:
            found.append((share, 1 - value / 100 if "error" in rows[id].metric else value / 100))
    return found


class Scene:
    """The explorer's figure: the front, the example, who fires for which class, and the example's mask."""

    def __init__(self, state: State) -> None:
        net = network(*names(state))
        with widgets.styled():
            self.figure = Figure(figsize=(9.8, 4.5))
            grid = self.figure.add_gridspec(
                2, 3, left=0.065, right=0.985, bottom=0.115, top=0.85, wspace=0.26, hspace=0.62,
                width_ratios=(2.1, 0.8, 2.1), height_ratios=(1.25, 1),
            )  # fmt: skip
            moving = self._front(self.figure.add_subplot(grid[:, 0]), net, state)
            moving += self._picture(self.figure.add_subplot(grid[0, 1]), net)
            moving += self._use(self.figure.add_subplot(grid[0, 2]), net)
            moving += self._mask(self.figure.add_subplot(grid[1, 1:]), net)
            self.title = self.figure.text(0.012, 0.985, "", va="top", fontsize=11, weight="bold")
            self.canvas = Canvas(self.figure, [*moving, self.title])

    def _front(self, ax: Axes, net: Network, state: State) -> list[Artist]:
        if state["decision"] in net.front:
            at, runs = net.front[state["decision"]]
            each = ", a policy for each point" if DATASETS[state["dataset"]] == LARGE else ""
            ax.fill_between(100 * at, runs.min(0), runs.max(0), color=BLUE, alpha=0.2, linewidth=0)
            ax.plot(100 * at, runs.mean(0), color=BLUE, label=f"stored runs ({len(runs)}), their range{each}")
        full = (net.answers == net.y).double().mean().item()
        ax.axhline(full, color=GREY, linewidth=0.9, linestyle=":", label="full network")
        if points := published_points(DATASETS[state["dataset"]]):
            ax.plot(*zip(*points, strict=True), "D", color="black", markersize=4.5, clip_on=False,
                    label="published: other networks, trained otherwise")  # fmt: skip
        widgets.activity_axis(ax)
        ax.set(ylim=(0, 1.03), ylabel="accuracy on validation examples")
        (self.here,) = ax.plot([50], [0.5], "o", color=VERMILION, markersize=9, label="here and now", clip_on=False)
        ax.legend(loc="lower right", fontsize=8)
        return [self.here]

    def _picture(self, ax: Axes, net: Network) -> list[Artist]:
        self.image = ax.imshow(np.zeros(net.shape[1:]), cmap="gray_r", interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.grid(visible=False)
        self.answer = ax.set_title("", fontsize=9)
        return [self.image, self.answer]

    def _use(self, ax: Axes, net: Network) -> list[Artist]:
        bits = net.lazy.partition.bits
        self.use = ax.imshow(np.zeros((net.classes, bits)), cmap="Blues", vmin=0, vmax=1, aspect="auto",
                             interpolation="nearest")  # fmt: skip
        edges = np.arange(1, len(net.lazy.target.hidden)) * net.lazy.partition.groups
        lines = [ax.axvline(edge - 0.5, color=GREY, linewidth=0.8) for edge in edges]
        ax.set(xlabel="groups, layer after layer", ylabel="class", yticks=range(0, net.classes, 3))
        ax.set_title("how often a group is evaluated", fontsize=9)
        ax.grid(visible=False)
        return [self.use, *lines]

    def _mask(self, ax: Axes, net: Network) -> list[Artist]:
        hidden = net.lazy.target.hidden
        self.mask = ax.imshow(np.zeros((len(hidden), max(hidden), 3)), aspect="auto", interpolation="nearest")
        ax.set_yticks(range(len(hidden)), [str(index + 1) for index in range(len(hidden))])
        ax.set(xlabel="neuron, sorted by group (white: skipped; pale: evaluated, at zero; dark: fires)", ylabel="layer")
        ax.xaxis.label.set_fontsize(9)
        ax.grid(visible=False)
        lines = [ax.axhline(edge - 0.5, color=GREY, linewidth=0.8) for edge in range(1, len(hidden))]
        self.skipped = ax.set_title("", fontsize=9)
        return [self.mask, *lines, self.skipped]

    def png(self, state: State, found: Explored) -> bytes:
        """The picture of a state."""
        self.here.set_data([100 * found.activity], [found.accuracy])
        self.image.set_data(found.picture)
        self.image.autoscale()
        self.answer.set_text(f"a {found.label}, read as {found.answer}\n(in full: {found.full_answer})")
        self.answer.set_color("black" if found.answer == found.label else VERMILION)
        self.use.set_data(found.by_class)
        self.mask.set_data(strips(found, network(*names(state)).lazy.partition.membership))
        self.skipped.set_text(f"this example's mask: {100 * found.own_activity:.0f}% of the neurons")
        self.title.set_text(
            f"{state['dataset']}: {100 * found.activity:.1f}% of the neurons evaluated, "
            f"{100 * found.accuracy:.1f}% right ({100 * found.full:.1f}% in full), "
            f"{100 * found.compute:.0f}% of the multiply-adds"
        )
        return self.canvas.png()


def strips(found: Explored, membership: Sequence[Tensor]) -> np.ndarray:
    """A row of colours (layers x neurons x red, green, blue) for each hidden layer, neurons sorted by group; what a
    narrower layer lacks is grey."""
    rows = np.full((len(found.on), max(map(len, found.on)), 3), 0.85)
    pale, dark = np.array([0.80, 0.88, 0.95]), np.array([0.0, 0.30, 0.55])
    for row, on, fires, groups in zip(rows, found.on, found.fires, membership, strict=True):
        order = groups.argsort(stable=True).numpy()
        level = (fires / (fires.max() or 1)).clip(0, 1)[order, None] ** 0.5
        row[: len(on)] = np.where(on[order, None], pale + level * (dark - pale), 1.0)
    return rows


@functools.lru_cache(maxsize=1)  # one at a time: a figure of images takes megabytes
def _scene(*chosen: str) -> Scene:
    return Scene(dict(zip(CHOICES, chosen, strict=True)))


def shown(state: State) -> tuple[bytes, str]:
    """The picture and the numbers of a state."""
    found = explored(state)
    runs = f", {found.stored.n} runs" if found.stored and found.stored.n > 1 else ""
    stored = f"{found.stored.format(3)}{runs}" if found.stored else "none of this policy"
    examples = f"{len(network(*names(state)).x):,} validation examples"
    rows = [
        ("", "lazy network", "full network"),
        (f"accuracy, {examples}", f"{found.accuracy:.3f}", f"{found.full:.3f}"),
        ("the same over target seeds, stored", stored, ""),
        ("activity", f"{100 * found.activity:.1f}%", "100%"),
        ("compute, policy included", f"{100 * found.compute:.1f}%", "100%"),
    ]
    return _scene(*(state[name] for name in CHOICES)).png(state, found), widgets.table(rows)


def measured(state: State) -> str:
    """The time of the compiled lazy network and of dense engines, one example at a time, measured now."""
    if state["decision"] == SAMPLED:
        return widgets.note("A compiled network decides by thresholds or a budget: bits that are drawn are not timed.")
    net = network(*names(state))
    own = explorer.decided(net.lazy, state["decision"], state["activity"] / 100, net.x, net.first)
    engines, _ = timing.dense_engines(net.lazy.mlp, 1, ("eager", "onnxruntime"))
    inputs = [np.ascontiguousarray(row) for row in net.x[:TIMED, None].numpy()]
    times = timing.interleaved({"lazy": kernels.compile(own, "one"), **engines}, inputs, REPEATS)
    return widgets.table(
        [
            (f"one example at {state['activity']}%, one thread, now", "microseconds"),
            *widgets.timed(times, tuple(engines), "full network"),
        ]
    )


def adapt(state: State, controls: Mapping[str, Any]) -> None:
    """Offer what the chosen data set has, and as many examples as it has."""
    dataset = DATASETS[state["dataset"]]
    large = {"dropout-uniform": None, "none": "not among the large network's"} if dataset == LARGE else None
    controls["pretraining"].offer(large or dict.fromkeys(pretrainings(dataset)))
    splits = dict.fromkeys(explorer.PARTITIONERS)
    controls["partitioner"].offer({**splits, "random": "not among the large network's"} if large else splits)
    chosen = {name: control.value for name, control in controls.items()}
    controls["example"].max = len(network(*names(chosen)).x) - 1


def explore(activity: int = 25, example: int = 3) -> Explorer:
    """The sparsity explorer, its sliders at an activity (percent) and an example."""
    options = networks()
    controls = {
        "dataset": Choice("network", options),
        "pretraining": Choice("pretraining", {"none": None}),
        "partitioner": Choice("partitioner", dict.fromkeys(explorer.PARTITIONERS)),
        "decision": Choice("decision", dict.fromkeys(DECISIONS), explorer.BUDGETED),
        "activity": widgets.slider("activity, %", activity, 2, 100),
        "example": widgets.slider("example", example, 0, 10_000),
    }
    return Explorer(controls, shown, measured, adapt)
