"""The trained targets that the other studies build on, with and without dropout (*partitions*, sections 4.1 and 5)."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from condcomp_lib import stats, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.coactivation import firing_patterns
from condcomp_lib.datasets import Split
from condcomp_lib.pretraining import scores_with_dropout
from condcomp_lib.published import Answer
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.targets import MLP, hidden_widths
from condcomp_lib.training import accuracy, obtain_target, target_spec

RECIPE = 1
KEPT = (0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the hidden neurons kept at random
# (data set, architecture, pretraining, least keep probability where it is random)
Kind = tuple[str, str, str, float | None]
KINDS: dict[str, tuple[Kind, ...]] = {
    "quick": (("digits", "2x64", "none", None), ("digits", "2x64", "dropout-uniform", 0.3)),
    "paper": (
        ("svhn", "2x200", "none", None),
        ("mnist", "2x400", "none", None),
        ("svhn", "3x800", "none", None),
        ("svhn", "3x800", "dropout-0.5", None),
        ("svhn", "3x800", "dropout-uniform", 0.1),
        ("svhn", "3x800", "dropout-uniform", 0.3),
        ("svhn", "3x800", "dropout-uniform", 0.5),
    ),
}
SEEDS = 3
# Learning rates without dropout chosen by the validation accuracy of seed 0 after 12 epochs: among 0.001 and 0.0005 for
# MNIST (500 units), among 0.001, 0.0005, 0.0003 and 0.0002 for SVHN (2x200); with dropout after 5 epochs of 3x800 and
# keep ~ U[0.1, 1]: 73.5% at 0.00025, 73.0% at 0.0005, 69.8% at 0.001. The middle one was taken.
TRAINING: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 40, "learning_rate": 1e-3},
    "mnist": {"epochs": 20, "learning_rate": 1e-3},
    "svhn": {"epochs": 12, "learning_rate": 5e-4},
}
DROPOUT_TRAINING: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 40, "learning_rate": 1e-3},
    "svhn": {"epochs": 24, "learning_rate": 5e-4},
}
NO_EXTRA = "trained without the 531,131 extra digits that the paper seems to have used"


def specs(profile: str) -> list[RunSpec]:
    """One run per kind of target and seed."""
    found = []
    for dataset, architecture, pretraining, eps in KINDS[profile]:
        for seed in range(SEEDS):
            settings = {
                "dataset": dataset,
                "architecture": architecture,
                "pretraining": pretraining,
                "dropout_eps": eps,
                "split": "test",
                "target_seed": seed,
            }
            found.append(RunSpec("targets", RECIPE, {**settings, "target": target_of(settings).name}))
    return found


def target_of(settings: Mapping[str, Any]) -> RunSpec:
    """The spec of the target that a run with these settings builds on; "target_training" says how it is trained where
    that is not as usual."""
    dataset, pretraining = settings["dataset"], settings["pretraining"]
    usual = TRAINING if pretraining == "none" else DROPOUT_TRAINING
    training = settings["target_training"] if "target_training" in settings else usual[dataset]
    return target_spec(
        dataset, settings["architecture"], target_seed=settings["target_seed"],
        pretraining=pretraining, eps=settings.get("dropout_eps"), **training,
    )  # fmt: skip


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train (or fetch) the target; measure it in full on the test split, and with neurons dropped at random."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    target, trained = obtain_target(target_of(settings), data, artefacts)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(settings["target_seed"])
    accuracies = [dropped_accuracy(target, data.test, keep, generator) for keep in KEPT]
    active = firing_rates(target, data.test)
    result: dict[str, Any] = {
        "accuracy": accuracies[-1],
        "valid_accuracy": trained.result["valid_accuracy"],
        "epochs": trained.result["epochs"],
        "best_epoch": trained.result["best_epoch"],
        "learning_curve": trained.result["learning_curve"],
        "firing": float(np.concatenate(active).mean()),
        "firing_by_layer": [float(rates.mean()) for rates in active],
        "kept": list(KEPT),
        "dropped_ratio": [accuracy / accuracies[-1] for accuracy in accuracies],
    }
    source = {"note": data.note, "checksum": data.checksum}
    return Outcome(result, None, source, {"target": trained.cite()}, time.perf_counter() - started)


def dropped_accuracy(target: MLP, split: Split, keep: float, generator: torch.Generator) -> float:
    """Accuracy on `split` when every hidden neuron is kept with probability `keep`, kept ones divided by it."""
    return accuracy(lambda x: scores_with_dropout(target, x, keep, generator), split)


def firing_rates(target: MLP, split: Split) -> list[np.ndarray]:
    """For each hidden layer, the share of examples on which each neuron is above zero (float64, neurons)."""
    counts = firing_patterns(target, torch.from_numpy(split.x)).sum(0).double()
    return [rates.numpy() for rates in (counts / len(split)).split(list(target.hidden))]


def by_kind(records: Sequence[Record]) -> dict[Kind, list[Record]]:
    """The records of each kind of target, in the run table's order."""
    groups: dict[Kind, list[Record]] = {}
    for record in records:
        settings = record.spec.settings
        kind = (settings["dataset"], settings["architecture"], settings["pretraining"], settings["dropout_eps"])
        groups.setdefault(kind, []).append(record)
    return groups


