"""From records of the split study to tables and figure data."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from condcomp_lib.runs import Record
from condcomp_lib.studies.lazy_results import SAMPLED, Kind, gains, kind_of, label, largest, over_runs

PUBLISHED_WAY, HELD, LED = "as published", "held to 25%", "led to 25%"
SHOWN = {  # what the figure of section 5.2's trajectory shows
    "ratio": "accuracy ratio",
    "activity": "activity (%)",
    "sd_of_activity_by_group": "s.d. of activity\nby group (%)",
    "sd_of_size": "s.d. of group sizes",
}
TRACKED = ("worth", "activity", "sd_of_activity_by_group", "sd_of_size")  # of every lazy epoch, as in section 5.2


def way_of(record: Record) -> str:
    """How the policy was trained and its masks decided: sampled as published, held to 25%, or led there in training."""
    if "controller" in record.spec.settings:
        return LED
    return PUBLISHED_WAY if record.spec.settings["decision"] == SAMPLED else HELD


def by_split(records: Sequence[Record]) -> dict[tuple[Kind, str, str], list[Record]]:
    """The records of each kind, way and partitioner."""
    groups: dict[tuple[Kind, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((kind_of(record), way_of(record), record.spec.settings["partitioner"]), []).append(record)
    return groups


def kinds(records: Sequence[Record]) -> list[Kind]:
    """The kinds of target in the run table's order."""
    return list(dict.fromkeys(kind_of(record) for record in records))


def of_kind(records: Sequence[Record], kind: Kind) -> dict[str, dict[str, list[Record]]]:
    """For each way the records of each partitioner, of one kind of target."""
    found: dict[str, dict[str, list[Record]]] = {PUBLISHED_WAY: {}, HELD: {}, LED: {}}
    for (own, way, partitioner), group in by_split(records).items():
        if own == kind:
            found[way][partitioner] = group
    return found


def summary(records: Sequence[Record], kind: Kind) -> list[dict[str, Any]]:
    """The table of splits of one kind of target: one row per partitioner, intervals over runs, resampled by target."""
    ways, rows = of_kind(records, kind), []
    for partitioner, group in ways[PUBLISHED_WAY].items():
        row: dict[str, Any] = {"partitioner": partitioner, "runs": len(group)}
        row["ratio, as published"] = over_runs(group, lambda r: r["accuracy_ratio"])
        row["its activity"] = over_runs(group, lambda r: r["activity"])
        for way in (HELD, LED):
            same = ways[way].get(partitioner, [])
            row[f"ratio, {way}"] = over_runs(same, lambda r: r["accuracy_ratio"]) if same else ""
            gain = gains(same, ways[way].get("random", []), lambda r: r["accuracy_ratio"])
            row[f"{way}: over random"] = gain if gain is not None and partitioner != "random" else ""
        if led := ways[LED].get(partitioner):
            row["runs, led"] = len(led)
            row["activity trained to, led"] = over_runs(led, lambda r: r["activity_curve"][-1])
            row["blind ratio, led"] = over_runs(led, lambda r: r["blind_ratio"])
            row["compute, led"] = over_runs(led, lambda r: r["compute"])
            row["control ratio, led"] = over_runs(led, lambda r: r["control_ratio"])
        rows.append(row)
    return rows


def across_kinds(records: Sequence[Record], partitioners: Sequence[str]) -> list[dict[str, Any]]:
    """The short table: for each kind of target, at 25% activity, what each of some partitioners keeps."""
    rows = []
    for kind in kinds(records):
        for way in (HELD, LED):
            if not (groups := of_kind(records, kind)[way]):
                continue
            row: dict[str, Any] = {"target": label(kind), "policy": way}
            for name in partitioners:
                row[name] = over_runs(groups[name], lambda r: r["accuracy_ratio"]) if name in groups else ""
            row["blind draw of the random split"] = over_runs(groups["random"], lambda r: r["blind_ratio"])
            row["control of the random split"] = over_runs(groups["random"], lambda r: r["control_ratio"])
            rows.append(row)
    return rows


def size_summary(records: Sequence[Record], kind: Kind) -> list[dict[str, Any]]:
    """The table of groups: their sizes, and how often the largest and the average one are evaluated, as published."""
    rows = []
    for partitioner, group in of_kind(records, kind)[PUBLISHED_WAY].items():
        rows.append(
            {
                "partitioner": partitioner,
                "s.d. of sizes": over_runs(group, lambda r: np.std(r["group_sizes"])).format(1),
                "largest group's share": over_runs(group, lambda r: largest(r)[0]),
                "largest group evaluated on": over_runs(group, lambda r: largest(r)[1]),
                "mean over groups": over_runs(group, lambda r: np.mean(r["group_firing"])),
                "s.d. over groups": over_runs(group, lambda r: np.std(r["group_firing"])),
            }
        )
    return rows


