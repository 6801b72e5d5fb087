"""Every way to split a trained network under the same policy (*partitions*, sections 2 and 5.1-5.3, and beyond)."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

from condcomp_lib import studies
from condcomp_lib.partitioners.gumbel import SCHEDULES
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import partitioning, targets
from condcomp_lib.studies.lazy_results import SAMPLED, Kind
from condcomp_lib.studies.lazy_runs import DRAWS, control_of, deciding, measure
from condcomp_lib.studies.partition_search import obtain_partition
from condcomp_lib.studies.partitioning import GROUPS, KINDS, PAPER, TAU
from condcomp_lib.training import obtain_policy, obtain_target, policy_plan

RECIPE = 1
TRIALS = 20
BANDITS = ("optimistic greedy", "epsilon-greedy", "ucb1")
CONTEXTUAL = ("contextual", "contextual, both weights")
GUMBEL = ("gumbel", "gumbel, annealed", "gumbel, annealed noise")
CLUSTERINGS = ("k-means", "coactivation", "spectral", "always-on")
SEARCHES = ("local search", "simulated annealing")
PARTITIONERS = ("random", *BANDITS, *CONTEXTUAL, *GUMBEL, *CLUSTERINGS, *SEARCHES)
EVERYTHING, CHEAP = PARTITIONERS, ("random", "k-means", "coactivation", "spectral")
DIGITS: Kind = ("digits", "2x64", "dropout-uniform", 0.3, "activity")
# Which partitioners each kind of target is split by. Section 5.2 also has a contextual bandit on 2x200.
TABLE: dict[str, dict[Kind, Sequence[str]]] = {
    "quick": {DIGITS: EVERYTHING},
    "paper": {
        PAPER: EVERYTHING,
        partitioning.PLAIN: CHEAP,
        partitioning.UNSCALED: CHEAP,
        partitioning.SMALL: ("random", *CONTEXTUAL, "gumbel", "k-means", "coactivation", "spectral"),
        ("mnist", "2x400", "none", None, "none"): CHEAP,
    },
}
TARGETS = {"quick": 1, "paper": 3}  # seeds of each kind of target
TWICE = (PAPER, partitioning.PLAIN)  # kinds whose targets are split (and given a policy) twice
# How the policy is trained, how its masks are decided, and the activity asked for: as published, with a fixed weight
# of the sparsity terms, whatever activity results; the same policy held to 25%; a policy led to 25% in training.
WAYS = (("fixed", SAMPLED, None), ("fixed", "calibrated", TAU), ("led", "calibrated", TAU))
CONTROLLER = 0.05
POLICY: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 20, "learning_rate": 3e-3},
    "mnist": {"epochs": 3, "learning_rate": 1e-3},
    "svhn": {"epochs": 3, "learning_rate": 1e-3},
}
# A trial's policy is trained until an epoch no longer raises its validation accuracy.
TRIAL: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 8, "patience": 1, "learning_rate": 1e-2, "schedule": "constant"},
    "svhn": {"epochs": 5, "patience": 1, "learning_rate": 1e-3, "schedule": "constant"},
}
JOINT = {"epochs": 5}  # of policy and preferences together
SWAPS = {"digits": {"examples": 256, "trials": 300}, "svhn": {"examples": 256, "trials": 2000}}
HEAT = 1e-3  # first temperature of simulated annealing; the first swaps change the loss by about as much


def search_of(partitioner: str, dataset: str, lambda_s: float) -> dict[str, Any]:
    """How a partitioner is used on a data set: what a spec records under "search"."""
    trial = {"policy": policy_plan(tau=TAU, lambda_s=lambda_s, **TRIAL.get(dataset, {}))}
    if partitioner in BANDITS:
        rule = {"optimistic greedy": "greedy"}.get(partitioner, partitioner)
        return {"rule": rule, "trials": TRIALS if dataset != "digits" else 4, **trial}
    if partitioner in CONTEXTUAL:
        context = "incoming" if partitioner == "contextual" else "incoming+outgoing"
        # One random partition first (lazy epoch 0), then the lazy epochs; on digits half as many.
        trials, span = (1 + TRIALS, 10) if dataset != "digits" else (5, 2)
        return {"context": context, "ridge": 1.0, "epsilon": [0.8, 0.1, span], "trials": trials, **trial}
    if partitioner in GUMBEL:
        joint = policy_plan(tau=TAU, lambda_s=lambda_s, **(POLICY[dataset] | JOINT))
        return {"gumbel": list(SCHEDULES)[GUMBEL.index(partitioner)], "policy": joint}
    if partitioner in CLUSTERINGS:
        return {"cluster": partitioner} if partitioner == "k-means" else {"cluster": partitioner, "examples": 4000}
    heat = HEAT if partitioner == "simulated annealing" else 0.0
    plan = policy_plan(tau=TAU, lambda_s=lambda_s, **POLICY[dataset])
    return {"swaps": 1, "temperature": heat, **SWAPS[dataset], "policy": plan}


def specs(profile: str) -> list[RunSpec]:
    """One run per kind, partitioner, seeds and way; sampled ones first, since the others take over their work."""
    found = []
    table = [(kind, name) for kind, names in TABLE[profile].items() for name in names]
    for (training, decision, asked), policy_seed, target_seed, (kind, partitioner) in itertools.product(
        WAYS, range(2), range(TARGETS[profile]), table
    ):
        if policy_seed and (kind not in TWICE or partitioner in BANDITS):
            continue
        dataset, architecture, pretraining, eps, rescale = kind
        lambda_s = KINDS[profile].get(kind, 0.4)
        settings = {
            "dataset": dataset,
            "architecture": architecture,
            "pretraining": pretraining,
            "dropout_eps": eps,
            "partitioner": partitioner,
            "groups": GROUPS,
            "scope": "network",
            "rescale": rescale,
            "decision": decision,
            "decision_draws": DRAWS if decision == SAMPLED else 1,
            "activity_asked": asked,
            "split": "test",
            "target_seed": target_seed,
            "partition_seed": policy_seed,
            "policy_seed": policy_seed,
            **policy_plan(tau=TAU, lambda_s=lambda_s, controller=CONTROLLER * (training == "led"), **POLICY[dataset]),
        }
        if partitioner != "random":
            settings["search"] = search_of(partitioner, dataset, lambda_s)
        settings["target"] = targets.target_of(settings).name
        found.append(RunSpec("partitioning-splits", RECIPE, settings))
    return found


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Search (or fetch) the partition, train (or fetch) a policy on it, decide the test split's masks, and read the
    equal-compute control's accuracy off the target's dense nets."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    target, trained = obtain_target(targets.target_of(settings), data, artefacts)
    partition, searched = obtain_partition(settings, target, data, artefacts)
    lazy = partitioning.untrained(settings, target, data, partition)
    learned = obtain_policy(partitioning.policy_of(settings), lazy, data, artefacts)
    started = time.perf_counter()
    result = measure(deciding(lazy, settings, data), settings, data, trained)
    seconds = time.perf_counter() - started
    control, controls = control_of(
        target, trained, result.pop("multiply_adds"), data, artefacts, settings["target_seed"]
    )
    result |= control | {key: learned.result[key] for key in ("epochs", "accuracy_curve", "activity_curve")}
    used = {"target": trained.cite(), "policy": learned.cite(), **controls}
    if searched is not None:
        result |= searched.result if settings["decision"] == SAMPLED else {}
        used["partition"] = searched.cite()
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, used, seconds)