def label(pretraining: str, eps: float | None) -> str:
    """How a kind of pretraining is called in tables and figures.

    >>> label("dropout-uniform", 0.1)
    'dropout, keep ~ U[0.1, 1]'
    """
    rate = "drop" if pretraining.endswith("literal") else "keep"
    each = {"example": " for each example", "layer": " for each layer"}.get(pretraining.rpartition("-")[2], "")
    known = {
        "none": "no dropout",
        "dropout-0.5": "dropout, keep 0.5",
        "flow": "class-flow penalty",
        "l1": "L1 on activations",
        "hoyer": "Hoyer on activations",
    }
    return known.get(pretraining, f"dropout, {rate} ~ U[{eps}, 1]{each}")


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The table of targets: one row per kind, every number an interquartile mean with its interval over seeds."""
    rows = []
    for (dataset, architecture, pretraining, eps), group in by_kind(records).items():
        quarter = KEPT.index(0.25)
        rows.append(
            {
                "data set": dataset,
                "files": files(group),
                "architecture": architecture,
                "pretraining": label(pretraining, eps),
                "seeds": len(group),
                "epochs": group[0].result["epochs"],
                "test accuracy": _interval(group, "accuracy"),
                "validation accuracy": _interval(group, "valid_accuracy"),
                "neurons that fire": _interval(group, "firing"),
                "ratio, random 25%": stats.interval([r.result["dropped_ratio"][quarter] for r in group]),
                "minutes a run": float(np.mean([r.provenance["uses"]["target"]["seconds"] for r in group]) / 60),
            }
        )
    return rows


def files(group: Sequence[Record]) -> str:
    """Where the data of these runs come from; all of it, should copies be mixed."""
    return " and ".join(sorted({record.provenance["data_note"] for record in group}))


def _interval(group: Sequence[Record], field: str) -> stats.Interval:
    return stats.interval([record.result[field] for record in group])


def curves(records: Sequence[Record], field: str = "learning_curve") -> dict[str, np.ndarray]:
    """Validation accuracy after each epoch (or another list, by `field`), runs x points, for each way to train the
    largest network of the run table."""
    groups = by_kind(records)
    largest = max((architecture for _, architecture, _, _ in groups), key=lambda name: sum(hidden_widths(name)))
    return {
        label(pretraining, eps): np.array([record.result[field] for record in group])
        for (_, architecture, pretraining, eps), group in groups.items()
        if architecture == largest
    }


def answers(records: Sequence[Record]) -> list[Answer]:
    """This study's numbers beside published ids: the target of section 5.2, for each least keep probability."""
    groups = by_kind(records)
    found = [
        (eps, stats.interval([100 * record.result["valid_accuracy"] for record in group]))
        for (_, architecture, pretraining, eps), group in groups.items()
        if (architecture, pretraining) == ("3x800", "dropout-uniform")
    ]
    if not found:
        return []
    others = ", ".join(f"{ours.format(1)} with {eps}" for eps, ours in found[1:])
    note = f"keep ~ U[{found[0][0]}, 1], {NO_EXTRA}; {others}"
    place = {"notebook": "01_partitioning", "figure": "targets_table"}
    return [Answer("Ps52.01", found[0][1], "validation_accuracy_percent", note, **place)]


def claims(records: Sequence[Record]) -> list[Claim]:
    """The paper's claims on dropout at random rates, and the level that targets without dropout must reach."""
    groups = by_kind(records)
    found = []
    for (dataset, architecture, pretraining, eps), group in groups.items():
        base = groups.get((dataset, architecture, "none", None))
        if (architecture, pretraining) == ("3x800", "none"):
            statement = "3x800 on SVHN, no dropout: at least 87% of held-out digits"
            found.append(judge("targets.level", "ours", statement, _interval(group, "accuracy"), above=0.87))
        if pretraining != "dropout-uniform" or base is None:
            continue
        epochs = f"{group[0].result['epochs']} epochs, {base[0].result['epochs']} without"
        net = f"{architecture} on {dataset}, keep ~ U[{eps}, 1] ({epochs})"
        for end, what, source, difference in (
            ("accuracy", "the target gets more accurate than without dropout", "Pt2.09", _gains(group, base)),
            ("robust", "a random quarter of its neurons keeps more of its accuracy than without dropout",
             "partitions, 4.1", _gains(group, base, KEPT.index(0.25))),
        ):  # fmt: skip
            if (dataset, end) == (
                "digits",
                "accuracy",
            ) or not difference:  # 360 digits are too few for such differences
                continue
            id = f"targets.{end}.{dataset}.{eps}"
            found.append(judge(id, source, f"{net}: {what}", stats.interval(difference), above=0.0))
    return found


def _gains(group: Sequence[Record], base: Sequence[Record], kept: int | None = None) -> list[float]:
    """Test accuracy (or the ratio at the share number `kept`) of each record less that of the same seed in `base`."""

    def by_seed(records: Sequence[Record]) -> dict[int, float]:
        return {
            record.spec.settings["target_seed"]: (
                record.result["accuracy"] if kept is None else record.result["dropped_ratio"][kept]
            )
            for record in records
        }

    ours, theirs = by_seed(group), by_seed(base)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 01 that are made from this study."""
    return dict.fromkeys(("targets_curves", "targets_table"), records)


STUDY = studies.Study(
    name="targets",
    title="Targets with and without dropout",
    notebook="01_partitioning",
    specs=specs,
    compute=compute,
    answers=answers,
    claims=claims,
    promises=promises,
    audited=("accuracy", "valid_accuracy", "firing", "dropped_ratio"),
)
