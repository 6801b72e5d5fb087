"""From records of learned policies to tables, figure data and claims (the studies `policies` and `policies-dpg`)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from condcomp_lib.claims import Claim, judge
from condcomp_lib.published import Answer
from condcomp_lib.runs import Record
from condcomp_lib.studies.lazy_results import gains, kind_id, kind_of, label, over_runs

WARM, FILLED = "warm start", "warm start, compensated"
TUNED, DENSE = "fine-tuned", "target, fine-tuned"
BASE = "REINFORCE"
NAMES = {"reinforce": "REINFORCE", "dpg": "DPG", "dpg-bits": "DPG, bits"}
DRAWN = "probabilities drawn"


def no_answers(records: Sequence[Record]) -> list[Answer]:  # noqa: ARG001
    """No published number has its counterpart here: the paper's own tables learn the partition as well."""
    return []


def by_method(
    records: Iterable[Record], *parts: str, tau: float | None = 0.25, groups: int | None = None
) -> dict[str, list[Record]]:
    """The records of each method in these parts of the run table (all of them if none is named), with this sparsity
    target (None: any) and number of groups (None: that of the first record)."""
    found: dict[str, list[Record]] = {}
    for record in records:
        settings = record.spec.settings
        groups = groups or settings["groups"]
        if (parts and settings["part"] not in parts) or settings["groups"] != groups:
            continue
        if tau is None or settings["tau"] == tau or settings["method"] == DENSE:
            found.setdefault(settings["method"], []).append(record)
    return found


def ratio(result: Mapping[str, Any]) -> float:
    """The accuracy ratio of a run's result."""
    found: float = result["accuracy_ratio"]
    return found


def _optional(group: Sequence[Record], value: Callable[[Mapping[str, Any]], float], field: str) -> Any:
    having = [record for record in group if field in record.result]
    return over_runs(having, value) if having else ""


def summary(records: Sequence[Record], *parts: str, tau: float | None = 0.25) -> list[dict[str, Any]]:
    """The table of methods at one sparsity target: kept accuracy beside a blind draw and the control, and the cost."""
    rows = []
    for method, group in by_method(records, *parts, tau=tau).items():
        rows.append(
            {
                "method": method,
                "runs": len(group),
                "ratio": over_runs(group, ratio),
                "blind draw": over_runs(group, lambda r: r["blind_ratio"]),
                "control": _optional(group, lambda r: r["control_ratio"], "control_ratio"),
                "activity": over_runs(group, lambda r: r["activity"]),
                "compute": over_runs(group, lambda r: r["compute"]),
                "seconds": f"{np.median([record.provenance['seconds'] for record in group]):.0f}",
            }
        )
    return rows


def sampled_summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """How the policies do when their bits are drawn, as in the papers, on the first test examples."""
    rows = []
    for method, group in by_method(records, "best", "estimators").items():
        having = [record for record in group if "sampled_accuracies" in record.result]
        if having:
            rows.append(
                {
                    "method": method,
                    "ratio, threshold": over_runs(having, ratio),
                    "ratio, drawn": over_runs(
                        having, lambda r: np.mean(r["sampled_accuracies"]) / r["target_accuracy"]
                    ),
                    "s.d. of one draw": over_runs(having, lambda r: np.std(r["sampled_accuracies"], ddof=1)),
                    "activity, threshold": over_runs(having, lambda r: r["activity"]),
                    "activity, drawn": over_runs(having, lambda r: r["sampled_activity"]),
                }
            )
    return rows


