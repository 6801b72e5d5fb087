"""Figures. A plot function takes data and axes, returns the axes, and never computes, seeds, reads or shows.

`save_figure` alone knows the folder, the formats and the metadata that keep regenerated files byte-identical.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from condcomp_lib import manifest
from condcomp_lib.runs import Record

# Okabe and Ito's palette: distinct for colour-blind readers and in grey.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666",
)  # fmt: skip
STYLE: Any = {  # Any: matplotlib types its keys one by one
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "condcomp",  # ids inside an SVG are random without it
}


def use_style() -> None:
    """Apply the project's style to the figures that follow (the notebooks' first cell calls it)."""
    mpl.rcParams.update(STYLE)


def save_figure(fig: Figure, name: str, records: Sequence[Record], profile: str) -> None:
    """Write `fig` as PNG and SVG with its provenance sidecar; the same data give the same bytes."""
    files = {}
    with mpl.rc_context(STYLE):
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            stream = io.BytesIO()
            fig.savefig(stream, format=suffix[1:], metadata=metadata)
            files[suffix] = stream.getvalue()
    manifest.save(name, files, records, profile)


def percent_axis(ax: Axes, low: float, high: float) -> None:
    """Make the x axis one of percent, on a logarithmic scale, from `low` to `high`."""
    ticks = (2, 5, 10, 25, 50, 100)
    ax.set(xscale="log", xlim=(low, high))
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()


def skipping(curves: Mapping[str, tuple[Sequence[float], np.ndarray]], ax: Axes | None = None) -> Axes:
    """Accuracy ratio against a share, one line per rule, every run as a thin line behind its median.

    `curves` maps a rule's label to its x values (shares, points) and its ratios (seeds x points).
    """
    ax = ax or plt.subplots()[1]
    for (label, (x, ratios)), colour in zip(curves.items(), (BLUE, VERMILION, GREEN), strict=False):
        percent = 100 * np.asarray(x)
        for run in ratios:
            ax.plot(percent, run, color=colour, alpha=0.3, linewidth=0.8)
        ax.plot(percent, np.median(ratios, axis=0), color=colour, marker="o", markersize=3, label=label)
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    percent_axis(ax, 1.8, 110)
    ax.set(ylim=(0, 1.08), ylabel="accuracy ratio (lazy / dense)")
    return ax


def activity_by_layer(groups: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """Share of neurons that fire, by network and layer, every run as a point.

    `groups` maps a network's label to its shares (seeds x layers).
    """
    ax = ax or plt.subplots()[1]
    colours, position, centres = (BLUE, SKY, GREEN), 0.0, []
    for shares in groups.values():
        layers = shares.shape[1]
        for layer in range(layers):
            x = position + layer
            label = f"layer {layer + 1}"
            known = ax.get_legend_handles_labels()[1]
            ax.bar(x, 100 * np.median(shares[:, layer]), 0.85, color=colours[layer % 3], alpha=0.55,
                   label=label if label not in known else None)  # fmt: skip
            ax.plot(np.full(len(shares), x), 100 * shares[:, layer], "o", color="black", markersize=2.5)
        centres.append(position + (layers - 1) / 2)
        position += layers + 0.8
    ax.set_xticks(centres, list(groups))
    ax.set(ylim=(0, 100), ylabel="neurons above zero (% of the layer)")
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper right", ncols=3)
    return ax


def firing(activations: Sequence[np.ndarray], ax: Axes | None = None) -> Axes:
    """The neurons of each hidden layer on one example: dark where they fire, white where they are at zero."""
    ax = ax or plt.subplots()[1]
    width = max(len(layer) for layer in activations)
    rows = np.full((len(activations), width), np.nan)
    for row, layer in zip(rows, activations, strict=True):
        row[: len(layer)] = layer / (layer.max() or 1)
    ax.imshow(rows, cmap="Blues", aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    ax.set_yticks(range(len(activations)), [f"layer {index + 1}" for index in range(len(activations))])
    ax.spines[:].set_visible(False)
    ax.set(xlabel="neuron")
    ax.grid(visible=False)
    return ax


def digit(image: np.ndarray, title: str, ax: Axes | None = None) -> Axes:
    """One grey image (height x width) with its title."""
    ax = ax or plt.subplots()[1]
    ax.imshow(image, cmap="gray_r", interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(visible=False)
    return ax


def over_epochs(
    groups: Mapping[str, np.ndarray], ax: Axes | None = None, x: Sequence[float] | None = None, start: int = 1
) -> Axes:
    """One line per label, every run as a thin line behind the mean.

    `groups` maps a label to values (runs x points); one without values takes up its colour only. `x` are the points'
    positions, by default epochs from `start` on.
    """
    ax = ax or plt.subplots()[1]
    colours = (GREY, BLUE, VERMILION, ORANGE, GREEN, PURPLE, SKY)
    for index, (label, values) in enumerate(groups.items()):
        if not values.size:
            continue
        colour, line = colours[index % len(colours)], "-" if index < len(colours) else "--"
        points = np.arange(start, start + values.shape[1]) if x is None else np.asarray(x)
        for run in values:
            ax.plot(points, run, line, color=colour, alpha=0.35, linewidth=0.7)
        ax.plot(points, values.mean(0), line, color=colour, linewidth=1.8, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def accuracy_ratios(
    rows: Mapping[str, Mapping[str, np.ndarray]], published: Mapping[str, float], ax: Axes | None = None
) -> Axes:
    """Accuracy ratios of lazy networks, blind draws and controls, one band for each kind of target, all runs as points.

    `rows` maps a kind to its series (name to one number a run); `published` maps a kind to the paper's ratio.
    """
    ax = ax or plt.subplots()[1]
    looks = {
        "sample": (VERMILION, 0.33), "calibrated 25%": (BLUE, 0.13), "calibrated 35%": (GREEN, -0.07),
    }  # fmt: skip
    for index, (kind, series) in enumerate(rows.items()):
        for decision, (colour, offset) in looks.items():
            values, blind, control = (series[f"{what}, {decision}"] for what in ("lazy", "blind", "control"))
            height = np.full(len(values), offset - index)
            name = None if index else decision
            ax.plot(values, height, "o", color=colour, markersize=4.5, alpha=0.75, label=name and f"lazy, {name}")
            ax.plot(blind, height, "x", color=GREY, markersize=4, label=None if name != "sample" else "blind draw")
            if not np.isnan(control).all():
                ax.plot(control, height, "|", color=colour, markersize=10, label=name and f"control, {name}")
            share = f"{100 * np.mean(series[f'activity, {decision}']):.0f}% active"
            ax.text(
                min(values.min(), blind.min()) - 0.012,
                height[0],
                share,
                ha="right",
                va="center",
                fontsize=8,
                color=colour,
            )
        if kind in published:
            ax.plot(published[kind], -0.27 - index, "D", color="black", markersize=5,
                    label=None if any(k in published for k in list(rows)[:index]) else "published")  # fmt: skip
    ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_yticks([-index for index in range(len(rows))], [kind.replace(", ", "\n", 1) for kind in rows])
    ax.set(xlabel="accuracy / the target's accuracy", ylim=(-len(rows) + 0.4, 0.6), xlim=(0, 1.12))
    ax.grid(axis="y", visible=False)
    return ax


def group_use(shares: np.ndarray, rates: np.ndarray, ax: Axes | None = None) -> Axes:
    """How often a group is evaluated, against its size (shares, runs x groups); each run's largest one stands out."""
    ax = ax or plt.subplots()[1]
    big = np.zeros_like(shares, dtype=bool)
    big[np.arange(len(shares)), shares.argmax(1)] = True
    for chosen, colour, label in ((~big, GREY, "a group"), (big, VERMILION, "the largest of a run")):
        ax.plot(100 * shares[chosen], 100 * rates[chosen], "o", color=colour, markersize=4, alpha=0.6, label=label)
    ax.set(xlabel="share of all hidden neurons (%)", ylim=(0, 104))
    return ax


