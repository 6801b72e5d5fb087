"""From records of jointly trained networks to the tables of *dropout-policies* and *faster-models*, and to claims."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from condcomp_lib import published, stats
from condcomp_lib.claims import Claim, judge
from condcomp_lib.published import Answer
from condcomp_lib.runs import Record
from condcomp_lib.studies.lazy_results import gains, over_runs
from condcomp_lib.targets import hidden_widths

DENSE, DROPPED = "dense", "block dropout"
PAPER, OURS = "as published", "today's"
CORRECTED, SHARED = "KL corrected", "KL corrected, one mask for 32 examples"
NOTEBOOK = "06_joint_training"
DATA = {
    "mnist": "official MNIST",
    "cifar10": "CIFAR-10 from a JPEG copy",
    "svhn": "SVHN without its extra set",
    "digits": "scikit-learn's digits",
}
# The papers' numbers: data set, architecture and method, to ids.
IDS = {
    ("mnist", "500", DENSE): "Ds4.01", ("mnist", "500", PAPER): "Ds4.02",
    ("mnist", "256", PAPER): "Fs42.01", ("mnist", "256", DENSE): "Fs42.02", ("mnist", "32", DENSE): "Fs42.03",
    ("cifar10", "1536-1536", PAPER): "Ff2.01", ("cifar10", "256-512", PAPER): "Ff2.02",
    ("cifar10", "640-640", PAPER): "Ff2.03", ("cifar10", "640-640", f"{DROPPED}, 17%"): "Ff2.04",
    ("cifar10", "640-640", f"{DROPPED}, 20%"): "Ff2.05", ("cifar10", "64-64", DENSE): "Ff2.06",
    ("cifar10", "128-128", DENSE): "Ff2.07", ("cifar10", "480-480", DENSE): "Ff2.08",
    ("svhn", "208-128", PAPER): "Ff4.01", ("svhn", "432-112", PAPER): "Ff4.02", ("svhn", "800-704", PAPER): "Ff4.03",
    ("svhn", "288-928", DENSE): "Ff4.04", ("svhn", "800-736", DENSE): "Ff4.05", ("svhn", "1280-1056", DENSE): "Ff4.06",
}  # fmt: skip
Key = tuple[str, str, str]
Networks = Mapping[Key, Sequence[Record]]


def networks(records: Sequence[Record]) -> dict[Key, list[Record]]:
    """The records of each data set, architecture and method, in the run table's order."""
    found: dict[Key, list[Record]] = {}
    for record in records:
        settings = record.spec.settings
        found.setdefault((settings["dataset"], settings["architecture"], settings["method"]), []).append(record)
    return found


