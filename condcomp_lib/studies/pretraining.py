"""Tables 1 and 2 of *partitions*: targets pretrained in several ways, made lazy by Gumbel partitions with REINFORCE or
DPG, the cells that the paper lost among them, and rows that it did not try."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from condcomp_lib import studies
from condcomp_lib.datasets import Dataset
from condcomp_lib.lazy import LazyNetwork, decided_by
from condcomp_lib.policies import Sample
from condcomp_lib.policy_training import policy_plan
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import policies, pretraining_results, targets
from condcomp_lib.studies import pretraining_search as searching
from condcomp_lib.studies.lazy_runs import control_of, deciding, measure
from condcomp_lib.studies.partition_search import drawing, joint
from condcomp_lib.studies.partitioning import TAU
from condcomp_lib.studies.policy_results import WARM
from condcomp_lib.targets import hidden_widths
from condcomp_lib.training import obtain_target

RECIPE = 1
# The targets of section 5.2, as study `targets` trains them, and penalties with which they are trained just so.
ARCHITECTURE = {"quick": "2x64", "paper": "3x800"}
PENALTY: dict[str, dict[str, Any]] = {
    "flow": {"penalty": {"coefficient": 1.5, "form": "root"}, "balanced": True},
    "hoyer": {"penalty": {"coefficient": 0.3}},
}
ROWS = {"quick": ("none", "dropout-uniform", "flow"), "paper": (*searching.ROWS, *PENALTY)}
POLICY: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 5, "learning_rate": 5e-3},
    "svhn": {"epochs": 4, "epoch_examples": 28_672, "learning_rate": 1e-3},
}
BEST_POLICY: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "learning_rate": 5e-3},
    "svhn": {"epoch_examples": 28_672, "learning_rate": 1e-3},
}
BEST = "best policy"
METHODS = (*searching.ESTIMATORS, BEST)
SEEDS = {"quick": (1, 1), "paper": (3, 2)}  # target seeds, policy seeds of each


def specs(profile: str) -> list[RunSpec]:
    """One run per pretraining, method and seeds; those of one target far apart, so that workers do not wait for it."""
    target_seeds, policy_seeds = SEEDS[profile]
    found = []
    for policy_seed, method, target_seed, row in itertools.product(
        range(policy_seeds), METHODS, range(target_seeds), ROWS[profile]
    ):
        if policy_seed == 0 or method != BEST:  # the best policy has one seed
            found.append(_spec(profile, row, method, target_seed, policy_seed))
    return found


def _spec(profile: str, row: str, method: str, target_seed: int, policy_seed: int) -> RunSpec:
    dataset = "digits" if profile == "quick" else "svhn"
    architecture = ARCHITECTURE[profile]
    settings = searching.lazy_settings(dataset, row) | {"architecture": architecture}
    if row in PENALTY:
        settings["target_training"] = {**targets.TRAINING[dataset], **PENALTY[row]}
    settings |= {"method": method, "target_seed": target_seed, "partition_seed": policy_seed,
                 "policy_seed": policy_seed}  # fmt: skip
    settings["control"] = profile == "paper" and target_seed == policy_seed == 0  # a control takes longer than a run
    if method == BEST:
        settings |= _best(dataset, architecture)
    else:
        lambda_s = searching.LAMBDA[settings["rescale"]]
        settings |= policy_plan(tau=TAU, lambda_s=lambda_s, estimator=method, **POLICY[dataset])
    settings["target"] = targets.target_of(settings).name
    return RunSpec("pretraining", RECIPE, settings)


def _best(dataset: str, architecture: str) -> dict[str, Any]:
    """The warm start of study `policies`: a coactivation split of each layer, two epochs of cross-entropy to the
    oracle's groups, then threshold-through."""
    rates = policies.rates_for(TAU, hidden_widths(architecture))
    groups = 16 if dataset == "digits" else 100
    # Not rescaled, as there: what it leaves out hardly counts, whereas REINFORCE and DPG leave out what does.
    own = {"rescale": "none", "partitioner": "coactivation", "groups": groups, "scope": "layer",
           "pool": policies.POOL[dataset], "activity_asked": rates}  # fmt: skip
    how = policies.WARM_START if dataset == "svhn" else {**policies.WARM_START, "epochs": 8}
    return own | policy_plan(tau=TAU, rates=rates, **{**BEST_POLICY[dataset], **policies.COMMON, **how})


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train (or fetch) the target, make it lazy, and measure it: as published with masks sampled, and held to the
    asked activity."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    if settings["method"] == BEST:
        decided, policy, trained = policies.learned({**settings, "method": WARM}, data, artefacts)
        result = measure(decided, settings, data, trained)
        curve = {key: policy.result[key] for key in ("accuracy_curve", "activity_curve", "epochs")}
    else:
        target, trained = obtain_target(targets.target_of(settings), data, artefacts)
        _, lazy, found = joint(settings, settings, target, data, drawing(settings))
        decided = deciding(lazy, settings, data)
        result = measure(decided, settings, data, trained)
        curve = {"accuracy_curve": found.accuracy, "activity_curve": found.activity, "epochs": len(found.accuracy)}
        result["published"] = as_published(lazy, settings, data, trained)
    wanted, cited = result.pop("multiply_adds"), {"target": trained.cite()}
    if settings["control"]:
        fresh, _ = obtain_target(targets.target_of(settings), data, artefacts)
        control, controls = control_of(fresh, trained, wanted, data, artefacts, settings["target_seed"])
        result |= control
        cited |= controls
    return Outcome(result | curve, None, {"note": data.note, "checksum": data.checksum}, cited)


def as_published(lazy: LazyNetwork, settings: Mapping[str, Any], data: Dataset, trained: Record) -> dict[str, Any]:
    """The same lazy network with its masks sampled, at whatever activity the weight of the sparsity terms led to."""
    sampled = decided_by(lazy, Sample(torch.Generator().manual_seed(settings["policy_seed"])))
    found = measure(sampled, settings, data, trained)
    kept = ("accuracy", "accuracy_ratio", "valid_accuracy", "blind_ratio", "activity", "valid_activity", "compute")
    return {key: found[key] for key in kept}


STUDY = studies.Study(
    name="pretraining",
    title="Pretraining with lazy evaluation in mind",
    notebook="03_pretraining",
    specs=specs,
    compute=compute,
    answers=pretraining_results.answers,
    claims=pretraining_results.claims,
    promises=pretraining_results.promises,
    audited=("target_accuracy", "accuracy", "activity"),
)
