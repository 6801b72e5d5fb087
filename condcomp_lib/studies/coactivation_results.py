"""From records of networks' coactivation to tables, figure data and claims."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from condcomp_lib import published, stats
from condcomp_lib.claims import Claim, judge
from condcomp_lib.coactivation import LEVEL, block_means
from condcomp_lib.published import Answer
from condcomp_lib.runs import Record
from condcomp_lib.studies.targets import NO_EXTRA

PLAIN, FLOW, PRODUCT = "plain", "flow, root", "flow, product"  # all three with class-balanced minibatches
SHOWN = {"mean": "mean", "gini": "Gini", "above": "pairs above 0.1", "lift": "over independent",
         "partners": "partners", "modularity": "modularity"}  # fmt: skip
LEVELS = (("2x200", "Ps55.02"), ("2x500", "Ps55.05"))  # accuracies published for networks with the penalty


def by_network(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each architecture and way to train it, in the run table's order."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        settings = record.spec.settings
        found.setdefault((settings["architecture"], settings["network"]), []).append(record)
    return found


def over(group: Sequence[Record], value: Callable[[Mapping[str, Any]], float]) -> stats.Interval:
    """`value` of each record's result with its interval over target seeds."""
    return stats.interval([value(record.result) for record in group])


def gains(group: Sequence[Record], base: Sequence[Record], value: Callable[[Mapping[str, Any]], float]) -> list[float]:
    """`value` of each run less that of the same seed in `base`."""
    theirs = {record.spec.settings["target_seed"]: value(record.result) for record in base}
    seeds = [(record.spec.settings["target_seed"], value(record.result)) for record in group]
    return [own - theirs[seed] for seed, own in seeds if seed in theirs]


def measure(name: str) -> Callable[[Mapping[str, Any]], float]:
    """What reads a measure off a result."""
    return lambda result: result["measures"][name]


def share(result: Mapping[str, Any]) -> float:
    """The penalty's mean share of the loss over the first epoch."""
    return result["penalty_share"][0]


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per network: accuracy, how its neurons fire together, and what partitions explain of it."""
    rows = []
    for (architecture, name), group in by_network(records).items():
        row: dict[str, Any] = {"network": f"{architecture}, {name}", "seeds": len(group)}
        row["test accuracy"] = over(group, lambda r: r["accuracy"])
        row["neurons that fire"] = over(group, measure("firing"))
        row |= {said: over(group, measure(field)) for field, said in SHOWN.items()}
        rows.append(row)
    return rows


def split_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per network: how much of the coactivation, and of what is beyond firing rates, three splits explain."""
    rows = []
    for (architecture, name), group in by_network(records).items():
        row: dict[str, Any] = {"network": f"{architecture}, {name}"}
        for end, said in (("", ""), (", beyond", ", beyond rates")):
            for split in ("coactivation", "rates", "random"):
                found = [record.result["explained"][f"{split}{end}"] for record in group]
                row[f"by {split}{said}" if split != "random" else f"random{said}"] = stats.interval(found)
        rows.append(row)
    return rows


def flow_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per network with the penalty: its share of the loss, and what it changes beside plain training."""
    groups, rows = by_network(records), []
    for (architecture, name), group in groups.items():
        base = groups.get((architecture, PLAIN))
        if "penalty_share" not in group[0].result or name not in (FLOW, PRODUCT) or base is None:
            continue
        if not gains(group, base, lambda r: r["valid_accuracy"]):
            continue  # no seed of both is there yet
        row = {"network": f"{architecture}, {name}", "share of the loss, first epoch": over(group, share)}
        row["validation accuracy"] = over(group, lambda r: r["valid_accuracy"])
        for said, value in (("accuracy", lambda r: r["valid_accuracy"]), ("mean", measure("mean")),
                            ("pairs above 0.1", measure("above")), ("Gini", measure("gini")),
                            ("over independent", measure("lift"))):  # fmt: skip
            row[f"{said}: less plain"] = stats.interval(gains(group, base, value))
        rows.append(row)
    return rows


def matrices(record: Record, names: Sequence[str], most: int = 200) -> dict[str, np.ndarray]:
    """The stored matrices of these names, coactivation as numbers from 0 to 1, in at most `most` blocks a side."""
    arrays = record.arrays()
    found = {}
    for name in (name for name in names if name in arrays):
        values = arrays[name] / 255 if arrays[name].dtype == np.uint8 else arrays[name].astype(float)
        found[name] = block_means(torch.from_numpy(values), most).numpy()
    return found


def first(records: Sequence[Record], architecture: str, network: str) -> Record:
    """The run of a network's first target seed, which keeps its matrices."""
    return next(r for r in by_network(records)[architecture, network] if r.spec.settings["target_seed"] == 0)