def described(settings: Mapping[str, Any]) -> str:
    """A network in words: its blocks, its units, or a dense net's layers.

    >>> described({"architecture": "640-640", "block": 64, "method": "today's"})
    '10+10 blocks of 64'
    """
    size = settings["block"]
    if settings["method"] == DENSE:
        return f"dense {settings['architecture']}"
    if size == 1:
        return f"{settings['architecture']} units"
    counts = [str(width // size) for width in hidden_widths(settings["architecture"])]
    return f"{'+'.join(counts)} blocks of {size}"


def error(result: Mapping[str, Any]) -> float:
    """The percentage of test examples that a network gets wrong."""
    found: float = 100 * result["error"]
    return found


def control_error(result: Mapping[str, Any]) -> float:
    """The percentage that the dense net of equal compute gets wrong."""
    found: float = 100 * result["control_error"]
    return found


def active(result: Mapping[str, Any]) -> float:
    """The percentage of hidden neurons that an example evaluates."""
    found: float = 100 * result["activity"]
    return found


def table(records: Sequence[Record], dataset: str) -> list[dict[str, Any]]:
    """Every network of one data set beside the paper's number: error, activity, compute, and the error of the dense net
    of equal compute."""
    rows, found = published.load(), []
    for key, group in networks(records).items():
        if key[0] != dataset:
            continue
        controls = [record for record in group if "control_error" in record.result]
        found.append(
            {
                "network": described(group[0].spec.settings),
                "method": "" if key[2] == DENSE else key[2],
                "published error, %": _percent(rows[IDS[key]] if key in IDS else None),
                "error, %": over_runs(group, error).format(2),
                "active, %": "" if key[2] == DENSE else over_runs(group, active).format(1),
                "by layer": "" if key[2] == DENSE else " / ".join(f"{100 * share:.0f}" for share in by_layer(group)),
                "multiply-adds": f"{np.mean([r.result['multiply_adds'] for r in group]) / 1000:,.0f}k",
                "dense of equal compute, %": over_runs(controls, control_error).format(2) if controls else "",
                "best epoch": f"{np.mean([r.result['curve']['epoch'] for r in group]):.0f}",
                "runs": len(group),
            }
        )
    return found


def brief(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every conditional network in one row: errors in %, with the share of active neurons, as published and by today's
    means, and of the dense net of equal compute."""
    rows, groups = published.load(), networks(records)
    found = []
    for (dataset, architecture, method), group in groups.items():
        if method != OURS:
            continue
        theirs = groups.get((dataset, architecture, PAPER), [])
        id = IDS.get((dataset, architecture, PAPER))
        found.append(
            {
                "data": dataset,
                "network": described(group[0].spec.settings),
                "published": _percent(rows[id]) if id else "",
                "trained as published": over_runs(theirs, error).format(1) if theirs else "not yet",
                "active, as published": f"{over_runs(theirs, active).estimate:.0f}%" if theirs else "",
                "today's means": over_runs(group, error).format(1),
                "active, today's": f"{over_runs(group, active).estimate:.0f}%",
                "dense of equal compute": over_runs(group, control_error).format(1),
            }
        )
    return found


def by_layer(group: Sequence[Record]) -> list[float]:
    """Mean share of each layer's neurons that are evaluated."""
    found: list[float] = np.mean([record.result["activity_by_layer"] for record in group], axis=0).tolist()
    return found


def _percent(row: published.Published | None) -> str:
    if row is None or row.value is None:
        return ""
    percent = row.value if row.metric == "test_error_percent" else 100 * row.value
    return f"{'about ' * (row.note == 'about')}{percent:.1f}"


def curves(records: Sequence[Record], field: str) -> np.ndarray:
    """`field` of the curve ("accuracy": runs x epochs; "activity" and "entropy": runs x epochs x layers), as far as all
    runs went."""
    found = [record.result["curve"][field] for record in records]
    epochs = min(len(curve) for curve in found)
    return np.array([curve[:epochs] for curve in found])


def errors(records: Sequence[Record], dataset: str) -> dict[str, np.ndarray]:
    """For the figure: (multiply-adds, error in %) of the runs of each way to train, with "dense" those of the dense
    nets, controls included, and "published" the paper's errors at our multiply-adds."""
    found: dict[str, list[tuple[float, float]]] = {}
    rows = published.load()
    for key, group in networks(records).items():
        if key[0] != dataset:
            continue
        adds = float(np.mean([record.result["multiply_adds"] for record in group]))
        method = key[2].partition(",")[0]
        found.setdefault(method, []).extend((r.result["multiply_adds"], error(r.result)) for r in group)
        controls = [r.result for r in group if "control_error" in r.result]
        found.setdefault(DENSE, []).extend((r["multiply_adds"], control_error(r)) for r in controls)
        if key in IDS and (value := _percent(rows[IDS[key]])):
            name = f"published, {'dense' if key[2] == DENSE else DROPPED if DROPPED in key[2] else 'conditional'}"
            found.setdefault(name, []).append((adds, float(value.removeprefix("about "))))
    return {name: np.array(points) for name, points in found.items() if points}


def answers(records: Sequence[Record]) -> list[Answer]:
    """The papers' networks trained their way, the dense nets beside them, and Figure 1 of *dropout-policies*."""
    found, rows, groups = [], published.load(), networks(records)
    for key, id in IDS.items():
        if key not in groups or key[::2] == ("mnist", DENSE):  # the study `start` answers these with five seeds
            continue
        metric, group = rows[id].metric, groups[key]
        ours = over_runs(group, error if metric == "test_error_percent" else lambda r: r["error"])
        note = DATA[key[0]]
        if key[2] != DENSE:
            note += f"; {over_runs(group, active).format(0)}% active"
        if best := groups.get((key[0], key[1], OURS)) if key[2] == PAPER else None:
            note += f"; by today's means {over_runs(best, error).format(1)}% wrong at "
            note += f"{over_runs(best, active).estimate:.0f}% active"
        found.append(Answer(id, ours, metric, note, NOTEBOOK, f"joint_{key[0]}_table"))
    return found + _unit_answers(groups)


def _unit_answers(groups: Networks) -> list[Answer]:
    """Figure 1 of *dropout-policies*."""
    found: list[Answer] = []
    if units := groups.get(("mnist", "500", PAPER)):
        found.append(Answer("Ds4.03", over_runs(units, active), "activity_percent",
                            "at the epoch with the lowest validation error", NOTEBOOK, "joint_curves"))  # fmt: skip
        first = curves(units, "entropy")[:, 0].mean()
        note = f"nats a unit after the last epoch; {first:.3f} after the first"
        ours = over_runs(units, last_entropy)
        found.append(Answer("Ds4.05", ours, "policy_entropy", note, NOTEBOOK, "joint_curves"))
    if deep := groups.get(("mnist", "800-800", PAPER)):
        layers = curves(deep, "activity")
        start, end = (" / ".join(f"{100 * share:.0f}%" for share in layers[:, at].mean(0)) for at in (0, -1))
        note = "points by which the first layer's activity rises further than the second's; layers 1 / 2: "
        note += f"{start} after the first epoch, {end} after the last"
        found.append(Answer("Ds4.04", _further(deep), "activity_by_layer", note, NOTEBOOK, "joint_curves"))
    return found


def claims(records: Sequence[Record]) -> list[Claim]:
    """What conditional nets must reach, and that each is better than the dense net of equal compute."""
    groups, found = networks(records), []
    for (dataset, architecture, method), group in groups.items():
        if len(group) < 2 or "control_error" not in group[0].result:
            continue
        gain = over_runs(group, lambda r: control_error(r) - error(r))
        statement = (
            f"{dataset}, {described(group[0].spec.settings)}, {method}: fewer errors (in points) than the dense "
        )
        statement += "net of equal compute"
        found.append(judge(f"joint.{dataset}.{architecture}.control", "ours", statement, gain, above=0.0))
    return found + _bars(groups) + _rivals(groups) + _unit_claims(groups)


# Data set, architecture, the most error (%) and activity (%) of the network by today's means.
BARS = (("mnist", "500", 1.7, 15.0), ("mnist", "256", 1.9, 7.5), ("cifar10", "640-640", 49.7, 18.0))


def _bars(groups: Networks) -> list[Claim]:
    found = []
    for dataset, architecture, most, share in BARS:
        group = groups.get((dataset, architecture, OURS), [])
        if len(group) < 2:
            continue
        name, id = f"{dataset}, {described(group[0].spec.settings)}, {OURS}", f"joint.{dataset}.{architecture}"
        statement = f"{name}: at most {most:g}% wrong"
        found.append(judge(f"{id}.error", "ours", statement, over_runs(group, error), below=most))
        statement = f"{name}: at most {share:g}% active"
        found.append(judge(f"{id}.active", "ours", statement, over_runs(group, active), below=share))
    return found


def _rivals(groups: Networks) -> list[Claim]:
    """Against the dense nets that the papers compare with."""
    found = []
    for method in (PAPER, OURS):
        id = method.replace("'", "").replace(" ", "-")
        gain = gains(groups.get(("mnist", "32", DENSE), []), groups.get(("mnist", "256", method), []), error)
        if gain is not None:
            statement = f"mnist, 16 blocks of 16, {method}: fewer errors (in points) than a dense net of 32"
            found.append(judge(f"joint.mnist.dense32.{id}", "Fs42.01", statement, gain, above=0.0))
        dense = [group for key, group in groups.items() if key[0] == "svhn" and key[2] == DENSE]
        ours = groups.get(("svhn", "800-704", method))
        if dense and ours:
            best = min(dense, key=lambda group: np.mean([record.result["error"] for record in group]))
            statement = f"svhn, {described(ours[0].spec.settings)}, {method}: fewer errors (in points) than our best "
            statement += f"dense net, {best[0].spec.settings['architecture']}"
            gain = gains(best, ours, error)
            assert gain is not None
            found.append(judge(f"joint.svhn.best-dense.{id}", "Ff4.03", statement, gain, above=0.0))
    return found


def _unit_claims(groups: Networks) -> list[Claim]:
    """What *dropout-policies* finds, and what it leaves open."""
    found = []
    if units := groups.get(("mnist", "500", PAPER)):
        risen = _risen(units)
        statement = "mnist, 500 units as published: more units active (in points) at the end than after an epoch"
        found.append(judge("joint.units.rise", "Ds4.03", statement, risen, above=0.0))
    if deep := groups.get(("mnist", "800-800", PAPER)):
        statement = "mnist, 800-800 units as published: the first layer's activity rises further than the second's"
        found.append(judge("joint.units.layers", "Ds4.04", statement, _further(deep), above=0.0))
    cost = gains(groups.get(("mnist", "500", SHARED), []), groups.get(("mnist", "500", CORRECTED), []), error)
    if cost is not None:
        statement = "mnist, 500 units, KL corrected: one mask for 32 examples costs less than half a point"
        found.append(judge("joint.units.shared", "dropout-policies, 4", statement, cost, below=0.5))
    return found


def _further(group: Sequence[Record]) -> stats.Interval:
    """By how many points the first layer's activity rises further than the second's."""
    layers = curves(group, "activity")
    rise = 100 * (layers[:, -1] - layers[:, 0])
    return stats.interval(rise[:, 0] - rise[:, 1])


def last_entropy(result: Mapping[str, Any]) -> float:
    """Mean entropy of a bit after the last epoch, in nats."""
    return float(np.mean(result["curve"]["entropy"][-1]))


def _risen(group: Sequence[Record]) -> stats.Interval:
    layers = curves(group, "activity")
    return stats.interval(100 * (layers[:, -1] - layers[:, 0]).mean(1))


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 06 that are made from this study."""
    tables = dict.fromkeys(f"joint_{record.spec.settings['dataset']}_table" for record in records)
    return dict.fromkeys(("joint_curves", "joint_policy", "joint_gates", "joint_errors", *tables), records)


def pictured(records: Sequence[Record], dataset: str, architecture: str, method: str) -> Record:
    """The record of that network that has pictures."""
    return networks(records)[dataset, architecture, method][0]


def finding(records: Sequence[Record]) -> str:
    """What the runs say, as a Markdown list with its numbers filled in."""
    lines, groups = [], networks(records)
    for (dataset, architecture, method), group in groups.items():
        if method != OURS:
            continue
        parts = f"{over_runs(group, error).format(1)}% wrong at {over_runs(group, active).estimate:.0f}% active"
        paper = groups.get((dataset, architecture, PAPER))
        theirs = ""
        if paper:
            theirs = f"; trained as published {over_runs(paper, error).format(1)}% at "
            theirs += f"{over_runs(paper, active).estimate:.0f}% active"
        equal = over_runs(group, control_error).format(1)
        lines.append(f"- **{dataset}, {described(group[0].spec.settings)}**, today's means: {parts}{theirs}; dense of "
                     f"equal compute {equal}%.")  # fmt: skip
    beaten = [gain for gain in _gains(groups) if gain.low > 0]
    lines.append(f"- Fewer errors than the dense net of equal compute, by more than the interval: **{len(beaten)} of "
                 f"{len(lines)}** networks.")  # fmt: skip
    return "\n".join(lines)


def _gains(groups: Networks) -> list[stats.Interval]:
    """By how many points each network by today's means makes fewer errors than the dense net of equal compute."""
    ours = [group for (*_, method), group in groups.items() if method == OURS]
    return [over_runs(group, lambda r: control_error(r) - error(r)) for group in ours]