def split_ratios(rows: Mapping[str, Mapping[str, np.ndarray]], ax: Axes | None = None, activity: bool = False) -> Axes:
    """Accuracy ratios by partitioner or method, one line each, first on top: runs as points, their mean as a bar, blind
    draws as crosses, the control as a short upright line; with `activity` the mean share of neurons at the right end.

    `rows` maps a partitioner to its series "lazy", "blind", "control" and "activity" (one number a run).
    """
    ax = ax or plt.subplots()[1]
    for index, (name, series) in enumerate(rows.items()):
        height = np.full(len(series["lazy"]), -float(index))
        colour = GREY if name == "random" else BLUE
        first = index == 0
        ax.plot(series["blind"], height, "x", color=ORANGE, markersize=4, label="blind draw" if first else None)
        ax.plot(series["control"], height, "|", color=GREEN, markersize=9, label="control" if first else None)
        ax.plot(series["lazy"], height, "o", color=colour, markersize=4, alpha=0.6)
        mean = series["lazy"].mean()
        ax.plot([mean, mean], [-index - 0.33, -index + 0.33], color=colour, linewidth=2)
        if activity:
            share = f"{100 * series['activity'].mean():.0f}%"
            ax.text(1.27, -index, share, va="center", ha="right", fontsize=8, color=GREY)
    ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    if "random" in rows:
        ax.axvline(rows["random"]["lazy"].mean(), color=GREY, linewidth=0.8)
    ax.set_yticks([-index for index in range(len(rows))], list(rows))
    ax.set(xlabel="accuracy / the target's", xlim=(0, 1.28 if activity else 1.18), ylim=(-len(rows) + 0.4, 0.6))
    ax.grid(axis="y", visible=False)
    return ax


