"""The oracle ladder: how much of a lazy network's loss is due to the activity, the split, and the policy."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import brentq

from condcomp_lib import studies
from condcomp_lib.coactivation import firing_patterns
from condcomp_lib.datasets import Dataset, Split
from condcomp_lib.lazy import LazyNetwork, calibrated, decided_by
from condcomp_lib.oracle import Oracle
from condcomp_lib.partitioners.clustering import activation_partition
from condcomp_lib.partitions import Partition, make_partition
from condcomp_lib.policies import Blind, Policy, Pool, Sample
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import targets
from condcomp_lib.studies.lazy_results import Kind
from condcomp_lib.studies.lazy_runs import control_of, measured
from condcomp_lib.studies.partitioning import PAPER, PLAIN, TAU
from condcomp_lib.targets import MLP, hidden_widths, multiply_adds
from condcomp_lib.training import accuracy, obtain_target, policy_plan, train_policy

RECIPE = 1
NEURONS = "single neurons"  # the split of the first rung: every neuron is a group of its own
SPLITS = ("random", "coactivation")
TABLE: dict[str, dict[Kind, Sequence[int]]] = {
    "quick": {("digits", "2x64", "dropout-uniform", 0.3, "activity"): (8, 16)},
    "paper": {PAPER: (8, 16, 50, 100), PLAIN: (8, 16, 50, 100)},
}
TARGETS = {"quick": 1, "paper": 3}
# Examples that thresholds are calibrated on and that accuracies are of: an oracle computes every group by itself.
EXAMPLES = {"quick": (359, 360), "paper": (1500, 5000)}
POOL = {"digits": 0, "svhn": 4}  # pixels a side that the first gate's picture is averaged over; 0: none
POLICY: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 20, "learning_rate": 3e-3, "lambda_s": 0.1},
    "svhn": {"epochs": 3, "learning_rate": 1e-3, "lambda_s": 0.05},
}
CONTROLLER = 0.05
UNEVEN = {2: (0.3, 0.2), 3: (0.35, 0.2, 0.2)}  # a quarter of the neurons, more of them in the first layer
BUDGETS = ("even, 25%", "uneven, 25%", "even, same compute as uneven")
RUNGS = ("oracle", "learned", "blind")


def budgets(hidden: Sequence[int], inputs: int, classes: int) -> dict[str, list[float]]:
    """The asked activity of each hidden layer by budget: even and uneven at a quarter of the neurons, and even at the
    multiply-adds of the uneven one (the policy's own left out, which are nearly the same)."""
    widths, uneven = [inputs, *hidden, classes], list(UNEVEN[len(hidden)])
    cost = sum(multiply_adds(widths, uneven))
    same = brentq(lambda share: sum(multiply_adds(widths, [share] * len(hidden))) - cost, 0.01, 1.0)
    return dict(zip(BUDGETS, ([TAU] * len(hidden), uneven, [float(same)] * len(hidden)), strict=True))


def specs(profile: str) -> list[RunSpec]:
    """One run per kind, target, split and number of groups a layer."""
    found = []
    calibration, test = EXAMPLES[profile]
    for target_seed, (kind, counts) in itertools.product(range(TARGETS[profile]), TABLE[profile].items()):
        dataset, architecture, pretraining, eps, rescale = kind
        table = [(NEURONS, min(hidden_widths(architecture))), *itertools.product(SPLITS, counts)]
        for partitioner, groups in table:
            settings = {
                "dataset": dataset,
                "architecture": architecture,
                "pretraining": pretraining,
                "dropout_eps": eps,
                "partitioner": partitioner,
                "groups": groups,
                "scope": "layer",
                "rescale": rescale,
                "split": "test",
                "calibration_examples": calibration,
                "test_examples": test,
                "pool": POOL[dataset],
                "target_seed": target_seed,
                "partition_seed": target_seed,
                "policy_seed": target_seed,
                **policy_plan(tau=TAU, controller=CONTROLLER, **POLICY[dataset]),
            }
            settings["target"] = targets.target_of(settings).name
            found.append(RunSpec("partitioning-ladder", RECIPE, settings))
    return found


def split_of(settings: Mapping[str, Any], target: MLP, data: Dataset) -> Partition:
    """The partition of a run: single neurons, a random one, or the coactivation split; each layer by itself."""
    generator = torch.Generator().manual_seed(3_000_000 + settings["partition_seed"])
    groups = settings["groups"]
    if settings["partitioner"] == NEURONS:
        return Partition(tuple(torch.arange(width) for width in target.hidden), groups, "layer")
    if settings["partitioner"] == "random":
        return make_partition("balanced", target.hidden, groups, generator, "layer")
    patterns = firing_patterns(target, torch.from_numpy(data.train.x[:4000]))
    return activation_partition(patterns, target.hidden, groups, generator, "layer")


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Every rung of one split under every budget."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    target, trained = obtain_target(targets.target_of(settings), data, artefacts)
    partition = split_of(settings, target, data)
    pool = Pool(data.shape, settings["pool"]) if settings["pool"] else None
    starting = torch.Generator().manual_seed(settings["policy_seed"])
    policy = Policy(partition, data.train.x.shape[1], pool, starting)
    learned = LazyNetwork(target, partition, policy, Sample(starting), settings["rescale"])
    ladder = {"oracle": LazyNetwork(target, partition, Oracle(target, partition, pool), Sample(starting),
                                    settings["rescale"])}  # fmt: skip
    if settings["partitioner"] != NEURONS:
        train_policy(learned, data, settings, torch.Generator().manual_seed(settings["policy_seed"]))
        ladder |= {"learned": learned, "blind": learned}
    rows = _climbed(ladder, settings, data)
    full = accuracy(target, _first(data.test, settings["test_examples"]))
    result: dict[str, Any] = {"target_accuracy": full, "rungs": rows}
    for row in rows:
        row["ratio"] = row["accuracy"] / full
    cited = {"target": trained.cite()}
    for row in rows:
        wanted, seed = row.pop("multiply_adds"), settings["target_seed"]
        control, controls = control_of(target, trained, wanted, data, artefacts, seed)
        row["control_ratio"] = control["control_ratio"]
        cited |= {f"control {cite['name']}": cite for cite in controls.values()}
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, cited)


def _climbed(ladder: Mapping[str, LazyNetwork], settings: Mapping[str, Any], data: Dataset) -> list[dict[str, Any]]:
    x = torch.from_numpy(data.valid.x[: settings["calibration_examples"]])
    test, rows = _first(data.test, settings["test_examples"]), []
    for (rung, lazy), (name, asked) in itertools.product(
        ladder.items(),
        budgets(ladder["oracle"].target.hidden, data.train.x.shape[1], data.classes).items(),
    ):
        if rung == "blind":
            rates = tuple(torch.full((lazy.partition.groups,), share) for share in asked)
            decided = decided_by(lazy, Blind(rates, torch.Generator().manual_seed(settings["policy_seed"])))
        else:
            decided = calibrated(lazy, x, asked)
        hits, mask = measured(decided, test, 1)
        cost = decided.cost(mask)
        rows.append(
            {
                "rung": rung,
                "budget": name,
                "asked": asked,
                "accuracy": hits,
                "activity": lazy.partition.activity(mask).mean().item(),
                "activity_by_layer": [n / w for n, w in zip(cost.neurons, lazy.target.hidden, strict=True)],
                "compute": cost.total_multiply_adds / lazy.target_cost().total_multiply_adds,
                "multiply_adds": cost.total_multiply_adds,
            }
        )
    return rows


def _first(split: Split, count: int) -> Split:
    return Split(split.x[:count], split.y[:count])
