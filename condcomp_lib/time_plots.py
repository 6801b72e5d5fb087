"""Figures of time: block products, speed-ups, and time against accuracy (rules as in `plots`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm

from condcomp_lib.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, percent_axis

COLOURS, MARKERS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE), "osD^vP"


def block_product(read: np.ndarray, below: Sequence[int], above: Sequence[int], ax: Axes | None = None) -> Axes:
    """One layer's weights by groups, those that an input reads in colour.

    `read` (bool, groups above x groups below); `below` and `above` the neurons of each group.
    """
    ax = ax or plt.subplots()[1]
    edges = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in (below, above)]
    ax.pcolormesh(*edges, np.where(read, 1.0, 0.0), cmap="Blues", vmin=0, vmax=1.6, edgecolors="white", linewidth=0.8)
    share = np.sum(read * np.outer(above, below)) / (sum(above) * sum(below))
    ax.set(xlabel="neurons below, by group", ylabel="neurons above, by group", title=f"{share:.0%} of the weights")
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.grid(visible=False)
    return ax


def speedups(lines: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """Speed-up against activity; `lines` maps a name to points (activity in %, speed-up)."""
    ax = ax or plt.subplots()[1]
    for index, (name, points) in enumerate(lines.items()):
        ax.plot(points[:, 0], points[:, 1], f"-{MARKERS[index]}", color=COLOURS[index], markersize=5, label=name)
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set(
        xscale="log", yscale="log", xlabel="neurons evaluated (%)", ylabel="times as fast as the fastest dense engine"
    )
    ax.set_xticks([3, 6, 12, 25, 50, 100], ["3", "6", "12", "25", "50", "100"])
    low, high = ax.get_ylim()
    ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32) if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend()
    return ax


def speedup_surface(
    batches: Sequence[int], activities: Sequence[float], grid: np.ndarray, ax: Axes | None = None
) -> Axes:
    """Speed-up (batches x activities) as coloured cells with their numbers; red where the dense engine is faster."""
    ax = ax or plt.subplots()[1]
    shown = np.log2(grid)
    ax.imshow(shown, cmap="RdBu", norm=TwoSlopeNorm(0, min(-1, np.nanmin(shown)), np.nanmax(shown)), aspect="auto")
    for i, j in np.argwhere(np.isfinite(grid)):
        dark = shown[i, j] > 0.6 * np.nanmax(shown) or shown[i, j] < -0.8
        ax.text(j, i, f"{grid[i, j]:.1f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    ax.set_xticks(range(len(activities)), [f"{100 * a:.3g}" for a in activities])
    ax.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    ax.set(xlabel="neurons evaluated (%)", ylabel="examples at a time")
    ax.grid(visible=False)
    return ax


def time_and_accuracy(points: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """Accuracy ratio against microseconds: lazy networks as coloured points, dense nets as grey lines.

    `points` maps a name to (microseconds, ratio) of its runs, or of its runs by width (runs x widths x 2), which are
    joined through their means.
    """
    ax, index = ax or plt.subplots()[1], 0
    for name, found in points.items():
        if found.ndim == 3:
            mean, line = found.mean(0), "--" if "moved" in name else "-"
            ax.plot(mean[:, 0], mean[:, 1], f"{line}x", color=GREY, markersize=5, label=name)
        elif name.startswith("target"):
            inside = "black" if name == "target" else "white"
            ax.plot(*found.mean(0), "s", color="black", markerfacecolor=inside, markersize=6, label=name)
        else:
            ax.plot(found[:, 0], found[:, 1], MARKERS[index], color=COLOURS[index], markersize=6, label=name, alpha=0.8)
            index += 1
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set(xscale="log", xlabel="microseconds for one example", ylabel="accuracy / the target's")
    low, high = ax.get_xlim()
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if low <= tick <= high]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    return ax


def converted(report: Mapping[str, Any], axes: Sequence[Axes]) -> Sequence[Axes]:
    """The report of a converted network in two axes: what each rung keeps, and the time of a call, lazy and dense."""
    rungs = dict(report["ladder"])
    if "control" in report:
        rungs["dense, equal compute"] = report["control"]["ratio"]
    colours = {"learned": VERMILION, "blind": ORANGE, "dense, equal compute": GREY}
    rungs = {name: share for name, share in rungs.items() if share is not None}
    for index, (name, share) in enumerate(rungs.items()):
        axes[0].barh(-index, share, color=colours.get(name, GREEN if name.startswith("oracle") else BLUE), alpha=0.8)
        axes[0].text(max(share, 0) + 0.01, -index, f"{share:.3f}", va="center", fontsize=9)
    axes[0].set_yticks([-index for index in range(len(rungs))], list(rungs))
    axes[0].axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes[0].set(xlim=(0, 1.18), xlabel=f"{report['measure']} / the full network's",
                title=f"{100 * report['activity']['found']:.0f}% of the neurons")  # fmt: skip
    axes[0].grid(axis="y", visible=False)
    height, labels = 0, []
    for batch, own in report["latency"].items():
        times = {"lazy": own["lazy_us"], **own["dense_us"]}
        for name, micro in times.items():
            each = micro / int(batch)
            axes[1].barh(-height, each, color=VERMILION if name == "lazy" else GREY, alpha=0.8)
            axes[1].text(each, -height, f" {each:.3g}", va="center", fontsize=9)
            labels.append(f"{name}, {batch} at a time")
            height += 1
    axes[1].set_yticks([-index for index in range(height)], labels)
    axes[1].set(xscale="log", xlabel="microseconds for one example")
    low, high = axes[1].get_xlim()
    axes[1].set_xlim(low, high * 2.5)
    axes[1].grid(axis="y", visible=False)
    return axes


def kept_and_gained(fronts: Mapping[str, np.ndarray], axes: Sequence[Axes]) -> Sequence[Axes]:
    """What converted networks keep of their accuracy, and how much faster they are, against activity.

    `fronts` maps a network to activity, accuracy ratio, speed-up at batch 1 and at 128, and accuracy ratio of the dense
    net of equal compute (runs x 5).
    """
    for (name, rows), colour, marker in zip(fronts.items(), COLOURS, MARKERS, strict=False):
        alone = len(set(rows[:, 0].round(2))) == 1  # one activity only: points
        order = rows[rows[:, 0].argsort()]
        for ax, column, line in ((axes[0], 1, "-"), (axes[1], 2, "-"), (axes[1], 3, ":")):
            ax.plot(100 * order[:, 0], order[:, column], linestyle="none" if alone else line, color=colour,
                    marker=marker, markersize=5, markerfacecolor="white" if column == 3 else colour, alpha=0.85,
                    label=name if column != 3 else None)  # fmt: skip
        if not alone:
            axes[0].plot(100 * order[:, 0], order[:, 4], linestyle="--", color=colour, linewidth=1, alpha=0.7,
                         label=f"{name.split(',')[0]}, dense net of equal compute")  # fmt: skip
    for ax in axes:
        ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        percent_axis(ax, 1.7, 105)
        ax.set(xlabel="activity on test data (%)")
    axes[0].set(ylim=(0, 1.06), ylabel="accuracy / the full network's")
    axes[1].set(yscale="log", ylabel="speed-up over the fastest dense engine")
    ticks = (0.5, 1, 2, 5, 10, 20)
    axes[1].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[1].minorticks_off()
    axes[1].set_title("filled: one example at a time; hollow: 128", fontsize=9)
    axes[0].legend(loc="lower right", fontsize=8)
    return axes