def fill_summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What mean contributions in place of skipped groups change, filled in afterwards or from the start."""
    methods = by_method(records, "best", "estimators")
    rows = [
        {
            "method": method,
            "skipped count as zero": over_runs(group, ratio),
            "filled in afterwards": over_runs(group, lambda r: r["filled_accuracy"] / r["target_accuracy"]),
            "filled in from the start": "",
        }
        for method, group in methods.items()
        if all("filled_accuracy" in record.result for record in group)
    ]
    for row in rows:
        if row["method"] == WARM and (start := by_method(records, "compensation").get(FILLED)):
            row["filled in from the start"] = over_runs(start, ratio)
    return rows


def series(records: Sequence[Record], *parts: str, tau: float | None = 0.25) -> dict[str, dict[str, np.ndarray]]:
    """For each method its runs' ratios "lazy", "blind" and "control" and their "activity"."""
    return {
        method: {
            "lazy": np.array([r.result["accuracy_ratio"] for r in group]),
            "blind": np.array([r.result["blind_ratio"] for r in group]),
            "control": np.array([r.result.get("control_ratio", np.nan) for r in group]),
            "activity": np.array([r.result["activity"] for r in group]),
        }
        for method, group in by_method(records, *parts, tau=tau).items()
    }


def learning(records: Sequence[Record], *parts: str) -> dict[str, np.ndarray]:
    """For each method the validation accuracy (over the target's) after each epoch, held to the asked activity."""
    return {
        method: np.array([np.array(r.result["accuracy_curve"]) / r.result["target_valid_accuracy"] for r in group])
        for method, group in by_method(records, *parts).items()
    }


def front(records: Sequence[Record], methods: Sequence[str], cost: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each method every run's `cost` ("activity" or "compute") and accuracy ratio at every sparsity target (two
    float arrays, targets x runs), and for "control" those of the controls (at the compute of the lazy networks)."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    controls: list[tuple[float, float]] = []
    for method in methods:
        runs = by_method(records, "best", "estimators", "fronts", tau=None).get(method, [])
        runs = [record for record in runs if record.spec.settings["policy_seed"] == 0]
        taus = sorted({record.spec.settings["tau"] for record in runs})
        if not taus:
            continue
        rows = [[r.result for r in runs if r.spec.settings["tau"] == tau] for tau in taus]
        found[method] = (
            np.array([[result[cost] for result in row] for row in rows]),
            np.array([[result["accuracy_ratio"] for result in row] for row in rows]),
        )
        controls += [(result[cost], result["control_ratio"]) for row in rows for result in row]
    if controls:
        pairs = np.array(sorted(controls))
        found["control"] = (pairs[:, :1], pairs[:, 1:])
    return found


def claims(records: Sequence[Record]) -> list[Claim]:
    """The bars, every estimator against REINFORCE, compensation, and the forms of the sparsity loss."""
    if len({record.spec.settings["target_seed"] for record in records}) < 2:
        return []  # one target says nothing about another
    best = by_method(records, "best")
    found = _bars(best, by_method(records, "dense"))
    rivals = by_method(records, "estimators") | best
    for method, group in rivals.items():
        end = method.lower().replace(", ", ".").replace(" ", "-")
        if method not in (BASE, TUNED):
            statement = f"25% active: {method} keeps more than REINFORCE"
            found += _gain(f"policies.reinforce.{end}", statement, group, rivals[BASE])
        statement = f"25% active: {method} beats the control of equal compute"
        interval = over_runs(group, lambda r: r["accuracy_ratio"] - r["control_ratio"])
        found.append(judge(f"policies.control.{end}", "ours", statement, interval, above=0.0))
    for method, group in by_method(records, "regularisers").items():
        end = method.lower().replace(", ", ".").replace(" ", "-").replace("+", "").replace("--", "-")
        statement = (
            f"25% active: {method.removeprefix('REINFORCE, ')} as the sparsity loss keeps more than the rate loss"
        )
        found += _gain(f"policies.sparsity.{end}", statement, group, rivals[BASE])
    statement = "25% active: mean contributions of skipped groups, from the start, keep more than zeros"
    found += _gain("policies.filled", statement, by_method(records, "compensation").get(FILLED, []), best[WARM])
    return found


