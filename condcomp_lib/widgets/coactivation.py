"""The coactivation explorer: who fires with whom, in each order, as training goes on."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from condcomp_lib import coactivation, datasets, paths, studies, widgets
from condcomp_lib.coactivation import ORDERINGS
from condcomp_lib.errors import unknown
from condcomp_lib.plots import BLUE, GREEN, GREY, VERMILION
from condcomp_lib.runs import Record, RunStore
from condcomp_lib.studies import coactivation as study
from condcomp_lib.studies import coactivation_results as results
from condcomp_lib.studies import targets
from condcomp_lib.training import accuracy, obtain_target, snapshot
from condcomp_lib.widgets import Canvas, Choice, Explorer, State

LIVE = "digits"
LAYERS = "layers"  # neurons as they are numbered
ORDERS = (*ORDERINGS, LAYERS)


@dataclass(frozen=True)
class Then:
    """A network after an epoch: validation accuracy, Measures of its coactivation, its matrices by order, and whether
    this is the epoch whose weights are kept."""

    accuracy: float
    measures: Mapping[str, float]
    matrices: Mapping[str, np.ndarray]
    kept: bool = False


def stored() -> dict[str, Record]:
    """The stored networks whose coactivation is kept on the way, by name."""
    found = {}
    for record in studies.records("coactivation", "paper", partial=True):
        settings = record.spec.settings
        if record.arrays_file and record.result["on_the_way"]:
            found[f"SVHN, {settings['architecture']}, {settings['network']}"] = record
    return found


def live() -> dict[str, Mapping[str, Any]]:
    """Networks on digits that are trained in seconds, by name: their settings."""
    return {f"{LIVE}, {kind['architecture']}, {kind['network']}": kind for kind in study.kinds("quick")}


def names() -> list[str]:
    """All networks to choose from."""
    return [*live(), *stored()]


@functools.lru_cache(maxsize=16)
def course(name: str) -> dict[int, Then]:
    """How a network's coactivation comes about, by epoch; that of the network that is kept, the best one, is `kept`.

    Raises UsageError for an unknown name.
    """
    if name not in names():
        raise unknown("network", name, names())
    if name in stored():
        return _stored_course(stored()[name])
    data, settings = datasets.load(LIVE), {**live()[name], "target_seed": 0}
    target, record = obtain_target(targets.target_of(settings), data, RunStore(paths.artefacts("quick")))
    x, found = torch.from_numpy(data.test.x), {}
    for epoch in (*record.spec.settings["snapshots"], record.result["best_epoch"]):
        net = target if epoch == record.result["best_epoch"] else snapshot(record, data, epoch)
        c = coactivation.network_coactivation(net, x)
        orders = {how: coactivation.ordering(c, how) for how in ORDERINGS} | {LAYERS: torch.arange(len(c))}
        matrices = {how: c[order][:, order].numpy() for how, order in orders.items()}
        found[epoch] = Then(accuracy(net, data.valid), vars(coactivation.measures(c)), matrices, net is target)
    return dict(sorted(found.items()))


def _stored_course(record: Record) -> dict[int, Then]:
    """From the arrays of a stored run, which keep one order on the way and all of them at the end."""
    curve, found = record.result["learning_curve"], {}
    for then in record.result["on_the_way"]:
        picture = results.matrices(record, [f"epoch{then['epoch']}"])
        found[then["epoch"]] = Then(curve[then["epoch"] - 1], then, {"mean": picture[f"epoch{then['epoch']}"]})
    best = record.result["best_epoch"]
    found[best] = Then(curve[best - 1], record.result["measures"], results.matrices(record, ORDERS), kept=True)
    return dict(sorted(found.items()))


def kept_epoch(name: str) -> int:
    """The epoch whose weights are kept."""
    return next(epoch for epoch, then in course(name).items() if then.kept)


class Scene:
    """The explorer's figure: the matrix, and how accuracy and mean coactivation change as training goes on."""

    def __init__(self, name: str) -> None:
        found = course(name)
        with widgets.styled():
            self.figure = Figure(figsize=(9.4, 4.1))
            left, right = self.figure.subplots(1, 2, width_ratios=(1, 1.3))
            self.figure.subplots_adjust(left=0.04, right=0.985, bottom=0.13, top=0.84, wspace=0.3)
            side = len(next(iter(found.values())).matrices["mean"])
            self.image = left.imshow(np.zeros((side, side)), cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="equal",
                                     interpolation="nearest")  # fmt: skip
            left.set(xticks=[], yticks=[], xlabel="neurons")
            left.spines[:].set_visible(True)
            left.grid(visible=False)
            bar = self.figure.colorbar(self.image, ax=left, fraction=0.046, pad=0.03)
            bar.set_label("fire together", fontsize=9)
            epochs = list(found)
            right.plot(epochs, [then.accuracy for then in found.values()], "o-", color=BLUE, markersize=4,
                       label="validation accuracy")  # fmt: skip
            for field, colour in (("mean", VERMILION), ("gini", GREEN), ("modularity", GREY)):
                values = [then.measures[field] for then in found.values()]
                said = results.SHOWN[field] + (" coactivation" if field == "mean" else "")
                right.plot(epochs, values, "o-", color=colour, markersize=4, label=said)
            right.set(ylim=(0, 1.03), xlabel="epoch")
            right.set_xticks(epochs)
            right.legend(loc="lower center", fontsize=8, ncols=4, bbox_to_anchor=(0.5, 1.0), columnspacing=1.2)
            self.now = right.axvline(epochs[-1], color="black", linewidth=1, linestyle=":")
            self.title = self.figure.text(0.012, 0.985, "", va="top", fontsize=11, weight="bold")
            self.canvas = Canvas(self.figure, [self.image, self.now, self.title])

    def png(self, then: Then, epoch: int, order: str, title: str) -> bytes:
        """The picture of a network after an epoch."""
        self.image.set_data(then.matrices[order])
        self.now.set_xdata([epoch, epoch])
        self.title.set_text(title)
        return self.canvas.png()