def history(record: Record) -> list[tuple[int, float, float]]:
    """Epoch, validation accuracy and mean coactivation of a run's snapshots."""
    curve = record.result["learning_curve"]
    return [(then["epoch"], curve[then["epoch"] - 1], then["mean"]) for then in record.result["on_the_way"]]


def answers(records: Sequence[Record]) -> list[Answer]:
    """Section 5.5's accuracies beside networks trained with the paper's own form of the penalty, the product."""
    groups, place = by_network(records), {"notebook": "04_coactivation", "figure": "coactivation_flow_table"}
    found = []
    for id, architecture, epoch in (
        ("Ps55.02", "2x200", None), ("Ps55.03", "2x500", 4), ("Ps55.04", "2x500", 8), ("Ps55.05", "2x500", None),
    ):  # fmt: skip
        group, root = groups.get((architecture, PRODUCT)), groups.get((architecture, FLOW))
        if not group or not root:
            continue

        def percent(result: Mapping[str, Any], epoch: int | None = epoch) -> float:
            return 100 * (result["valid_accuracy"] if epoch is None else result["learning_curve"][epoch - 1])

        when = "best epoch" if epoch is None else f"epoch {epoch}"
        note = f"product form, {when} of 57,257 examples (there 6,400); root form: {over(root, percent).format(1)}; "
        note += NO_EXTRA
        found.append(Answer(id, over(group, percent), "validation_accuracy_percent", note, **place))
    return found


def claims(records: Sequence[Record]) -> list[Claim]:
    """What the papers say of coactivation under dropout and under the class-flow penalty."""
    groups = by_network(records)
    return [*_dropout_claims(groups), *_flow_claims(groups)]


def _dropout_claims(groups: Mapping[tuple[str, str], Sequence[Record]]) -> list[Claim]:
    found = []
    for (architecture, name), group in groups.items():
        base = groups.get((architecture, "no dropout" if architecture == "3x800" else PLAIN))
        if not name.startswith("dropout") or base is None:
            continue
        end = f"{architecture}.{group[0].spec.settings['pretraining']}"
        lower = stats.interval(gains(group, base, measure("mean")))
        epochs = f"{group[0].result['epochs']} epochs, {base[0].result['epochs']} without"
        statement = f"{architecture} on svhn, {name} ({epochs}): mean coactivation is lower than without dropout"
        found.append(judge(f"coactivation.mean.{end}", "partitions, 5.4", statement, lower, below=0.0))
        most = over(group, measure("partners"))
        statement = f"{architecture} on svhn, {name}: a neuron still fires with more than half of the others (at least "
        statement += "every tenth time that it fires, our reading)"
        found.append(judge(f"coactivation.partners.{end}", "partitions, 5.4", statement, most, above=0.5))
    return found


