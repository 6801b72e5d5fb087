"""From records of pretrained targets made lazy to the tables of *partitions*, claims and figure data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from condcomp_lib import published, stats
from condcomp_lib.claims import Claim, judge
from condcomp_lib.published import Answer
from condcomp_lib.runs import Record
from condcomp_lib.studies import targets
from condcomp_lib.studies.lazy_results import gains, over_controls, over_runs
from condcomp_lib.studies.pretraining_search import ROWS, valid_ratio

METHODS = {"reinforce": "REINFORCE", "dpg": "DPG", "best policy": "best policy"}
# The paper's cells: pretraining and method, the ids of their ratio and of their validation accuracy.
CELLS = {
    ("none", "reinforce"): ("Pt1.01", "Pt2.01"), ("none", "dpg"): ("Pt1.02", "Pt2.02"),
    ("dropout-0.5", "reinforce"): ("Pt1.03", "Pt2.04"), ("dropout-0.5", "dpg"): ("Pt1.04", "Pt2.05"),
    ("dropout-uniform", "reinforce"): ("Pt1.05", "Pt2.07"), ("dropout-uniform", "dpg"): ("Pt1.06", "Pt2.08"),
}  # fmt: skip
TARGETS = {"none": "Pt2.03", "dropout-0.5": "Pt2.06", "dropout-uniform": "Pt2.09"}
SAID = {"sampled": "masks sampled", "matched": "held to 25%"}
Value = Callable[[Mapping[str, Any]], float]


def published_ratio(result: Mapping[str, Any]) -> float:
    """Validation accuracy over the target's with masks sampled, as the paper reports it."""
    return result["published"]["valid_accuracy"] / result["target_valid_accuracy"]


def matched_ratio(result: Mapping[str, Any]) -> float:
    """Test accuracy over the target's, held to the asked activity."""
    return result["accuracy_ratio"]