_scene = functools.lru_cache(maxsize=1)(Scene)


def shown(state: State) -> tuple[bytes, str]:
    """The picture and the numbers of a state: "network", "epoch", "order"."""
    found = course(state["network"])
    best = kept_epoch(state["network"])
    then, last = found[state["epoch"]], found[best]
    rows = [("", f"after epoch {state['epoch']}", f"kept: epoch {best}")]
    rows += [("validation accuracy", f"{then.accuracy:.3f}", f"{last.accuracy:.3f}")]
    rows += [(said, f"{then.measures[field]:.2f}", f"{last.measures[field]:.2f}")
             for field, said in results.SHOWN.items()]  # fmt: skip
    title = f"{state['network']}: epoch {state['epoch']}, {100 * then.accuracy:.1f}% right, "
    title += f"mean coactivation {then.measures['mean']:.2f}"
    return _scene(state["network"]).png(then, state["epoch"], state["order"], title), widgets.table(rows)


def adapt(state: State, controls: Mapping[str, Any]) -> None:
    """Offer the epochs of the chosen network, and the orders that are known after the chosen one."""
    found, best = course(state["network"]), kept_epoch(state["network"])
    if tuple(controls["epoch"].options) != tuple(found):
        controls["epoch"].options = list(found)
        controls["epoch"].value = best
    known, why = found[controls["epoch"].value].matrices, f"stored after epoch {best} only"
    controls["order"].offer({how: None if how in known else why for how in ORDERS})


def explore(only: Sequence[str] | None = None) -> Explorer:
    """The coactivation explorer, over all networks or `only` those named."""
    options = list(only or names())
    first = options[0]
    controls = {
        "network": Choice("network", dict.fromkeys(options)),
        "epoch": widgets.selector("epoch", list(course(first)), kept_epoch(first)),
        "order": Choice("order", dict.fromkeys(ORDERS), "hierarchical"),
    }
    return Explorer(controls, shown, adapt=adapt)
