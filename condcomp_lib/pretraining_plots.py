"""Figures of pretraining and coactivation: matrices, tables of ratios, cost and variance (rules as in `plots`)."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.image import AxesImage

from condcomp_lib.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)


def matrix(
    values: np.ndarray,
    title: str,
    ax: Axes | None = None,
    least: float = 0.0,
    most: float = 1.0,
    root: bool = True,
    edges: Sequence[float] = (),
) -> AxesImage:
    """A square matrix over neurons from `least` (white) to `most` (dark), with `root` darker by the square root, so
    that small numbers differ too; `edges` are shares of its side at which lines part groups. Returns the picture, for
    a colour bar."""
    ax = ax or plt.subplots()[1]
    norm = PowerNorm(0.5 if root else 1.0, least, most, clip=True)
    picture = ax.imshow(values, cmap="Blues", norm=norm, interpolation="nearest")
    for edge in edges:
        for line in (ax.axhline, ax.axvline):
            line(edge * len(values) - 0.5, color=VERMILION, linewidth=0.6)
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set(visible=True, color=GREY, linewidth=0.5)
    ax.grid(visible=False)
    return picture


def cell_ratios(
    rows: Mapping[str, Mapping[str, np.ndarray]], published: Mapping[str, Mapping[str, float]], ax: Axes | None = None
) -> Axes:
    """Accuracy ratios by pretraining, one band each, first on top: a line for each method with its runs as points,
    their mean as a bar, and the paper's number as a diamond."""
    ax = ax or plt.subplots()[1]
    methods = list(dict.fromkeys(method for row in rows.values() for method in row))
    for index, (name, row) in enumerate(rows.items()):
        for order, method in enumerate(methods):
            if method not in row or not len(row[method]):
                continue
            height, colour = 0.24 - 0.24 * order - index, COLOURS[order]
            values = row[method]
            known = ax.get_legend_handles_labels()[1]
            ax.plot(values, np.full(len(values), height), "o", color=colour, markersize=4, alpha=0.7,
                    label=None if method in known else method)  # fmt: skip
            ax.plot([values.mean()] * 2, [height - 0.1, height + 0.1], color=colour, linewidth=2)
            if method in published.get(name, {}):
                ax.plot(published[name][method], height, "D", color="black", markersize=4.5,
                        label=None if "published" in known else "published")  # fmt: skip
    ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_yticks([-index for index in range(len(rows))], [name.replace(", ", "\n", 1) for name in rows])
    ax.set(xlabel="accuracy / the target's", xlim=(0, 1.08), ylim=(-len(rows) + 0.4, 0.6))
    ax.grid(axis="y", visible=False)
    return ax


def searched(rows: Mapping[str, Mapping[str, np.ndarray]], ax: Axes | None = None) -> Axes:
    """Every run of a search by cell, first on top: the target's accuracy as a bar, the lazy network's as a point, below
    it those of the chosen setting with fresh seeds."""
    ax = ax or plt.subplots()[1]
    looks = {
        "target": (GREEN, "|", 9, 0.12, "target"),
        "lazy": (BLUE, "o", 4.5, 0.12, "lazy, a run of the search"),
        "fresh": (VERMILION, "D", 4, -0.2, "lazy, chosen setting, fresh seeds"),
    }
    for index, row in enumerate(rows.values()):
        for name, (colour, marker, size, offset, label) in looks.items():
            height = np.full(len(row[name]), offset - index)
            ax.plot(row[name], height, marker, color=colour, markersize=size, alpha=0.75,
                    label=None if index else label)  # fmt: skip
    ax.set_yticks([-index for index in range(len(rows))], list(rows))
    ax.set(xlabel="validation accuracy", xlim=(0, 1), ylim=(-len(rows) + 0.4, 0.6))
    ax.grid(axis="y", visible=False)
    return ax


def step_cost(lines: Mapping[str, np.ndarray], column: int, ax: Axes | None = None) -> Axes:
    """Milliseconds (`column` 1) or megabytes (2) a step against a size, on two logarithmic axes.

    `lines` maps a way to its points (size, milliseconds, megabytes).
    """
    ax = ax or plt.subplots()[1]
    looks = {"plain": (GREY, "o"), "factorised": (BLUE, "s"), "naive": (VERMILION, "^")}
    for name, points in lines.items():
        colour, marker = looks[name]
        ax.plot(points[:, 0], points[:, column], f"-{marker}", color=colour, markersize=4.5, label=name)
    ticks = sorted({point for points in lines.values() for point in points[:, 0]})
    ax.set(xscale="log", yscale="log", ylabel=("ms", "MB")[column - 1] + " a step")
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.xaxis.minorticks_off()
    return ax


def variation(lines: Mapping[str, tuple[Sequence[int], np.ndarray]], ax: Axes | None = None) -> Axes:
    """Coefficients of variation against the size of minibatches, one line per form, every run as a point; forms whose
    flows are normalised have broken lines."""
    ax = ax or plt.subplots()[1]
    forms = list(dict.fromkeys(name.partition(",")[0] for name in lines))
    for name, (sizes, values) in lines.items():
        colour = COLOURS[forms.index(name.partition(",")[0])]
        ax.plot(sizes, values.mean(0), "--" if "," in name else "-", color=colour, label=name)
        for run in values:
            ax.plot(sizes, run, "o", color=colour, markersize=3, alpha=0.6)
    ticks = sorted({size for sizes, _ in lines.values() for size in sizes})
    ax.set(xscale="log", yscale="log", xlabel="examples in a minibatch")
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.minorticks_off()
    return ax
