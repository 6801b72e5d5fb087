"""From records of conv nets whose filters are switched to the slides' table, and to claims."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from condcomp_lib import published
from condcomp_lib.claims import Claim, judge
from condcomp_lib.published import Answer
from condcomp_lib.runs import Record
from condcomp_lib.stats import Interval
from condcomp_lib.studies.joint_results import DATA, NOTEBOOK, active, by_layer, control_error, error
from condcomp_lib.studies.lazy_results import gains, over_runs
from condcomp_lib.targets import hidden_widths

DENSE, LONGER, LONGEST = "dense", "dense, trained on", "dense, trained on twice as long"
DENSE_NETS = (DENSE, LONGER, LONGEST)
PAPER, AFTER = "as published", "as published, from a trained net"
OURS, JOINT = "today's, from a trained net", "today's, from the start"
WORSE = 0.5  # points of error that a conditional net may cost
SHARE = 0.67  # of the dense net's time that it may take
# The slides' rows: number of layers and sparsity target, to ids.
IDS = {(4, 0.5): "Sconv.01", (4, 0.3): "Sconv.02", (4, 0.2): "Sconv.03", (2, 0.5): "Sconv.04"}
DENSE_ID = "Sconv.05"
SECONDS = {"Sconv.01": 1.03, "Sconv.02": 0.84, "Sconv.03": 0.66, "Sconv.04": 0.58, DENSE_ID: 1.07}
Key = tuple[str, str, float, str]


def layers(architecture: str) -> int:
    """The number of conv layers that an architecture's name stands for.

    >>> layers("conv 32-64/2")
    2
    """
    return architecture.count("-") + 1


def ends(architecture: str) -> list[int]:
    """The number of filters up to the end of each layer but the last.

    >>> ends("conv 32-64/2-64")
    [32, 96]
    """
    return list(itertools.accumulate(hidden_widths(architecture)))[:-1]


def networks(records: Sequence[Record]) -> dict[Key, list[Record]]:
    """The records of each data set, architecture, sparsity target and way to train, in the run table's order."""
    found: dict[Key, list[Record]] = {}
    for record in records:
        key: Any = tuple(record.spec.settings[name] for name in ("dataset", "architecture", "tau", "method"))
        found.setdefault(key, []).append(record)
    return found


def rival(groups: Mapping[Key, Sequence[Record]], key: Key) -> Sequence[Record]:
    """The dense nets of the same architecture that a conditional net is compared with: those that learned for longer
    or not, whichever is better on average."""
    found = [groups[other] for other in ((*key[:2], 1.0, method) for method in DENSE_NETS) if other in groups]
    return min(found, key=lambda group: float(np.mean([record.result["error"] for record in group])), default=[])


def id_of(key: Key) -> str | None:
    """The slides' row of a network, whatever its data set and way to train."""
    return DENSE_ID if key[3] == DENSE and layers(key[1]) == 4 else IDS.get((layers(key[1]), key[2]))


def table(records: Sequence[Record], timed: Sequence[Record]) -> list[dict[str, Any]]:
    """Every network beside the slides' number (CIFAR-10): error, how far from the dense net's, activity, compute, and
    its time over that of the fastest dense engine, one example at a time and 64 (`timed`: records of `conv-time`)."""
    rows, groups, found = published.load(), networks(records), []
    times = {key: group[0] for key, group in networks(timed).items()}
    for key, group in groups.items():
        id, conditional = id_of(key) if key[0] == "cifar10" else None, key[3] not in DENSE_NETS
        theirs, time = rows[id].value if id else None, times.get(key)
        worse = gains(group, rival(groups, key), error) if conditional else None
        equal = [record for record in group if "control_error" in record.result]
        found.append(
            {
                "data": key[0],
                "layers": layers(key[1]),
                "tau": f"{key[2]:g}" if conditional else "",
                "trained": key[3],
                "published error, %": f"{100 * theirs:.1f}" if theirs else "",
                "error, %": over_runs(group, error).format(1),
                "more than dense, points": worse.format(1) if worse else "",
                "dense of equal compute, %": over_runs(equal, control_error).format(1) if equal else "",
                "active, %": over_runs(group, active).format(0) if conditional else "",
                "by layer": " / ".join(f"{100 * share:.0f}" for share in by_layer(group)) if conditional else "",
                "compute": over_runs(group, lambda r: r["compute"]).format(2) if conditional else "",
                "published time / dense": f"{SECONDS[id] / SECONDS[DENSE_ID]:.2f}" if id and conditional else "",
                "time / dense, batch 1": share_of(time, "one").format(2) if time else "",
                "batch 64": share_of(time, "many").format(2) if time else "",
                "runs": len(group),
            }
        )
    return found