def published_points(points: Mapping[int, float], ax: Axes | None = None) -> Axes:
    """The papers' values at their places on the x axis, as black diamonds."""
    ax = ax or plt.subplots()[1]
    if points:
        ax.plot(list(points), list(points.values()), "D", color="black", markersize=4.5, label="published", zorder=5)
    return ax


def ladder(lines: Mapping[str, tuple[Sequence[int], np.ndarray]], ax: Axes | None = None) -> Axes:
    """The oracle ladder: accuracy ratio against groups a layer, every run as a point beside the mean.

    `lines` maps "split, rung" to the numbers of groups and the ratios (runs x numbers); "oracle neurons" and "control"
    have one ratio a run and are drawn across.
    """
    ax = ax or plt.subplots()[1]
    colours = {"random": ORANGE, "coactivation": BLUE}
    looks = {"oracle": ("-", "o", "oracle groups"), "learned": ("--", "s", "learned policy"),
             "blind": (":", "x", "uniform draw")}  # fmt: skip
    for name, (counts, ratios) in lines.items():
        if not counts:
            colour = GREEN if name == "control" else "black"
            ax.axhspan(ratios.min(), ratios.max(), color=colour, alpha=0.25, linewidth=0)
            ax.axhline(ratios.mean(), color=colour, linewidth=1, label=name)
            continue
        split, rung = name.split(", ")
        line, marker, label = looks[rung]
        colour = colours[split]
        ax.plot(counts, ratios.mean(0), line, color=colour, label=f"{split}: {label}", linewidth=1.6)
        for run in ratios:
            ax.plot(counts, run, marker, color=colour, markersize=3.5, alpha=0.6)
    ticks = sorted({count for counts, _ in lines.values() for count in counts})
    ax.set(xscale="log", ylim=(0, 1.08), xlabel="groups a layer", ylabel="accuracy / the target's")
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    return ax


def estimator_errors(
    rows: Mapping[str, Mapping[str, tuple[float, float]]], axes: Sequence[Axes], level: float
) -> Sequence[Axes]:
    """Bias and standard deviation of each estimator, first on top, in parts of the exact gradient's length.

    `rows` maps an estimator to its (bias, p-value of none) by scope and, as "deviation, ...", to (standard deviation,
    unused); `axes` two, for bias and deviation. Hollow marks: no bias can be told at `level`.
    """
    looks = {"network": (BLUE, "o", 0.12, "one gate, reads X"), "layer": (VERMILION, "s", -0.12, "a gate a layer")}
    for index, found in enumerate(rows.values()):
        for scope, (colour, marker, offset, label) in looks.items():
            bias, p_value = found[scope]
            face = "white" if p_value > level else colour
            name = None if index else label
            axes[0].plot(bias, offset - index, marker, color=colour, markerfacecolor=face, markersize=5, label=name)
            deviation = found[f"deviation, {scope}"][0]
            axes[1].plot(deviation or np.nan, offset - index, marker, color=colour, markersize=5)
        if not found["deviation, network"][0]:
            axes[1].annotate("0", (0.01, -index), xycoords=("axes fraction", "data"), va="center", color=GREY)
    axes[0].set_yticks([-index for index in range(len(rows))], list(rows))
    for ax in axes:
        ax.set(xscale="log", ylim=(-len(rows) + 0.4, 0.6))
        low, high = ax.get_xlim()
        ticks = [tick for tick in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if low <= tick <= high]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.grid(axis="y", visible=False)
    axes[0].set(xlabel="bias / length of the exact gradient")
    axes[1].set(xlabel="standard deviation / length of the exact gradient")
    return axes


def fronts(lines: Mapping[str, tuple[np.ndarray, np.ndarray]], ax: Axes | None = None) -> Axes:
    """Accuracy ratio against a cost, one line per method through the means, every run as a point.

    `lines` maps a method to costs and ratios (sparsity targets x runs each); "control" is drawn as small grey crosses.
    """
    ax = ax or plt.subplots()[1]
    colours = (BLUE, VERMILION, GREEN, PURPLE, SKY)
    for index, (name, (costs, ratios)) in enumerate(lines.items()):
        if name == "control":
            ax.plot(100 * costs, ratios, "x", color=GREY, markersize=4, alpha=0.7)
            ax.plot([], [], "x", color=GREY, markersize=4, label="dense control")
            continue
        colour, marker = colours[index % len(colours)], "o" if len(costs) > 1 else "*"
        ax.plot(100 * costs, ratios, marker, color=colour, markersize=4 if marker == "o" else 9, alpha=0.55)
        line = "-" if len(costs) > 1 else ""
        ax.plot(100 * costs.mean(1), ratios.mean(1), line + marker, color=colour, linewidth=1.7,
                markersize=4 if marker == "o" else 9, label=name)  # fmt: skip
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set(ylabel="accuracy / the target's")
    return ax