def ratios(records: Sequence[Record], kind: Kind) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """For each way and partitioner the accuracy ratios of the runs (lazy, blind, control) and their activity."""
    fields = {"lazy": "accuracy_ratio", "blind": "blind_ratio", "control": "control_ratio", "activity": "activity"}
    return {
        way: {
            partitioner: {name: np.array([r.result[field] for r in group]) for name, field in fields.items()}
            for partitioner, group in groups.items()
        }
        for way, groups in of_kind(records, kind).items()
    }


def trajectories(records: Sequence[Record], kind: Kind) -> dict[str, dict[str, np.ndarray]]:
    """For each partitioner that learns by trials, what is tracked of every lazy epoch (runs x trials); accuracies are
    shares of the target's, on validation data as in the paper. Empty for those that were not run on this kind."""
    names = dict.fromkeys(r.spec.settings["partitioner"] for r in records if "trials" in r.result)
    groups, found = of_kind(records, kind)[PUBLISHED_WAY], {}
    for name in names:
        group = groups.get(name, [])
        tracked = {
            field: np.array([[trial[field] for trial in r.result["trials"]] for r in group]) for field in TRACKED
        }
        full = np.array([r.result["target_valid_accuracy"] for r in group])
        found[name] = {**tracked, "ratio": tracked["worth"] / full[:, None] if group else tracked["worth"]}
    return found


def joint_curves(records: Sequence[Record], kind: Kind) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each Gumbel schedule the accuracy ratio and the activity after each epoch of joint training (runs x epochs),
    partitions and masks drawn."""
    found = {}
    for partitioner, group in of_kind(records, kind)[PUBLISHED_WAY].items():
        if "joint_accuracy_curve" in group[0].result:
            curve = [np.array(r.result["joint_accuracy_curve"]) / r.result["target_valid_accuracy"] for r in group]
            found[partitioner] = np.array(curve), np.array([r.result["joint_activity_curve"] for r in group])
    return found


def settled(records: Sequence[Record], kind: Kind) -> str:
    """How settled each Gumbel schedule's preferences are in the end, in words: the mean chance of the likeliest group,
    were the noise of full size."""
    groups = of_kind(records, kind)[PUBLISHED_WAY]
    shares = {name: over_runs(group, lambda r: r["settled"]).format(2) for name, group in groups.items()
              if "settled" in group[0].result}  # fmt: skip
    return "; ".join(f"{name} {share}" for name, share in shares.items())


def use_of_groups(records: Sequence[Record], kind: Kind) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each partitioner the share of the neurons that each group holds, and of the examples it is evaluated on
    (runs x groups), as published."""
    found = {}
    for partitioner, group in of_kind(records, kind)[PUBLISHED_WAY].items():
        sizes = np.array([r.result["group_sizes"] for r in group], dtype=float)
        rates = np.array([r.result["group_firing"] for r in group])
        found[partitioner] = (sizes / sizes.sum(1, keepdims=True), rates)
    return found


def tracked_at(group: Sequence[Record], epoch: int, field: str) -> Callable[[Mapping[str, Any]], float] | None:
    """What reads a tracked field at a lazy epoch (0: the random partition) off a result; None where it was not run."""
    if not group or "trials" not in group[0].result or len(group[0].result["trials"]) <= epoch:
        return None
    return lambda result: result["trials"][epoch][field]


def findings(records: Sequence[Record]) -> str:
    """What the runs say, as a Markdown list with its numbers filled in."""
    lines = []
    for kind in kinds(records):
        for way, groups in of_kind(records, kind).items():
            if not groups:
                continue
            scores = {name: over_runs(group, lambda r: r["accuracy_ratio"]) for name, group in groups.items()}
            ranked = sorted(scores, key=lambda name: -scores[name].estimate)
            best = "; ".join(f"{name} {scores[name].format(2)}" for name in ranked[:4] if name != "random")
            place = ranked.index("random") + 1
            lines.append(f"- **{label(kind)}, {way}**: {best}; random {scores['random'].format(2)}, number {place} of "
                         f"{len(ranked)}.")  # fmt: skip
    for way, groups in of_kind(records, kinds(records)[0]).items():
        if {"random", "ucb1", "gumbel", "contextual"} <= set(groups):
            lines.append(f"- Published: random < bandits < Gumbel <= contextual. **Here, {way}**: {_ordered(groups)}.")
    return "\n".join(lines)


def _ordered(groups: Mapping[str, Sequence[Record]]) -> str:
    """The partitioners of the published order from the lowest ratio to the highest, with their activity."""
    rows = []
    for name in ("random", "ucb1", "gumbel", "contextual"):
        ratio, active = (over_runs(groups[name], operator.itemgetter(field)).estimate
                         for field in ("accuracy_ratio", "activity"))  # fmt: skip
        rows.append((ratio, f"{name} {ratio:.3f} at {100 * active:.0f}% activity"))
    return " < ".join(text for _, text in sorted(rows))
