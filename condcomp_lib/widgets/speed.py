"""The speed explorer: how fast a lazy network is on this machine, beside dense engines and what the machine can do."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from condcomp_lib import kernels, studies, widgets
from condcomp_lib.kernels import timing
from condcomp_lib.lazy import LazyNetwork, decided_by
from condcomp_lib.plots import BLUE, GREEN, GREY, VERMILION
from condcomp_lib.policies import Budget
from condcomp_lib.studies import blocks as study
from condcomp_lib.targets import multiply_adds
from condcomp_lib.widgets import Canvas, Explorer, State

WIDTHS, GROUPS, BATCHES = (200, 400, 800, 1600), (4, 8, 16, 32, 64), (1, 8, 32, 128)
INPUTS, LAYERS, CLASSES = 3072, 3, 10
ENGINES, REPEATS = ("eager", "onnxruntime"), 5
MEASURED: dict[tuple[int, int, int], dict[float, float]] = {}  # speed-ups by activity: width, groups, batch


def row(state: State) -> dict[str, Any]:
    """The state ("width", "groups", "batch", "activity" in percent) as a row of study `blocks`."""
    widths = "-".join(str(width) for width in (INPUTS, *[state["width"]] * LAYERS, CLASSES))
    mask = "one" if state["batch"] == 1 else "per-example"
    return {**study.COMMON, "architecture": widths, "groups": state["groups"], "batch": state["batch"], "mask": mask,
            "activity_asked": state["activity"] / 100}  # fmt: skip


@functools.lru_cache(maxsize=4)
def _network(width: int, groups: int) -> LazyNetwork:
    state = {"width": width, "groups": groups, "batch": 1, "activity": 100}
    return study.network({**row(state), "mask": "shared"})


def network(state: State) -> LazyNetwork:
    """The lazy network of a state, with untrained weights: so many groups with the highest logits for each input."""
    lazy = _network(state["width"], state["groups"])
    return decided_by(lazy, Budget.of(state["activity"] / 100, lazy.partition, lazy.policy))


def by_multiply_adds(width: int, groups: int, activity: np.ndarray) -> np.ndarray:
    """The dense network's multiply-adds over those of the lazy one, its policy included, at shares of its neurons: the
    speed-up if both did as many in a second. No bound: kernels also skip neurons that are zero, and engines differ."""
    widths = [INPUTS, *[width] * LAYERS, CLASSES]
    full = sum(multiply_adds(widths))
    spent = np.array([sum(multiply_adds(widths, [float(share)] * LAYERS)) for share in activity])
    return full / (spent + INPUTS * groups)


def stored(batch: int) -> dict[float, float]:
    """Speed-ups that study `blocks` keeps for its network, 3072-800-800-800-10 in 16 groups, by activity."""
    wanted = {**study.COMMON, "batch": batch, "mask": "one" if batch == 1 else "per-example"}
    found: dict[float, list[float]] = {}
    for record in studies.records("blocks", "paper", partial=True):
        settings = record.spec.settings
        if wanted.items() <= settings.items():
            found.setdefault(settings["activity_asked"], []).append(record.result["speedup_vs_fastest"][0])
    return {share: min(speeds) for share, speeds in sorted(found.items())}


class Scene:
    """The explorer's figure: speed-up against activity, as stored, at most, and as measured here."""

    def __init__(self, width: int, groups: int, batch: int) -> None:
        known, shares = stored(batch), np.geomspace(0.02, 1, 40)
        self.key = width, groups, batch
        with widgets.styled():
            self.figure = Figure(figsize=(8.4, 4.1))
            ax = self.figure.subplots()
            self.figure.subplots_adjust(left=0.085, right=0.98, bottom=0.13, top=0.88)
            ax.plot(100 * shares, by_multiply_adds(width, groups, shares), color=GREEN, linewidth=1.2,
                    label="by multiply-adds, policy included")  # fmt: skip
            if known:
                ax.plot([100 * share for share in known], list(known.values()), "o-", color=GREY, markersize=4,
                        linewidth=1, label="stored runs, width 800, 16 groups")  # fmt: skip
            ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
            (self.points,) = ax.plot([1], [1], "o", color=BLUE, markersize=6, label="measured here")
            (self.here,) = ax.plot([1, 1], [0.1, 100], color=VERMILION, linewidth=1.4, label="activity evaluated")
            widgets.activity_axis(ax)
            ax.set(yscale="log", ylim=(0.3, 40), ylabel="speed-up over the fastest dense engine")
            ax.set_yticks((0.5, 1, 2, 5, 10, 20), ["0.5", "1", "2", "5", "10", "20"])
            ax.minorticks_off()
            ax.legend(loc="lower left", fontsize=8)
            self.title = self.figure.text(0.012, 0.985, "", va="top", fontsize=11, weight="bold")
            self.canvas = Canvas(self.figure, [self.points, self.here, self.title])

    def png(self, activity: float, title: str) -> bytes:
        """The picture at an activity, with all that has been measured here of this network and batch."""
        points = dict(MEASURED.get(self.key, {}))  # a thread of its own may be adding to them
        self.points.set_data([100 * share for share in points], list(points.values()))
        self.here.set_xdata([100 * activity, 100 * activity])
        self.title.set_text(title)
        return self.canvas.png()


