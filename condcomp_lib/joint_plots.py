"""Figures of joint training: policies as pictures, errors against compute, searches, sweeps (rules as in `plots`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from condcomp_lib.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)


def by_class(rates: np.ndarray, ax: Axes | None = None) -> AxesImage:
    """How likely each block (or unit) is evaluated, one row for each class and a last one for all of them; `rates`
    classes x blocks. Returns the picture, for a colour bar."""
    ax = ax or plt.subplots()[1]
    rows = np.vstack([rates, rates.mean(0)])
    picture = ax.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(rows)), [*map(str, range(len(rates))), "all"])
    ax.axhline(len(rates) - 0.5, color=GREY, linewidth=0.8)
    ax.set(xlabel="block", ylabel="class")
    ax.grid(visible=False)
    return picture


def weights(images: np.ndarray, axes: Sequence[Axes]) -> None:
    """A gate's weights as pictures, one for each block: blue where a bright pixel speaks for it, red against it.

    `images` blocks x channels x height x width; channels are averaged.
    """
    shown = images.astype(float).mean(1)
    most = np.quantile(np.abs(shown), 0.995) or 1.0
    for number, ax in enumerate(axes):
        ax.axis("off")
        if number < len(shown):
            ax.imshow(shown[number], cmap="RdBu", vmin=-most, vmax=most)
            ax.set_title(str(number), fontsize=8, pad=2)


def errors(points: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """Error against multiply-adds: runs as points, dense nets as grey crosses, the paper's numbers as black diamonds
    (filled: conditional nets, hollow: dense ones, half filled: block dropout)."""
    ax = ax or plt.subplots()[1]
    marks = {
        "published, conditional": ("D", "black", "black"),
        "published, dense": ("D", "white", "black"),
        "published, block dropout": ("D", "lightgrey", "black"),
    }
    index = 0
    for name in sorted(points, key=lambda name: (name.startswith("published"), name != "dense")):
        found = points[name]
        if name in marks:
            marker, face, edge = marks[name]
            ax.plot(found[:, 0], found[:, 1], marker, markerfacecolor=face, color=edge, markersize=5, label=name)
        elif name == "dense":
            ax.plot(found[:, 0], found[:, 1], "x", color=GREY, markersize=5, label=name)
        else:
            ax.plot(found[:, 0], found[:, 1], "o", color=COLOURS[index], markersize=4.5, alpha=0.8, label=name)
            index += 1
    ax.set(xscale="log", xlabel="multiply-adds an example", ylabel="test error (%)")
    low, high = ax.get_xlim()
    ticks = [digit * 10**power for power in range(3, 8) for digit in (1, 2, 5) if low <= digit * 10**power <= high]
    ax.set_xticks(ticks, [f"{tick // 10**6}M" if tick >= 10**6 else f"{tick // 1000}k" for tick in ticks])
    ax.xaxis.minorticks_off()
    return ax


def traded(points: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """Every run of conditional nets, (share of the dense net's time, error): dense nets as grey crosses, what was
    published as black diamonds; lower left is better."""
    ax = ax or plt.subplots()[1]
    own: dict[str, dict[str, Any]] = {
        "dense": {"marker": "x", "color": GREY},
        "published": {"marker": "D", "color": "black", "markersize": 4},
    }
    colours = iter(COLOURS)
    for name, found in points.items():
        look = own.get(name) or {"marker": "o", "color": next(colours), "alpha": 0.8}
        ax.plot(found[:, 0], found[:, 1], **{"linestyle": "", "markersize": 5, **look}, label=name)
    ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set(xlabel="time / dense net's", ylabel="test error (%)", xlim=(0, None))
    return ax


def searched(points: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """Every run of a search: time against error, both axes logarithmic, lower left is better."""
    ax = ax or plt.subplots()[1]
    for (name, found), colour, marker in zip(points.items(), (BLUE, GREY), "ox", strict=True):
        ax.plot(found[:, 0], found[:, 1], marker, color=colour, markersize=5.5, label=name)
    ax.set(xscale="log", yscale="log", xlabel="microseconds an example, fifty at a time", ylabel="test error (%)")
    for axis, values in ((ax.xaxis, np.concatenate([p[:, 0] for p in points.values()])),
                         (ax.yaxis, np.concatenate([p[:, 1] for p in points.values()]))):  # fmt: skip
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if values.min() / 2 <= tick <= values.max() * 2]
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    return ax


def sweep(weights: Sequence[float], values: Mapping[str, np.ndarray], axes: Sequence[Axes]) -> None:
    """One panel for each of `values` (name to seeds x weights) against a weight, the runs as points."""
    positions = np.arange(len(weights))
    for ax, (name, found), colour in zip(axes, values.items(), COLOURS, strict=False):
        ax.plot(positions, found.mean(0), "-", color=colour)
        for run in found:
            ax.plot(positions, run, "o", color=colour, markersize=4, alpha=0.7)
        ax.set_xticks(positions, [f"{weight:.3g}" for weight in weights])
        ax.set(ylabel=name, ylim=(0, None))


def switches(points: Mapping[str, tuple[np.ndarray, np.ndarray]], ax: Axes | None = None) -> Axes:
    """Errors of ways to train, one band each, first on top, every run as a point, with the mean activity beside it."""
    ax = ax or plt.subplots()[1]
    for index, (activity, errors) in enumerate(points.values()):
        ax.plot(errors, np.full(len(errors), -index), "o", color=BLUE, markersize=4.5, alpha=0.75)
        ax.plot([errors.mean()] * 2, [-index - 0.25, -index + 0.25], color=BLUE, linewidth=1.6)
        ax.text(1.01, -index, f"{activity.mean():.0f}%", transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.text(1.01, 0.9, "active", transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
    ax.set_yticks([-index for index in range(len(points))], list(points))
    ax.set(xscale="log", xlabel="test error (%)", ylim=(-len(points) + 0.4, 0.6))
    values = np.concatenate([errors for _, errors in points.values()])
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 90) if values.min() / 1.3 <= tick <= values.max() * 1.3]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_ticks([], minor=True)
    return ax