def _bars(best: Mapping[str, Sequence[Record]], dense: Mapping[str, Sequence[Record]]) -> list[Claim]:
    found = []
    for method, end, level in ((WARM, "frozen", 0.97), (TUNED, "tuned", 1.0)):
        group = best[method]
        kept = f"{method}: at least {level:.2f} of the best dense target's accuracy"
        found.append(judge(f"policies.{end}.ratio", "ours", kept, over_runs(group, ratio), above=level))
        off = over_runs(group, lambda r: abs(r["activity"] - 0.25))
        found.append(judge(f"policies.{end}.activity", "ours", f"{method}: activity within a point of 25%", off,
                           below=0.01))  # fmt: skip
        spent = over_runs(group, lambda r: r["compute"])
        found.append(judge(f"policies.{end}.compute", "ours", f"{method}: compute of at most 0.27", spent, below=0.27))
    moved = over_runs(best[TUNED], lambda r: r["accuracy_ratio"] - r["moved_control_ratio"])
    statement = "fine-tuned: beats the control that was distilled on moved pictures, too"
    found.append(judge("policies.tuned.moved", "ours", statement, moved, above=0.0))
    first = [record for record in best[TUNED] if record.spec.settings["policy_seed"] == 0]
    return found + _gain(
        "policies.tuned.dense", "fine-tuned: keeps more than the target fine-tuned for as long", first,
        dense.get(DENSE, []),
    )  # fmt: skip


def _gain(id: str, statement: str, group: Sequence[Record], base: Sequence[Record]) -> list[Claim]:
    """The claim that runs keep more than those with the same seeds in `base`; none without pairs."""
    interval = gains(group, base, ratio)
    return [] if interval is None else [judge(id, "ours", statement, interval, above=0.0)]


def _pairs(records: Sequence[Record], twins: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """By kind the records of each estimator, REINFORCE's from its own study, where the same settings were used."""
    found: dict[str, dict[str, list[Record]]] = {}
    kinds = list(dict.fromkeys(map(kind_of, records)))
    same = [twin for twin in twins if twin.spec.settings["activity_asked"] == 0.25]
    for record in [*same, *records]:
        if kind_of(record) in kinds:
            name = NAMES[record.spec.settings["estimator"]]
            found.setdefault(label(kind_of(record)), {}).setdefault(name, []).append(record)
    return found


def dpg_series(records: Sequence[Record], twins: Sequence[Record]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """For each kind and estimator the ratios of its runs, as from `series`; `twins` the study `partitioning`."""
    return {
        kind: {
            name: {
                "lazy": np.array([r.result["accuracy_ratio"] for r in group]),
                "blind": np.array([r.result["blind_ratio"] for r in group]),
                "control": np.array([r.result.get("control_ratio", np.nan) for r in group]),
                "activity": np.array([r.result["activity"] for r in group]),
            }
            for name, group in groups.items()
        }
        for kind, groups in _pairs(records, twins).items()
    }


def dpg_summary(records: Sequence[Record], twins: Sequence[Record]) -> list[dict[str, Any]]:
    """DPG and REINFORCE at 25% activity with their paired difference, by kind."""
    rows = []
    for kind, groups in _pairs(records, twins).items():
        for name, group in groups.items():
            rows.append(
                {
                    "target": kind,
                    "estimator": name,
                    "runs": len(group),
                    "ratio": over_runs(group, ratio),
                    "less REINFORCE": "" if name == BASE else gains(group, groups[BASE], ratio) or "",
                    "blind draw": over_runs(group, lambda r: r["blind_ratio"]),
                    "control": _optional(group, lambda r: r["control_ratio"], "control_ratio"),
                    "activity": over_runs(group, lambda r: r["activity"]),
                    "compute": over_runs(group, lambda r: r["compute"]),
                }
            )
    return rows


def dpg_claims(records: Sequence[Record], twins: Sequence[Record]) -> list[Claim]:
    """DPG keeps at least what REINFORCE keeps, for each pretraining (*partitions*, Table 1)."""
    found = []
    ids = {label(kind): kind_id(kind) for kind in dict.fromkeys(map(kind_of, records))}
    for kind, groups in _pairs(records, twins).items():
        for name in (name for name in groups if name != BASE):
            id = f"dpg.{ids[kind]}.{name.lower().replace(', ', '.')}"
            interval = gains(groups[name], groups[BASE], ratio)
            if interval is not None and interval.n > 1:
                statement = f"{kind}, 25% active: {name} keeps more than REINFORCE"
                found.append(judge(id, "partitions, Table 1", statement, interval, above=0.0))
    return found