_scene = functools.lru_cache(maxsize=1)(Scene)


def shown(state: State) -> tuple[bytes, str]:
    """The picture and the numbers of a state; what it takes on this machine is measured apart."""
    key, lazy = (state["width"], state["groups"], state["batch"]), network(state)
    assert isinstance(lazy.decision, Budget)
    share = lazy.decision.counts[0] / state["groups"]
    expected = float(by_multiply_adds(state["width"], state["groups"], np.array([share]))[0])
    here = MEASURED.get(key, {}).get(share)
    told = f"measured here: {here:.1f} times as fast" if here else "not measured here yet"
    title = f"{INPUTS}-{'-'.join([str(state['width'])] * LAYERS)}-{CLASSES}, {state['batch']} examples: {told}"
    title = title.replace("1 examples", "1 example")
    rows = [
        ("", ""),
        ("groups evaluated", f"{lazy.decision.counts[0]} of {state['groups']}"),
        ("multiply-adds, policy included", f"{100 / expected:.1f}% of the dense network's"),
        ("speed-up if both were as busy", f"{expected:.1f}"),
    ]
    return _scene(*key).png(share, title), widgets.table(rows)


@functools.lru_cache(maxsize=4)
def machine(buffer: int) -> timing.Machine:
    """What this machine does at best, measured once for weights of so many bytes."""
    return timing.machine(buffer)


def measured(state: State) -> str:
    """Times of the compiled lazy network and of dense engines, measured now, beside the least time by the roofline."""
    wanted, lazy = row(state), network(state)
    fast = kernels.compile(lazy, wanted["mask"])
    batches = study.inputs_of(wanted, INPUTS)
    widths = (INPUTS, *lazy.target.hidden, CLASSES)
    engines, _ = study.dense_engines(widths, 1, ENGINES)
    times = timing.interleaved({"lazy": fast, **engines}, batches, REPEATS)
    masks = [torch.from_numpy(fast.evaluate(x)[1]) for x in batches]
    limits = study.roofline(
        lazy, wanted, batches, masks, machine(study.lazy_bytes(lazy)), float(np.median(times["lazy"]))
    )
    assert isinstance(lazy.decision, Budget)
    key = (state["width"], state["groups"], state["batch"])
    found = float(np.median(times[timing.fastest(times, engines)] / times["lazy"]))
    MEASURED.setdefault(key, {})[lazy.decision.counts[0] / state["groups"]] = found
    return widgets.table(
        [
            (f"{state['batch']} at a time at {state['activity']}%, one thread, now", "microseconds"),
            *widgets.timed(times, tuple(engines), "dense network"),
            ("roofline: least time for what is computed and read", f"{limits['roofline_us']:.1f}"),
            ("share of the roofline reached", f"{limits['share_of_roofline']:.2f}"),
        ]
    )


def explore(width: int = 800, groups: int = 16, batch: int = 1, activity: int = 25) -> Explorer:
    """The speed explorer, at a width, a number of groups, examples at a time, and an activity (percent)."""
    controls: Mapping[str, Any] = {
        "width": widgets.selector("width", WIDTHS, width),
        "groups": widgets.selector("groups", GROUPS, groups),
        "batch": widgets.selector("examples", BATCHES, batch),
        "activity": widgets.slider("activity, %", activity, 2, 100),
    }
    return Explorer(controls, shown, measured)