def _flow_claims(groups: Mapping[tuple[str, str], Sequence[Record]]) -> list[Claim]:
    found = []
    for (architecture, name), group in groups.items():
        base = groups.get((architecture, PLAIN))
        if name not in (FLOW, PRODUCT) or base is None:
            continue
        dataset = group[0].spec.settings["dataset"]
        end, net = f"{architecture}.{group[0].spec.settings['target_training']['penalty']['form']}", \
            f"{architecture} on {dataset}, {name}"  # fmt: skip
        taken = over(group, share)
        for end_of, said, bound in (
            ("least", "more than 1%", {"above": 0.01}),
            ("most", "less than half", {"below": 0.5}),
        ):
            statement = f"{net}: the penalty, chosen by hand, takes {said} of the loss in the first epoch"
            found.append(judge(f"flow.share.{end_of}.{end}", "partitions, 4.2", statement, taken, **bound))
        for field, said, bound in (
            ("mean", "mean coactivation is lower than with plain training", {"below": 0.0}),
            ("above", "fewer pairs fire together on a tenth of the examples", {"below": 0.0}),
            ("gini", "coactivation is spread less evenly over pairs", {"above": 0.0}),
            ("lift", "pairs fire together more often, beside what their rates give", {"above": 0.0}),
            ("modularity", "neurons form clearer groups", {"above": 0.0}),
        ):
            change = stats.interval(gains(group, base, measure(field)))
            found.append(judge(f"flow.{field}.{end}", "partitions, 5.5", f"{net}: {said}", change, **bound))
        found += _level_claims(group, architecture, net, end)
    return found + _width_claims(groups)


def _level_claims(group: Sequence[Record], architecture: str, net: str, end: str) -> list[Claim]:
    """The published accuracies, after fewer examples than the paper's 16 epochs of 200 minibatches of 32 had and in the
    best epoch."""
    rows, found = published.load(), []
    for own, id in LEVELS:
        if own == architecture:
            level = rows[id].value or 0.0
            first = over(group, lambda r: 100 * r["learning_curve"][0])
            best = over(group, lambda r: 100 * r["valid_accuracy"])
            for when, said, accuracy in (
                ("first", "after one epoch (57,257 examples)", first), ("best", "in the best of 12 epochs", best),
            ):  # fmt: skip
                statement = f"{net}, {said}: validation accuracy (%) above the published {level}"
                found.append(judge(f"flow.{id}.{when}.{end}", id, statement, accuracy, above=level))
    return found


def _width_claims(groups: Mapping[tuple[str, str], Sequence[Record]]) -> list[Claim]:
    """That the penalty needs wider networks: it costs the narrow one more accuracy."""
    found = []
    for name in (FLOW, PRODUCT):
        narrow, wide = (
            gains(groups.get((architecture, PLAIN), []), groups.get((architecture, name), []),
                  lambda r: r["valid_accuracy"])
            for architecture in ("2x200", "2x500")
        )  # fmt: skip
        if narrow and len(narrow) == len(wide):
            statement = f"{name}, its coefficient chosen on 2x200: it costs 2x200 more validation accuracy than 2x500"
            more = stats.interval([a - b for a, b in zip(narrow, wide, strict=True)])
            found.append(judge(f"flow.width.{name.split()[-1]}", "partitions, 5.5", statement, more, above=0.0))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 04 that are made from this study."""
    tables = ("coactivation_table", "coactivation_split_table", "coactivation_flow_table")
    names = [*tables, "coactivation_training", "coactivation_orders", "coactivation_ingoing"]
    if any(record.spec.settings["architecture"] == "3x800" for record in records):
        names += ["coactivation_dropout"]
    return dict.fromkeys(names, records)


def findings(records: Sequence[Record]) -> str:
    """What the runs say, as a Markdown list with its numbers filled in."""
    lines = []
    for (architecture, name), group in by_network(records).items():
        firing, mean, lift, above = (
            over(group, measure(field)).format(2) for field in ("firing", "mean", "lift", "above")
        )
        parts = f"{firing} of the neurons fire, pairs together {mean}, {lift} times what independence gives; "
        parts += f"{above} of the pairs above {LEVEL}"
        lines.append(f"- **{architecture}, {name}**: {parts}.")
    return "\n".join(lines)
