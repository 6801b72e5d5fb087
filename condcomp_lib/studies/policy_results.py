"""From records of learned policies to tables, figure data and claims (the study `policies`)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from condcomp_lib.claims import Claim, judge
from condcomp_lib.published import Answer
from condcomp_lib.runs import Record
from condcomp_lib.studies.lazy_results import gains, over_runs

WARM, FILLED = "warm start", "warm start, compensated"
TUNED, DENSE = "fine-tuned", "target, fine-tuned"
BASE = "REINFORCE"


def no_answers(records: Sequence[Record]) -> list[Answer]:  # noqa: ARG001
    """No published number has its counterpart here: the paper's own tables learn the partition as well."""
    return []


def by_method(records: Iterable[Record], *parts: str, tau: float | None = 0.25) -> dict[str, list[Record]]:
    """The records of each method in these parts of the run table (all of them if none is named), with this sparsity
    target (None: any)."""
    found: dict[str, list[Record]] = {}
    for record in records:
        settings = record.spec.settings
        asked = not parts or settings["part"] in parts
        if asked and (tau is None or settings["tau"] == tau or settings["method"] == DENSE):
            found.setdefault(settings["method"], []).append(record)
    return found


def ratio(result: Mapping[str, Any]) -> float:
    """The accuracy ratio of a run's result."""
    found: float = result["accuracy_ratio"]
    return found


def optional(group: Sequence[Record], value: Callable[[Mapping[str, Any]], float], field: str) -> Any:
    """As `over_runs`, over the runs that have this field; nothing where none has."""
    having = [record for record in group if field in record.result]
    return over_runs(having, value) if having else ""


def columns(group: Sequence[Record]) -> dict[str, Any]:
    """The columns of a table of runs: kept accuracy beside a blind draw and the control, and the cost."""
    return {
        "ratio": over_runs(group, ratio),
        "blind draw": over_runs(group, lambda r: r["blind_ratio"]),
        "control": optional(group, lambda r: r["control_ratio"], "control_ratio"),
        "activity": over_runs(group, lambda r: r["activity"]),
        "compute": over_runs(group, lambda r: r["compute"]),
    }


def summary(records: Sequence[Record], *parts: str) -> list[dict[str, Any]]:
    """The table of methods in these parts of the run table at 25% activity."""
    found = by_method(records, *parts).items()
    return [{"method": method, "runs": len(group), **columns(group)} for method, group in found]


def sampled_summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """How the policies do when their bits are drawn, as in the papers, on the first test examples."""
    rows = []
    for method, group in by_method(records, "best", "estimators").items():
        having = [record for record in group if "sampled_accuracies" in record.result]
        if having:
            rows.append(
                {
                    "method": method,
                    "accuracy, threshold": over_runs(having, lambda r: r["decided_accuracy"]),
                    "accuracy, drawn": over_runs(having, lambda r: np.mean(r["sampled_accuracies"])),
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
        }
        for method, group in methods.items()
        if all("filled_accuracy" in record.result for record in group)
    ]
    if start := by_method(records, "compensation").get(FILLED):
        rows = [{**row, "from the start": over_runs(start, ratio) if row["method"] == WARM else ""} for row in rows]
    return rows


def series(records: Sequence[Record], *parts: str) -> dict[str, dict[str, np.ndarray]]:
    """For each method at 25% activity its runs' ratios "lazy", "blind" and "control" and their "activity"."""
    return {method: ratios(group) for method, group in by_method(records, *parts).items()}


def ratios(group: Sequence[Record]) -> dict[str, np.ndarray]:
    """The runs' ratios "lazy", "blind" and "control" (NaN where none was trained) and their "activity"."""
    return {
        "lazy": np.array([r.result["accuracy_ratio"] for r in group]),
        "blind": np.array([r.result["blind_ratio"] for r in group]),
        "control": np.array([r.result.get("control_ratio", np.nan) for r in group]),
        "activity": np.array([r.result["activity"] for r in group]),
    }


def learning(records: Sequence[Record], *parts: str) -> dict[str, np.ndarray]:
    """For each method the validation accuracy (over the target's) after each epoch, held to the asked activity."""
    return {
        method: np.array([np.array(r.result["accuracy_curve"]) / r.result["target_valid_accuracy"] for r in group])
        for method, group in by_method(records, *parts).items()
    }