BRIEF = ("data", "layers", "tau", "trained", "published error, %", "error, %", "more than dense, points",
         "dense of equal compute, %", "time / dense, batch 1", "batch 64")  # fmt: skip


def brief(records: Sequence[Record], timed: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows of `table` for dense nets and for the slides' networks, without what only the notebook needs."""
    shown = [row for row in table(records, timed) if row["trained"] in (*DENSE_NETS, PAPER, OURS)]
    return [{name: row[name] for name in BRIEF} for row in shown]


def traded(records: Sequence[Record], timed: Sequence[Record], dataset: str, batch: str) -> dict[str, np.ndarray]:
    """For the figure: (share of the dense net's time, error in %) of every timed run by the way it was trained; the
    dense nets of the deeper architecture, which take 1; and on CIFAR-10 the slides' points."""
    found: dict[str, list[tuple[float, float]]] = {}
    groups, rows = networks(records), published.load()
    most = max((layers(key[1]) for key in groups if key[0] == dataset), default=0)
    for key in groups:
        if key[0] == dataset and key[3] == DENSE and layers(key[1]) == most:
            found[DENSE] = [(1.0, error(record.result)) for record in rival(groups, key)]
    for key, group in networks(timed).items():
        if key[0] == dataset:
            points = [(share_of(record, batch).estimate, error(record.result)) for record in group]
            found.setdefault(key[3], []).extend(points)
    if dataset == "cifar10":
        theirs = [(seconds / SECONDS[DENSE_ID], 100 * (rows[id].value or 0)) for id, seconds in SECONDS.items()]
        found["published"] = theirs
    return {name: np.array(points) for name, points in found.items()}


def share_of(record: Record, batch: str) -> Interval:
    """The share of the fastest dense engine's time that a compiled net takes."""
    estimate, low, high = record.result[batch]["over_dense"]
    return Interval(1 / estimate, 1 / high, 1 / low, record.spec.settings["repeats"], 0.95)


def answers(records: Sequence[Record]) -> list[Answer]:
    """The slides' rows on CIFAR-10, trained their way, with ours in the note."""
    found, groups = [], networks(records)
    for key, group in groups.items():
        id = id_of(key)
        if key[0] != "cifar10" or id is None or key[3] not in (PAPER, DENSE):
            continue
        note = DATA[key[0]]
        if key[3] == PAPER:
            note += f"; {over_runs(group, active).format(0)}% active"
            if best := groups.get((*key[:3], OURS)):
                note += f"; by today's means {over_runs(best, error).format(1)}% wrong at "
                note += f"{over_runs(best, active).estimate:.0f}% active"
        ours = over_runs(group, lambda r: r["error"])
        found.append(Answer(id, ours, "test_error", note, NOTEBOOK, "conv_table"))
    return found


def claims(records: Sequence[Record]) -> list[Claim]:
    """By today's means a conditional net costs at most half a point. Brief runs on digits judge nothing."""
    found, groups = [], networks(records)
    for key, group in groups.items():
        if key[3] != OURS or len(group) < 2:
            continue
        worse = gains(group, rival(groups, key), error)
        assert worse is not None
        statement = f"{name_of(key)}: at most {WORSE:g} points more wrong than the dense net"
        found.append(judge(f"{claim_id(key)}.error", id_of(key) or "slides", statement, worse, below=WORSE))
        if "control_error" not in group[0].result:
            continue
        gain = over_runs(group, lambda r: control_error(r) - error(r))
        statement = f"{name_of(key)}: fewer errors (in points) than the dense net of equal compute"
        found.append(judge(f"{claim_id(key)}.control", "ours", statement, gain, above=0.0))
    return found


def name_of(key: Key) -> str:
    """A network in words."""
    return f"{key[0]}, {layers(key[1])} conv layers, tau {key[2]:g}, {key[3]}"


def claim_id(key: Key) -> str:
    """A network in the ids of claims."""
    way = {OURS: "today", PAPER: "published"}[key[3]]
    return f"conv.{key[0]}.{layers(key[1])}.{key[2]:g}.{way}"


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """The figure of notebook 06 that is made from this study."""
    return {"conv_filters": records}


def pictured(records: Sequence[Record], dataset: str) -> list[Record]:
    """The records of a data set that say how often each filter was evaluated for each class."""
    found = [r for r in records if r.spec.settings["method"] == OURS and not r.spec.settings["target_seed"]]
    return [record for record in found if record.spec.settings["dataset"] == dataset]
