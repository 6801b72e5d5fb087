"""Policies on a target (*partitions*, section 3): ways to learn them, what holds activity, fronts, fine-tuning."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from condcomp_lib import studies
from condcomp_lib.datasets import Dataset, Split
from condcomp_lib.lazy import LazyNetwork, calibrated, compensated, decided_by
from condcomp_lib.oracle import Oracle
from condcomp_lib.policies import Budget, Policy, Pool, Sample
from condcomp_lib.policy_training import POLICY_RECIPE, SUPERVISED, obtain_policy, policy_plan
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import policy_results, targets
from condcomp_lib.studies.lazy_results import Kind
from condcomp_lib.studies.lazy_runs import control_of, measure, measured
from condcomp_lib.studies.partitioning import TAU
from condcomp_lib.studies.partitioning_ladder import split_of
from condcomp_lib.studies.policy_results import DENSE, FILLED, TUNED, WARM
from condcomp_lib.targets import MLP, hidden_widths, multiply_adds
from condcomp_lib.training import control_width, obtain_control, obtain_target

RECIPE = 1
# The pretraining whose targets have the best test accuracy among those trained.
BEST: Kind = ("svhn", "3x800", "dropout-uniform", 0.5, "none")
BASE: dict[str, tuple[Kind, int]] = {"quick": (("digits", "2x64", "dropout-uniform", 0.3, "none"), 16),
                                     "paper": (BEST, 100)}  # fmt: skip
POOL = {"digits": 0, "svhn": 4}  # pixels a side that the first gate's picture is averaged over; 0: none
# How an activity is spread over the layers, as multiples of it: by where the target's neurons fire, 43%, 11% and 21% of
# them, and no more of the first layer than compute allows (its weights are two thirds of the target's).
SPREAD = {2: (1.2, 0.8), 3: (1.4, 0.64, 0.96)}
TRAINING: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 8, "learning_rate": 5e-3},
    "svhn": {"epochs": 3, "learning_rate": 1e-3},
}
SEEDS = {"quick": (1, 1), "paper": (3, 2)}  # target seeds, policy seeds of each
SAMPLE_DRAWS, SAMPLED_EXAMPLES = 20, {"quick": 100, "paper": 2000}  # accuracy where bits are drawn instead
FILL_EXAMPLES = 10_000  # training examples that compensation takes its means from

# How every policy is held to its activity unless a method says otherwise, and what an example costs: the label's
# negative log likelihood and, as much again, the divergence from the target's scores (times TEMPERATURE squared, 4).
COMMON: dict[str, Any] = {"sparsity": "rate", "lambda_s": 1.0, "distil": 0.25}
NORMALISED = {"options": {"normalise": True, "entropy_weight": 1e-3}}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "REINFORCE": {"estimator": "reinforce"},
    "REINFORCE, normalised": {"estimator": "reinforce", **NORMALISED},
    "DPG": {"estimator": "dpg"},
    "DPG, bits": {"estimator": "dpg-bits"},
    "DisARM": {"estimator": "disarm"},
    "Gaussian noise": {"estimator": "gaussian"},
    "Gumbel-sigmoid": {"estimator": "gumbel-sigmoid"},
    "straight-through": {"estimator": "straight-through"},
    "threshold-through": {"estimator": "threshold-through"},
    "threshold-through, 8 epochs": {"estimator": "threshold-through", "epochs": 8},  # as many as the warm start
    "regression": {"estimator": "regression"},
    "cross-entropy": {"estimator": "cross-entropy"},
}
# Methods without a second policy seed.
ONCE = ("REINFORCE, normalised", "regression", "threshold-through", "threshold-through, 8 epochs")
# Two epochs of cross-entropy to the oracle's groups, then six of threshold-through.
WARM_START: dict[str, Any] = {"estimator": "threshold-through", "warm_start": 2, "epochs": 6}
TUNE_EPOCHS = {"digits": 8, "svhn": 12}
TUNING: dict[str, Any] = {"distil": 0.25, "finetune": 4e-4}
MOVED_STEP = 32
SHIFT = {"digits": 1, "svhn": 2}  # pixels by which pictures are moved while weights are fine-tuned
# One weight for each, a guess of the size at which the terms are as large as in the rate loss; none was tuned.
REGULARISERS: dict[str, dict[str, Any]] = {
    "L_b + L_e": {"sparsity": "text", "lambda_s": 0.05},
    "L_b + L_e + L_v": {"sparsity": "text", "lambda_s": 0.05, "lambda_v": 0.05},
    "squared L_b + L_e": {"sparsity": "code", "lambda_s": 1.0},
    "KL to base rate": {"sparsity": "kl", "lambda_s": 0.01},
    "computation": {"lambda_s": 0.0, "computation": 4.0},
}
COMPENSATED = (WARM, TUNED, "straight-through", "cross-entropy", "REINFORCE")  # also measured with means filled in
FEWER = {"quick": (8,), "paper": (16, 50)}  # groups a layer
FRONT = (0.05, 0.1, 0.5)
FRONT_METHODS = (WARM, "threshold-through", "cross-entropy")  # the three that keep most of the frozen target


def methods(profile: str) -> dict[str, list[tuple[str, float, int, dict[str, Any]]]]:
    """The parts of the run table: (method, tau, groups, settings) of each run, without seeds."""
    (dataset, *_), groups = BASE[profile]
    warm = WARM_START if profile == "paper" else {**WARM_START, "epochs": 8}
    tune = {**warm, **TUNING, "augment": SHIFT[dataset], "epochs": TUNE_EPOCHS[dataset], "warm_start": 1}
    dense = {**TUNING, "augment": SHIFT[dataset], "epochs": TUNE_EPOCHS[dataset], "estimator": "dense"}
    parts: dict[str, list[tuple[str, float, int, dict[str, Any]]]] = {
        "best": [(WARM, TAU, groups, warm), (TUNED, TAU, groups, tune)],
        "estimators": [(name, TAU, groups, own) for name, own in ESTIMATORS.items()],
        "dense": [(DENSE, 1.0, groups, dense)],
    }
    front = {**ESTIMATORS, WARM: warm}
    parts["fronts"] = [(name, tau, groups, front[name]) for name in FRONT_METHODS for tau in FRONT]
    parts["regularisers"] = [
        (f"REINFORCE, {name}", TAU, groups, {"estimator": "reinforce", **own}) for name, own in REGULARISERS.items()
    ]
    # Skipped groups count as their mean from the start: that of the examples for which the oracle skips them.
    parts["compensation"] = [(FILLED, TAU, groups, warm)]
    parts["groups"] = [(f"{WARM}, {fewer} groups", TAU, fewer, warm) for fewer in FEWER[profile]]
    if profile == "quick":
        parts["estimators"] = [run for run in parts["estimators"] if run[0] in ("REINFORCE", "DPG", "straight-through")]
        parts["fronts"] = [run for run in parts["fronts"] if run[0] == WARM]
        parts["regularisers"] = parts["regularisers"][:1]
    return parts


def specs(profile: str) -> list[RunSpec]:
    """One run per method, sparsity target and seeds. Only estimators and the two of the part "best" are repeated with a
    second policy seed."""
    target_seeds, policy_seeds = SEEDS[profile]
    found = []
    for part, runs in methods(profile).items():
        for run, target_seed, policy_seed in itertools.product(runs, range(target_seeds), range(policy_seeds)):
            if policy_seed == 0 or (part in ("best", "estimators") and run[0] not in ONCE):
                found.append(_spec(profile, part, run, target_seed, policy_seed))
    return found


def rates_for(tau: float, hidden: Sequence[int]) -> list[float]:
    """The share of each layer that mean activity `tau` stands for (see SPREAD); all of it at 1.

    >>> rates_for(0.25, [800, 800, 800])
    [0.35, 0.16, 0.24]
    """
    return [min(1.0, round(tau * factor, 6)) if tau < 1 else 1.0 for factor in SPREAD[len(hidden)]]


def _spec(
    profile: str, part: str, run: tuple[str, float, int, dict[str, Any]], target_seed: int, policy_seed: int
) -> RunSpec:
    method, tau, groups, own = run
    dataset, architecture, pretraining, eps, rescale = BASE[profile][0]
    settings = {
        "dataset": dataset,
        "architecture": architecture,
        "pretraining": pretraining,
        "dropout_eps": eps,
        "partitioner": "coactivation",
        "groups": groups,
        "scope": "layer",
        "rescale": rescale,
        "pool": POOL[dataset],
        "part": part,
        "method": method,
        "decision": "calibrated",
        "decision_draws": 1,
        "blind_draws": 1,
        "sample_draws": SAMPLE_DRAWS,
        "sampled_examples": SAMPLED_EXAMPLES[profile],
        "split": "test",
        "target_seed": target_seed,
        "partition_seed": target_seed,
        "policy_seed": policy_seed,
        **policy_plan(
            tau=tau, rates=rates_for(tau, hidden_widths(architecture)), **{**TRAINING[dataset], **COMMON, **own}
        ),
    }
    settings["target"] = targets.target_of(settings).name
    return RunSpec("policies", RECIPE, settings)


def untrained(settings: Mapping[str, Any], data: Dataset, artefacts: RunStore) -> tuple[LazyNetwork, Record]:
    """The lazy network of these settings before its policy is trained, and the record of its target."""
    target, trained = obtain_target(targets.target_of(settings), data, artefacts)
    partition = split_of(settings, target, data)
    pool = Pool(data.shape, settings["pool"]) if settings["pool"] else None
    starting = torch.Generator().manual_seed(1_000_000 + 1000 * settings["target_seed"] + settings["policy_seed"])
    policy, fill = Policy(partition, data.train.x.shape[1], pool, starting), None
    if settings["method"] == FILLED:
        oracle = Oracle(target, partition, pool)
        knowing = LazyNetwork(target, partition, oracle, Budget.of(settings["rates"], partition, oracle))
        fill = compensated(knowing, torch.from_numpy(data.train.x[:FILL_EXAMPLES])).fill
    return LazyNetwork(target, partition, policy, Sample(starting), settings["rescale"], fill), trained


def policy_of(settings: Mapping[str, Any]) -> RunSpec:
    """The run that trains the policy of these settings, which does not depend on how it is measured."""
    how = ("part", "split", "decision", "decision_draws", "blind_draws", "sample_draws", "sampled_examples")
    return RunSpec("policies", POLICY_RECIPE, {key: value for key, value in settings.items() if key not in how})


def learned(settings: Mapping[str, Any], data: Dataset, artefacts: RunStore) -> tuple[LazyNetwork, Record, Record]:
    """The lazy network of these settings with its policy (and weights, where they are fine-tuned) from the artefact
    cache, or trained now, at the asked activity; the records of its policy and target."""
    lazy, trained = untrained(settings, data, artefacts)
    policy = obtain_policy(policy_of(settings), lazy, data, artefacts)
    return calibrated(lazy, torch.from_numpy(data.valid.x), settings["rates"]), policy, trained


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train a policy (and the weights, where they are fine-tuned), measure it at the asked activity, train or fetch
    the controls of equal cost."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    decided, policy, trained = learned(settings, data, artefacts)
    result = measure(decided, settings, data, trained)
    spent = result.pop("multiply_adds")
    result |= {key: policy.result[key] for key in ("accuracy_curve", "activity_curve", "epochs")}
    if settings["part"] in ("best", "estimators"):
        result |= sampled(decided, settings, data)
    if settings["method"] in COMPENSATED:
        result |= filled(decided, data, settings)
    cited = {"target": trained.cite(), "policy": policy.cite()}
    if settings["method"] != DENSE:
        # Controls are distilled from the target as it was, also where the lazy network's copy is fine-tuned.
        fresh, _ = obtain_target(targets.target_of(settings), data, artefacts)
        control, controls = control_of(fresh, trained, spent, data, artefacts, settings["target_seed"])
        result |= control
        cited |= controls
    if settings["method"] == TUNED:  # what its moved pictures alone are worth to a dense net
        moved, record = moved_control(fresh, trained, spent, data, artefacts, settings)
        result |= moved
        cited["moved_control"] = record.cite()
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, cited)


def moved_control(
    target: MLP, trained: Record, wanted: float, data: Dataset, artefacts: RunStore, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Record]:
    """A dense net distilled from `target` on moved pictures that takes at least `wanted` multiply-adds: its width is
    the equal one rounded up to a multiple of MOVED_STEP, so that the runs of a target share it."""
    width = -(-control_width(target, wanted) // MOVED_STEP) * MOVED_STEP
    cost = sum(multiply_adds([target.linears[0].in_features, *[width] * len(target.hidden), data.classes]))
    control, record = obtain_control(
        target, trained, cost, data, artefacts, seed=settings["target_seed"], augment=settings["augment"],
        **targets.TRAINING[data.name],
    )  # fmt: skip
    found = record.result["test_accuracy"]
    return {
        "moved_control_width": control.hidden[0],
        "moved_control_accuracy": found,
        "moved_control_ratio": found / trained.result["test_accuracy"],
    }, record


def sampled(decided: LazyNetwork, settings: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """Accuracy and activity when the bits are drawn with the policy's probabilities, as the papers do: each draw of the
    first test examples by itself, and the accuracy of `decided` on the same ones."""
    if settings["estimator"] in (*SUPERVISED[:1], "dense"):
        return {}  # a forecast of contributions is no logit
    split = Split(data.test.x[: settings["sampled_examples"]], data.test.y[: settings["sampled_examples"]])
    draws = torch.Generator().manual_seed(settings["policy_seed"])
    found = [measured(decided_by(decided, Sample(draws)), split, 1) for _ in range(settings["sample_draws"])]
    return {
        "sampled_accuracies": [accuracy for accuracy, _ in found],
        "decided_accuracy": measured(decided, split, 1)[0],
        "sampled_activity": float(np.mean([decided.partition.activity(mask).mean().item() for _, mask in found])),
    }


def filled(decided: LazyNetwork, data: Dataset, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy and activity when skipped groups count as their mean contribution, thresholds calibrated again."""
    mean = compensated(decided, torch.from_numpy(data.train.x[:FILL_EXAMPLES]))
    again = calibrated(mean, torch.from_numpy(data.valid.x), settings["rates"])
    accuracy, mask = measured(again, data.test, 1)
    return {"filled_accuracy": accuracy, "filled_activity": again.partition.activity(mask).mean().item()}


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 02 that are made from this study."""
    figures = ("policies_training", "policies_ratios", "policies_fronts")
    by = ("estimators", "groups", "sampled", "sparsity", "fill", "best", "fronts")
    return dict.fromkeys((*figures, *(f"policies_{name}_table" for name in by)), records)


STUDY = studies.Study(
    name="policies",
    title="Policies",
    notebook="02_policies",
    specs=specs,
    compute=compute,
    answers=policy_results.no_answers,
    claims=policy_results.claims,
    promises=promises,
    audited=("accuracy", "accuracy_ratio", "activity"),
)