def front(records: Sequence[Record], methods: Sequence[str], cost: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each method every run's `cost` ("activity" or "compute") and accuracy ratio at every sparsity target (two
    float arrays, sparsity targets x runs); "control" holds those of the controls, at the lazy networks' compute."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    controls: list[tuple[float, float]] = []
    for method in methods:
        by_seed = [
            {record.spec.settings["target_seed"]: record.result for record in group}
            for group in _by_tau(records, method).values()
        ]
        # Targets that were measured at every sparsity target, so that a line goes through the same ones all along.
        seeds = set.intersection(*map(set, by_seed)) if by_seed else set()
        if not seeds:
            continue
        rows = [[row[seed] for seed in sorted(seeds)] for row in by_seed]
        found[method] = (
            np.array([[result[cost] for result in row] for row in rows]),
            np.array([[result["accuracy_ratio"] for result in row] for row in rows]),
        )
        controls += [(result[cost], result["control_ratio"]) for row in rows for result in row]
    if controls:
        pairs = np.array(sorted(controls))
        found["control"] = (pairs[:, :1], pairs[:, 1:])
    return found


def main_summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The warm start on the frozen target, the fine-tuned network, and what they must be held against."""
    rows = []
    for method, group in (by_method(records, "best") | by_method(records, "dense")).items():
        rows.append(
            {
                "network": method,
                "runs": len(group),
                "ratio": over_runs(group, ratio),
                "accuracy": over_runs(group, lambda r: r["accuracy"]),
                "activity": over_runs(group, lambda r: r["activity"]),
                "compute": "" if method == DENSE else over_runs(group, lambda r: r["compute"]),  # it asks no policy
                "control": optional(group, lambda r: r["control_ratio"], "control_ratio"),
                "control, moved pictures": optional(group, lambda r: r["moved_control_ratio"], "moved_control_ratio"),
            }
        )
    return rows


def front_summary(records: Sequence[Record], methods: Sequence[str]) -> list[dict[str, Any]]:
    """The fronts as a table: every method at every sparsity target, first policy seed."""
    return [
        {"method": method, "tau": f"{tau:g}", **columns(group)}
        for method in methods
        for tau, group in _by_tau(records, method).items()
    ]


def _by_tau(records: Sequence[Record], method: str) -> dict[float, list[Record]]:
    """A method's runs of the first policy seed by sparsity target, in its order."""
    runs = by_method(records, "best", "estimators", "fronts", tau=None).get(method, [])
    asked = sorted({record.spec.settings["tau"] for record in runs})
    return {tau: [record for record in _first(runs) if record.spec.settings["tau"] == tau] for tau in asked}


def _first(group: Sequence[Record]) -> list[Record]:
    return [record for record in group if record.spec.settings["policy_seed"] == 0]


def variants_summary(records: Sequence[Record], method: str, said: str, part: str) -> list[dict[str, Any]]:
    """Variants of a method, a part of the run table, below that method itself, whose row is called `said`; as in
    `summary`, first policy seed."""
    found = {said: _first(by_method(records, "best", "estimators").get(method, []))} | by_method(records, part)
    return [{"method": name, "runs": len(group), **columns(group)} for name, group in found.items() if group]


def findings(records: Sequence[Record]) -> str:
    """What the estimators and the two best networks keep, as a Markdown list with its numbers filled in."""
    learned, best = by_method(records, "estimators"), by_method(records, "best")
    order = sorted(learned, key=lambda method: -over_runs(learned[method], ratio).estimate)
    said = ", ".join(f"{method} {over_runs(learned[method], ratio).estimate:.2f}" for method in order)
    found = [f"- **Estimators at 25% activity, three epochs**, best first: {said}."]
    for method, group in best.items():
        kept, control = over_runs(group, ratio), over_runs(group, lambda r: r["control_ratio"])
        spent = over_runs(group, lambda r: r["compute"])
        found.append(f"- **{method.capitalize()}**: keeps {kept.format(3)} of the target's accuracy for "
                     f"{spent.estimate:.3f} of its multiply-adds; the control keeps {control.format(3)}.")  # fmt: skip
    if dense := by_method(records, "dense").get(DENSE):
        kept = over_runs(dense, ratio)
        found.append(
            f"- **The target fine-tuned in full for as long** reaches {kept.format(3)} of its accuracy before."
        )
    return "\n".join(found)


