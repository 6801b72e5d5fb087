"""Settings of the targets in Tables 1 and 2 of *partitions*, searched as there: a declared space, sampled within a
budget, every run kept, and a rule that picks one setting for all cells."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from condcomp_lib import studies
from condcomp_lib.claims import Claim
from condcomp_lib.policy_training import policy_plan
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import targets
from condcomp_lib.studies.joint_runs import ESTIMATORS, joint
from condcomp_lib.studies.lazy_runs import deciding, measure
from condcomp_lib.studies.partitioning import GROUPS, TAU
from condcomp_lib.studies.policy_results import no_answers
from condcomp_lib.training import obtain_target

RECIPE = 1
# The space of *partitions*, section 5. The optimiser is not named there; ours is SGD with Nesterov momentum 0.9.
DEPTHS, WIDTHS, RATES = (2, 3, 4), (200, 400, 800), (0.05, 0.005, 0.001)
OPTIMISER = "momentum"
SAMPLED = 6  # settings of the space, drawn once; the same for every pretraining
DRAW = 2017
# Of the least keep probabilities 0.1, 0.3 and 0.5 that study `targets` tried, the one with the best validation
# accuracy.
EPS = 0.5
ROWS: dict[str, float | None] = {"none": None, "dropout-0.5": None, "dropout-uniform": EPS}
TRAINING: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {"none": {"batch": 32, "epochs": 10}, "dropout": {"batch": 32, "epochs": 15}},
    "svhn": {"none": {"epochs": 4}, "dropout": {"epochs": 5}},
}
POLICY: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 5, "learning_rate": 5e-3},
    "svhn": {"epochs": 3, "epoch_examples": 20_096, "learning_rate": 1e-3},
}
SEED = 100  # of the search; the tables' seeds are 0 to 2
TOP = 5  # runs that the paper's tables report of each cell


def space() -> list[tuple[str, float]]:
    """Architectures and learning rates of the declared space.

    >>> len(space())
    27
    """
    return [(f"{depth}x{width}", rate) for depth, width, rate in itertools.product(DEPTHS, WIDTHS, RATES)]


def sampled(profile: str) -> list[tuple[str, float]]:
    """The settings that are tried, drawn from the space without repetition; on digits two small ones."""
    if profile == "quick":
        return [("2x64", 0.05), ("2x32", 0.005)]
    return random.Random(DRAW).sample(space(), SAMPLED)


def base(dataset: str, pretraining: str, architecture: str, rate: float, training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that name a target of the tables and how its lazy networks are built and judged."""
    dropout = pretraining.startswith("dropout")
    return {
        "dataset": dataset,
        "architecture": architecture,
        "pretraining": pretraining,
        "dropout_eps": ROWS.get(pretraining),
        "target_training": {"optimiser": OPTIMISER, "learning_rate": rate, **training},
        "partitioner": "gumbel",
        "groups": GROUPS,
        "scope": "network",
        "rescale": "activity" if dropout else "none",
        "decision": "calibrated",
        "decision_draws": 1,
        "blind_draws": 1,
        "activity_asked": TAU,
        "split": "test",
    }


def specs(profile: str) -> list[RunSpec]:
    """One run per pretraining, setting and estimator, all of one seed."""
    dataset = "digits" if profile == "quick" else "svhn"
    found = []
    for (architecture, rate), pretraining, estimator in itertools.product(sampled(profile), ROWS, ESTIMATORS):
        training = TRAINING[dataset]["dropout" if pretraining.startswith("dropout") else "none"]
        settings = base(dataset, pretraining, architecture, rate, training)
        seeds = dict.fromkeys(("target_seed", "partition_seed", "policy_seed"), SEED)
        settings |= seeds | policy_plan(
            tau=TAU, lambda_s=LAMBDA[settings["rescale"]], **ESTIMATORS[estimator], **POLICY[dataset]
        )
        settings["target"] = targets.target_of(settings).name
        found.append(RunSpec("pretraining-search", RECIPE, settings))
    return found