def cells(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """The records of each pretraining and method, in the run table's order."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        settings = record.spec.settings
        found.setdefault(settings["pretraining"], {}).setdefault(settings["method"], []).append(record)
    return {row: found[row] for row in dict.fromkeys([*ROWS, *found]) if row in found}


def label(row: str) -> str:
    """A row of the tables in words."""
    return targets.label(row, ROWS.get(row))


def table_1(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Table 1 as published, masks sampled, beside the paper's numbers, at the activity that each cell came to; and the
    same held to the asked activity."""
    rows, found = published.load(), []
    for row, groups in cells(records).items():
        for method in ("reinforce", "dpg"):
            if method not in groups:
                continue
            id = CELLS.get((row, method), ("", ""))[0]
            theirs = {"published": rows[id].format() if id else "not tried"}
            found.append(
                {
                    "pretraining": label(row),
                    "method": METHODS[method],
                    **(theirs if on_svhn(records) else {}),
                    "ours": over_runs(groups[method], published_ratio),
                    "runs": len(groups[method]),
                    "active": over_runs(groups[method], lambda r: r["published"]["valid_activity"]),
                    "ours at 25%": over_runs(groups[method], valid_ratio),
                }
            )
    return found


def table_2(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Table 2: validation accuracies in percent, masks sampled, beside the published ones and the target's."""
    rows, found, beside = published.load(), [], on_svhn(records)
    for row, groups in cells(records).items():
        line: dict[str, Any] = {"pretraining": label(row)}
        for method in ("reinforce", "dpg"):
            id = CELLS.get((row, method), ("", ""))[1]
            line |= {f"{METHODS[method]}, published": rows[id].format() if id else "not tried"} if beside else {}
            group = groups.get(method, [])
            line[METHODS[method]] = over_runs(group, _sampled_percent).format(1) if group else ""
        line |= {"target, published": rows[TARGETS[row]].format() if row in TARGETS else "not tried"} if beside else {}
        line["target"] = over_targets(groups, lambda r: 100 * r["target_valid_accuracy"]).format(1)
        found.append(line)
    return found


def on_svhn(records: Sequence[Record]) -> bool:
    """Whether these are runs on the paper's data: no published number stands beside others."""
    return all(record.spec.settings["dataset"] == "svhn" for record in records)


def _sampled_percent(result: Mapping[str, Any]) -> float:
    return 100 * result["published"]["valid_accuracy"]


def over_targets(groups: Mapping[str, Sequence[Record]], value: Value) -> stats.Interval:
    """A value of the targets, each counted once."""
    return stats.interval([value(record.result) for record in _each_target(groups)])


def matched_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every pretraining and method at 25% activity, on test data: ratio, accuracy, blind draw, compute and control."""
    found = []
    for row, groups in cells(records).items():
        for method, group in groups.items():
            control = over_controls(group, lambda r: r["control_ratio"])
            found.append(
                {
                    "pretraining": label(row),
                    "method": METHODS[method],
                    "runs": len(group),
                    "target accuracy": over_targets(groups, lambda r: r["target_accuracy"]),
                    "ratio": over_runs(group, matched_ratio),
                    "accuracy": over_runs(group, lambda r: r["accuracy"]),
                    "blind ratio": over_runs(group, lambda r: r["blind_ratio"]),
                    "active": over_runs(group, lambda r: r["activity"]),
                    "compute": over_runs(group, lambda r: r["compute"]),
                    "control ratio": control.format(3) if control else "",
                }
            )
    return found


def series(records: Sequence[Record], value: Value) -> dict[str, dict[str, np.ndarray]]:
    """For each pretraining and method the values of its runs."""
    return {
        label(row): {METHODS[m]: np.array([value(r.result) for r in group]) for m, group in groups.items()
                     if value is not published_ratio or "published" in group[0].result}
        for row, groups in cells(records).items()
    }  # fmt: skip


def published_points() -> dict[str, dict[str, float]]:
    """The paper's ratios by pretraining and method, where it has them."""
    rows = published.load()
    found: dict[str, dict[str, float]] = {}
    for (row, method), (id, _) in CELLS.items():
        if (value := rows[id].value) is not None:
            found.setdefault(label(row), {})[METHODS[method]] = value
    return found


def answers(records: Sequence[Record]) -> list[Answer]:
    """Every cell of Tables 1 and 2, the lost ones too, with masks sampled as there."""
    found, groups = [], cells(records)
    for (row, method), (ratio_id, accuracy_id) in CELLS.items():
        group = groups.get(row, {}).get(method, [])
        if not group:
            continue
        active = over_runs(group, lambda r: 100 * r["published"]["valid_activity"]).format(0)
        held = over_runs(group, valid_ratio).format(3)
        note = f"{label(row)}, masks sampled at {active}% activity; held to 25%: ratio {held}; {targets.NO_EXTRA}"
        place = {"notebook": "03_pretraining", "figure": "pretraining_table1"}
        found.append(Answer(ratio_id, over_runs(group, published_ratio), "accuracy_ratio", note, **place))
        place["figure"] = "pretraining_table2"
        found.append(
            Answer(accuracy_id, over_runs(group, _sampled_percent), "validation_accuracy_percent", note, **place)
        )
    for row, id in TARGETS.items():
        if row in groups:
            ours = over_targets(groups[row], lambda r: 100 * r["target_valid_accuracy"])
            place = {"notebook": "03_pretraining", "figure": "pretraining_table2"}
            note = f"{label(row)}; {targets.NO_EXTRA}"
            found.append(Answer(id, ours, "validation_accuracy_percent", note, **place))
    return found


def claims(records: Sequence[Record]) -> list[Claim]:
    """What the paper finds in its tables, and what it expects of the class-flow penalty."""
    groups = cells(records)
    if len({record.spec.settings["target_seed"] for record in records}) < 2:
        return []  # one target says nothing about another
    net = f"{records[0].spec.settings['architecture']} on {records[0].spec.settings['dataset']}"
    random = groups["dropout-uniform"]
    found = []
    for other in ("none", "dropout-0.5"):
        gain = gains(_each_target(random), _each_target(groups[other]), lambda r: r["target_accuracy"])
        if gain is not None:
            epochs = "twice the epochs" if other == "none" else "as many epochs"
            statement = f"{net}: dropout at random rates ({epochs}) makes the target itself more accurate on test data "
            statement += f"than {label(other)}"
            found.append(judge(f"pretraining.target.{other}", "partitions, 4.1", statement, gain, above=0.0))
    for way, value in (("sampled", published_ratio), ("matched", matched_ratio)):
        for row, method in (("dropout-uniform", "reinforce"), ("dropout-0.5", "dpg"), ("none", "dpg")):
            gain = gains(random.get("dpg", []), groups[row].get(method, []), value)
            if gain is not None:
                ours, theirs = _active(random["dpg"], way), _active(groups[row][method], way)
                statement = f"{net}, {SAID[way]}: random rates with DPG ({ours}) keep more than {label(row)} with "
                statement += f"{METHODS[method]} ({theirs})"
                id = f"pretraining.{way}.{row}.{method}"
                found.append(judge(id, "Pt1.06", statement, gain, above=0.0))
        for row in ("flow", "hoyer"):
            for method in ("reinforce", "dpg"):
                gain = gains(groups.get(row, {}).get(method, []), groups["none"].get(method, []), value)
                if gain is not None:
                    ours, theirs = _active(groups[row][method], way), _active(groups["none"][method], way)
                    statement = f"{net}, {SAID[way]}, {METHODS[method]}: {label(row)} ({ours}) keeps more than "
                    statement += f"{label('none')} ({theirs})"
                    id = f"pretraining.{way}.{row}.over-none.{method}"
                    found.append(judge(id, "partitions, 6" if row == "flow" else "ours", statement, gain, above=0.0))
    return found + _best_claims(groups, net)


def _active(group: Sequence[Record], way: str) -> str:
    """The share of neurons that runs evaluate, in words: a ratio means little without it."""
    active = over_runs(group, lambda r: 100 * (r["published"]["activity"] if way == "sampled" else r["activity"]))
    return f"{active.estimate:.0f}% active"


def _best_claims(groups: Mapping[str, Mapping[str, Sequence[Record]]], net: str) -> list[Claim]:
    """What pretraining is worth under the best policy."""
    base, found = groups["none"].get("best policy", []), []
    for row, methods in groups.items():
        gain = gains(methods.get("best policy", []), base, matched_ratio)
        if row != "none" and gain is not None:
            statement = f"{net}, 25% active, best policy: {label(row)} keeps more than {label('none')}"
            found.append(judge(f"pretraining.best.{row}", "partitions, 4", statement, gain, above=0.0))
    return found


def _each_target(groups: Mapping[str, Sequence[Record]]) -> list[Record]:
    """One record of each target."""
    found: dict[int, Record] = {}
    for record in (record for group in groups.values() for record in group):
        if record.spec.settings["policy_seed"] == 0:  # those that `gains` can pair across rows
            found.setdefault(record.spec.settings["target_seed"], record)
    return [found[seed] for seed in sorted(found)]


def findings(records: Sequence[Record]) -> str:
    """What the runs say, as a Markdown list with its numbers filled in."""
    lines = []
    for row, groups in cells(records).items():
        parts = []
        for method, group in groups.items():
            ratio = over_runs(group, matched_ratio).format(2)
            sampled = ""
            if "published" in group[0].result:
                sampled_ratio = over_runs(group, lambda r: r["published"]["accuracy_ratio"]).format(2)
                sampled = f" ({sampled_ratio} with masks sampled, {_active(group, 'sampled')})"
            parts.append(f"{METHODS[method]} {ratio}{sampled}")
        target = over_targets(groups, lambda r: r["target_accuracy"]).format(3)
        lines.append(f"- **{label(row)}**, target {target}; kept at 25% activity: {'; '.join(parts)}.")
    return "\n".join(lines)


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 03 that are made from this study."""
    names = ("pretraining_ratios", "pretraining_table1", "pretraining_table2", "pretraining_matched_table")
    return dict.fromkeys(names, records)