def claims(records: Sequence[Record]) -> list[Claim]:
    """What is kept and at which cost, every estimator against REINFORCE and the control, fronts, compensation, and the
    forms of the sparsity loss."""
    if len({record.spec.settings["target_seed"] for record in records}) < 2:
        return []  # one target says nothing about another
    best = by_method(records, "best")
    found = _main(best, by_method(records, "dense"))
    rivals = by_method(records, "estimators") | best
    base = rivals.get(BASE, [])
    for method, group in rivals.items():
        end = method.lower().replace(", ", ".").replace(" ", "-")
        if method not in (BASE, TUNED):
            statement = f"25% active: {method} keeps more than REINFORCE"
            found += _gain(f"policies.reinforce.{end}", statement, group, base)
        statement = f"25% active: {method} beats the control of equal compute"
        interval = over_runs(group, lambda r: r["accuracy_ratio"] - r["control_ratio"])
        found.append(judge(f"policies.control.{end}", "ours", statement, interval, above=0.0))
    for method, group in by_method(records, "regularisers").items():
        end = method.lower().replace(", ", ".").replace(" ", "-").replace("+", "").replace("--", "-")
        statement = f"25% active: {method.removeprefix('REINFORCE, ')} for sparsity keeps more than the rate loss"
        found += _gain(f"policies.sparsity.{end}", statement, group, base)
    for tau in sorted({record.spec.settings["tau"] for record in records if record.spec.settings["part"] == "fronts"}):
        for method, group in by_method(records, "fronts", tau=tau).items():
            end = method.lower().replace(", ", ".").replace(" ", "-")
            interval = over_runs(group, lambda r: r["accuracy_ratio"] - r["control_ratio"])
            statement = f"{tau:.0%} active: {method} beats the control of equal compute"
            found.append(judge(f"policies.front.{end}.{tau:g}", "ours", statement, interval, above=0.0))
    for group in by_method(records, "groups").values():
        fewer, all_of_them = (runs[0].spec.settings["groups"] for runs in (group, best[WARM]))
        statement = f"25% active: {all_of_them} groups a layer keep more than {fewer} (warm start)"
        found += _gain(f"policies.groups.{fewer}", statement, best[WARM], group)
    statement = "25% active: mean contributions of skipped groups, from the start, keep more than zeros"
    found += _gain("policies.filled", statement, by_method(records, "compensation").get(FILLED, []), best.get(WARM, []))
    return found


def _main(best: Mapping[str, Sequence[Record]], dense: Mapping[str, Sequence[Record]]) -> list[Claim]:
    found = []
    for method, end, level in ((WARM, "frozen", 0.97), (TUNED, "tuned", 1.0)):
        if not (group := best.get(method)):
            continue
        kept = f"25% active: {method} keeps more than {level:.2f} of the best dense target's accuracy"
        found.append(judge(f"policies.{end}.ratio", "ours", kept, over_runs(group, ratio), above=level))
        off = over_runs(group, lambda r: abs(r["activity"] - 0.25))
        found.append(judge(f"policies.{end}.activity", "ours", f"{method}: activity within a point of 25%", off,
                           below=0.01))  # fmt: skip
        spent = over_runs(group, lambda r: r["compute"])
        found.append(
            judge(
                f"policies.{end}.compute",
                "ours",
                f"{method}: compute of at most 0.27, by the choice of rates",
                spent,
                below=0.27,
            )
        )
    if not (tuned := best.get(TUNED)):
        return found
    moved = over_runs(tuned, lambda r: r["accuracy_ratio"] - r["moved_control_ratio"])
    statement = "fine-tuned: beats the control that was distilled on moved pictures, too"
    found.append(judge("policies.tuned.moved", "ours", statement, moved, above=0.0))
    return found + _gain(
        "policies.tuned.dense", "fine-tuned: keeps more than the target fine-tuned for as long", _first(tuned),
        dense.get(DENSE, []),
    )  # fmt: skip


def _gain(id: str, statement: str, group: Sequence[Record], base: Sequence[Record]) -> list[Claim]:
    """The claim that runs keep more than those with the same seeds in `base`; none without pairs."""
    interval = gains(group, base, ratio)
    return [] if interval is None else [judge(id, "ours", statement, interval, above=0.0)]