# As in study `partitioning`: those under which a random partition's policy comes nearest to the paper's 35%.
LAMBDA = {"activity": 0.5, "none": 0.37}


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train the target, then partition and policy together; measure the lazy network at the asked activity."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    target, trained = obtain_target(targets.target_of(settings), data, artefacts)
    lazy, curve = joint(settings, target, data)
    result = measure(deciding(lazy, settings, data), settings, data, trained)
    result.pop("multiply_adds")
    result |= {"accuracy_curve": curve.accuracy, "activity_curve": curve.activity, "epochs": len(curve.accuracy)}
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, {"target": trained.cite()})


def setting_of(record: Record) -> tuple[str, float]:
    """Architecture and learning rate of the run's target."""
    return record.spec.settings["architecture"], record.spec.settings["target_training"]["learning_rate"]


def cell_of(record: Record) -> tuple[str, str]:
    """Pretraining and estimator: the run's cell of the tables."""
    return record.spec.settings["pretraining"], record.spec.settings["estimator"]


def valid_ratio(result: Mapping[str, Any]) -> float:
    """Validation accuracy over the target's own, what the paper reports."""
    return result["valid_accuracy"] / result["target_valid_accuracy"]


def chosen(records: Sequence[Record]) -> tuple[str, float]:
    """The setting whose lazy networks have the highest validation accuracy, a mean over the cells, all held to the same
    activity: the rule, fixed before the search."""
    scores: dict[tuple[str, float], list[float]] = {}
    for record in records:
        scores.setdefault(setting_of(record), []).append(record.result["valid_accuracy"])
    return max(scores, key=lambda setting: float(np.mean(scores[setting])))


def top(records: Sequence[Record]) -> dict[tuple[str, str], tuple[float, float, int]]:
    """As the paper reports: mean and standard deviation of the ratios of each cell's best runs, and how many they
    are."""
    found = {}
    for cell in dict.fromkeys(map(cell_of, records)):
        group = [record for record in records if cell_of(record) == cell]
        best = sorted(group, key=lambda record: -record.result["valid_accuracy"])[:TOP]
        ratios = [valid_ratio(record.result) for record in best]
        found[cell] = (float(np.mean(ratios)), float(np.std(ratios)), len(ratios))
    return found


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every setting that was tried, the best first: means over pretrainings and estimators."""
    rows = []
    for setting in dict.fromkeys(map(setting_of, records)):
        group = [record.result for record in records if setting_of(record) == setting]
        rows.append(
            {
                "architecture": setting[0],
                "learning rate": f"{setting[1]:g}",
                "runs": len(group),
                "target, validation": float(np.mean([r["target_valid_accuracy"] for r in group])),
                "lazy at 25%, validation": float(np.mean([r["valid_accuracy"] for r in group])),
                "ratio": float(np.mean([valid_ratio(r) for r in group])),
            }
        )
    return sorted(rows, key=lambda row: -row["lazy at 25%, validation"])


def points(records: Sequence[Record]) -> dict[str, dict[str, np.ndarray]]:
    """For each cell (its name) the target's and the lazy network's validation accuracy of every run."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for record in records:
        pretraining, estimator = cell_of(record)
        name = f"{targets.label(pretraining, ROWS[pretraining])}, {'DPG' if estimator == 'dpg' else 'REINFORCE'}"
        row = found.setdefault(name, {"target": np.empty(0), "lazy": np.empty(0)})
        row["target"] = np.append(row["target"], record.result["target_valid_accuracy"])
        row["lazy"] = np.append(row["lazy"], record.result["valid_accuracy"])
    return found


def claims(records: Sequence[Record]) -> list[Claim]:  # noqa: ARG001 (a search claims nothing)
    """None: the search only picks a setting."""
    return []


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 03 that are made from this study."""
    return dict.fromkeys(("pretraining_search", "pretraining_search_table"), records)


STUDY = studies.Study(
    name="pretraining-search",
    title="Settings of the pretrained targets",
    notebook="03_pretraining",
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=claims,
    promises=promises,
    audited=("target_accuracy", "accuracy", "activity"),
)
