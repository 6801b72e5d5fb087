"""From records of lazy networks to tables and figure data, for every study that measures them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from condcomp_lib import stats
from condcomp_lib.runs import Record
from condcomp_lib.studies import targets

# (data set, architecture, pretraining, least keep probability, rescaling of kept activations)
Kind = tuple[str, str, str, float | None, str]
SAMPLED = "sample"


def kind_of(record: Record) -> Kind:
    """The kind of target of a record, with its rescaling."""
    fields = ("dataset", "architecture", "pretraining", "dropout_eps", "rescale")
    return tuple(record.spec.settings[field] for field in fields)


def kind_id(kind: Kind) -> str:
    """A kind in the ids of claims.

    >>> kind_id(("svhn", "3x800", "none", None, "none"))
    'svhn.3x800.none.none'
    """
    return ".".join(str(part) for part in kind if part is not None)


def by_kind(records: Sequence[Record]) -> dict[tuple[Kind, str], list[Record]]:
    """The records of each kind and way to decide ("sample", "calibrated 25%"), kind by kind."""
    groups: dict[tuple[Kind, str], list[Record]] = {}
    for record in records:
        settings, asked = record.spec.settings, record.spec.settings["activity_asked"]
        decided = f"{settings['decision']} {asked:.0%}" if asked else settings["decision"]
        groups.setdefault((kind_of(record), decided), []).append(record)
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    return {key: groups[key] for kind in kinds for key in groups if key[0] == kind}


def label(kind: Kind) -> str:
    """A kind in words, for tables and figures.

    >>> label(("svhn", "3x800", "none", None, "none"))
    'svhn 3x800, no dropout'
    """
    dataset, architecture, pretraining, eps, rescale = kind
    ending = {"none": "", "activity": ", rescaled"}.get(rescale, f", rescaled by 1/{rescale}")
    return f"{dataset} {architecture}, {targets.label(pretraining, eps)}{ending}"


def over_runs(group: Sequence[Record], value: Callable[[Mapping[str, Any]], float]) -> stats.Interval:
    """`value` of each record's result with its interval; runs that share a target are resampled together."""
    seeds = [record.spec.settings["target_seed"] for record in group]
    return stats.interval([value(record.result) for record in group], clusters=seeds)


def over_controls(group: Sequence[Record], value: Callable[[Mapping[str, Any]], float]) -> stats.Interval | None:
    """As `over_runs`, over the runs that have a control; None where there are none."""
    having = [record for record in group if record.spec.settings["control"]]
    return over_runs(having, value) if having else None


def largest(result: Mapping[str, Any]) -> tuple[float, float]:
    """The largest group's share of all hidden neurons, and the share of examples on which it is evaluated."""
    sizes = result["group_sizes"]
    index = int(np.argmax(sizes))
    return sizes[index] / sum(sizes), result["group_firing"][index]


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The table of lazy networks: one row per kind and decision, intervals over runs, resampled by target."""
    rows = []
    for (kind, decision), group in by_kind(records).items():
        rows.append(
            {
                "target": label(kind),
                "decision": decision,
                "runs": len(group),
                "target accuracy": over_runs(group, lambda r: r["target_accuracy"]),
                "lazy accuracy": over_runs(group, lambda r: r["accuracy"]),
                "accuracy ratio": over_runs(group, lambda r: r["accuracy_ratio"]),
                "blind ratio": over_runs(group, lambda r: r["blind_ratio"]),
                "activity": over_runs(group, lambda r: r["activity"]),
                "compute": over_runs(group, lambda r: r["compute"]),
                "control width": width.format(0)
                if (width := over_controls(group, lambda r: r["control_width"]))
                else "",
                "control ratio": over_controls(group, lambda r: r["control_ratio"]) or "",
            }
        )
    return rows


def group_summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The table of groups: sizes, and how often the largest and the average one are evaluated."""
    rows = []
    for (kind, decision), group in by_kind(records).items():
        if decision != SAMPLED:
            continue
        rows.append(
            {
                "target": label(kind),
                "runs": len(group),
                "neurons a group": float(np.mean(group[0].result["group_sizes"])),
                "s.d. of sizes": over_runs(group, lambda r: np.std(r["group_sizes"])),
                "largest group's share": over_runs(group, lambda r: largest(r)[0]),
                "largest group evaluated on": over_runs(group, lambda r: largest(r)[1]),
                "mean over groups": over_runs(group, lambda r: np.mean(r["group_firing"])),
                "s.d. over groups": over_runs(group, lambda r: np.std(r["group_firing"])),
            }
        )
    return rows


def ratios(records: Sequence[Record]) -> dict[str, dict[str, np.ndarray]]:
    """For each kind the accuracy ratios of its runs (lazy, blind, control) and their activity, by decision."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for (kind, decision), group in by_kind(records).items():
        rows = found.setdefault(label(kind), {})
        rows[f"lazy, {decision}"] = np.array([r.result["accuracy_ratio"] for r in group])
        rows[f"blind, {decision}"] = np.array([r.result["blind_ratio"] for r in group])
        rows[f"control, {decision}"] = np.array([r.result.get("control_ratio", math.nan) for r in group])
        rows[f"activity, {decision}"] = np.array([r.result["activity"] for r in group])
    return found


def learning(records: Sequence[Record]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each kind the accuracy (over the target's) and the activity after each epoch of policy training, by run."""
    return {
        label(kind): (
            np.array([np.array(r.result["accuracy_curve"]) / r.result["target_valid_accuracy"] for r in group]),
            np.array([r.result["activity_curve"] for r in group]),
        )
        for (kind, decision), group in by_kind(records).items()
        if decision == SAMPLED
    }


def firing(records: Sequence[Record]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each kind the share of the neurons that each group holds, and of the examples it is evaluated on, by run."""
    found = {}
    for (kind, decision), group in by_kind(records).items():
        if decision == SAMPLED:
            sizes = np.array([r.result["group_sizes"] for r in group], dtype=float)
            rates = np.array([r.result["group_firing"] for r in group])
            found[label(kind)] = (sizes / sizes.sum(1, keepdims=True), rates)
    return found


def gains(
    group: Sequence[Record], base: Sequence[Record], value: Callable[[Mapping[str, Any]], float]
) -> stats.Interval | None:
    """`value` of each run less that of the run with the same seeds in `base`, with its interval; None without pairs."""

    def by_seeds(records: Sequence[Record]) -> dict[tuple[int, int], Record]:
        return {(r.spec.settings["target_seed"], r.spec.settings["policy_seed"]): r for r in records}

    ours, theirs = by_seeds(group), by_seeds(base)
    common = [seeds for seeds in ours if seeds in theirs]
    differences = [value(ours[seeds].result) - value(theirs[seeds].result) for seeds in common]
    return stats.interval(differences, clusters=[target for target, _ in common]) if common else None
