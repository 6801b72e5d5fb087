"""The oracle ladder: how much of a lazy network's loss is due to the activity, the split, and the policy."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

from condcomp_lib import stats, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.coactivation import firing_patterns
from condcomp_lib.datasets import Dataset, Split
from condcomp_lib.lazy import LazyNetwork, calibrated, decided_by
from condcomp_lib.oracle import Oracle
from condcomp_lib.partitioners.clustering import activation_partition
from condcomp_lib.partitions import Partition, make_partition
from condcomp_lib.policies import Blind, Policy, Pool, Sample
from condcomp_lib.policy_training import policy_plan, train_policy
from condcomp_lib.published import Answer
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import targets
from condcomp_lib.studies.lazy_results import Kind, kind_id, kind_of, label
from condcomp_lib.studies.lazy_runs import control_of, measured
from condcomp_lib.studies.partitioning import PAPER, PLAIN, TAU
from condcomp_lib.targets import MLP, hidden_widths, multiply_adds
from condcomp_lib.training import accuracy, obtain_target

RECIPE = 1
NEURONS = "single neurons"  # the split of the first rung: every neuron is a group of its own
SPLITS = ("random", "coactivation")
TABLE: dict[str, dict[Kind, Sequence[int]]] = {
    "quick": {("digits", "2x64", "dropout-uniform", 0.3, "activity"): (8, 16)},
    "paper": {PAPER: (8, 16, 50, 100), PLAIN: (16, 50)},
}
TARGETS = {"quick": 1, "paper": 3}
# Examples that thresholds are calibrated on and that accuracies are of: an oracle computes every group by itself.
EXAMPLES = {"quick": (359, 360), "paper": (1500, 5000)}
POOL = {"digits": 0, "svhn": 4}  # pixels a side that the first gate's picture is averaged over; 0: none
POLICY: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 10, "learning_rate": 5e-3, "lambda_s": 0.1},
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
    result["ratios"] = [row["ratio"] for row in rows]
    cited = {"target": trained.cite()}
    for row in rows:
        wanted, seed = row.pop("multiply_adds"), settings["target_seed"]
        if settings["partitioner"] == NEURONS:
            continue  # no policy chooses single neurons like that, so there is nothing to compare at equal compute
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


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every rung of every run as one row: kind, split, groups a layer, rung, budget and what was measured."""
    found = []
    for record in records:
        settings = record.spec.settings
        kind = kind_of(record)
        own = {"kind": label(kind), "id": kind_id(kind), "split": settings["partitioner"], "groups": settings["groups"]}
        for rung in record.result["rungs"]:
            found.append({**own, "target_seed": settings["target_seed"], **rung})
    return found


def _over(found: Sequence[Mapping[str, Any]], field: str) -> stats.Interval:
    return stats.interval([row[field] for row in found], clusters=[row["target_seed"] for row in found])


def _select(found: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def summary(records: Sequence[Record], budget: str = BUDGETS[0]) -> list[dict[str, Any]]:
    """The ladder of every kind, split and number of groups under one budget, and the rung that loses most.

    From the target to the oracle's neurons it is the activity that costs, from there to its groups the split, and
    from there to the learned policy the policy.
    """
    found, table = rows(records), []
    for kind, split, groups in dict.fromkeys((row["kind"], row["split"], row["groups"]) for row in found):
        if split == NEURONS:
            continue
        here = {rung: _select(found, kind=kind, split=split, groups=groups, budget=budget, rung=rung) for rung in RUNGS}
        neurons = _over(_select(found, kind=kind, split=NEURONS, budget=budget), "ratio")
        oracle, learned, blind = (_over(here[rung], "ratio") for rung in RUNGS)
        steps = {"activity": 1 - neurons.estimate, "split": neurons.estimate - oracle.estimate,
                 "policy": oracle.estimate - learned.estimate}  # fmt: skip
        table.append(
            {
                "target": kind,
                "split": split,
                "groups a layer": groups,
                "oracle neurons": neurons,
                "oracle groups": oracle,
                "learned policy": learned,
                "uniform draw": blind,
                "control": _over(here["learned"], "control_ratio"),
                "activity": _over(here["learned"], "activity"),
                "compute": _over(here["learned"], "compute"),
                "loses most": max(steps, key=lambda step: steps[step]),
            }
        )
    return table


def budget_summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """How the budgets compare: the finest coactivation split of each kind, by rung, with its activity by layer."""
    found, table = rows(records), []
    for kind in dict.fromkeys(row["kind"] for row in found):
        finest = max(row["groups"] for row in found if row["kind"] == kind and row["split"] == "coactivation")
        for budget, rung in itertools.product(BUDGETS, ("oracle", "learned")):
            here = _select(found, kind=kind, split="coactivation", groups=finest, budget=budget, rung=rung)
            by_layer = np.mean([row["activity_by_layer"] for row in here], axis=0)
            table.append(
                {
                    "target": kind,
                    "groups a layer": finest,
                    "budget": budget,
                    "rung": {"oracle": "oracle groups", "learned": "learned policy"}[rung],
                    "ratio": _over(here, "ratio"),
                    "activity": _over(here, "activity"),
                    "by layer": ", ".join(f"{share:.2f}" for share in by_layer),
                    "compute": _over(here, "compute"),
                    "control ratio": _over(here, "control_ratio"),
                }
            )
    return table


def lines(records: Sequence[Record], budget: str = BUDGETS[0]) -> dict[str, dict[str, tuple[list[int], np.ndarray]]]:
    """For each kind the figure's lines: for each split and rung the numbers of groups and the ratios (runs x numbers);
    "oracle neurons" and "control" hold one column."""
    found: dict[str, dict[str, tuple[list[int], np.ndarray]]] = {}
    table = rows(records)
    for kind in dict.fromkeys(row["kind"] for row in table):
        here = _select(table, kind=kind, budget=budget)
        neurons = [row["ratio"] for row in _select(here, split=NEURONS)]
        found[kind] = {"oracle neurons": ([], np.array(neurons)[:, None])}
        for split, rung in itertools.product(SPLITS, RUNGS):
            own = _select(here, split=split, rung=rung)
            counts = sorted({row["groups"] for row in own})
            ratios = [[row["ratio"] for row in _select(own, groups=count)] for count in counts]
            found[kind][f"{split}, {rung}"] = (counts, np.array(ratios).T)
        control = [row["control_ratio"] for row in _select(here, split="coactivation", rung="learned")]
        found[kind]["control"] = ([], np.array(control)[:, None])
    return found


def claims(records: Sequence[Record]) -> list[Claim]:
    """What the ladder shows at 25% of the neurons: the split and the policy as bottlenecks, and the budget."""
    found, claimed = rows(records), []
    if len({row["target_seed"] for row in found}) < 2:
        return []  # one target says nothing about another
    for kind, end in dict.fromkeys((row["kind"], row["id"]) for row in found):
        for groups in sorted({row["groups"] for row in found if row["kind"] == kind and row["split"] != NEURONS}):
            for rung, what in (("oracle", "the oracle's groups keep"), ("learned", "the learned policy keeps")):
                own, base = (_select(found, kind=kind, groups=groups, rung=rung, budget=BUDGETS[0], split=split)
                             for split in ("coactivation", "random"))  # fmt: skip
                statement = (
                    f"{kind}, {groups} groups a layer, 25%: {what} more with a coactivation split than a random one"
                )
                id = f"ladder.split.{end}.{groups}.{rung}"
                claimed.append(judge(id, "ours", statement, _gain(own, base), above=0.0))
        finest = max(row["groups"] for row in found if row["kind"] == kind and row["split"] == "coactivation")
        own, base, same = (_select(found, kind=kind, groups=finest, rung="oracle", budget=budget, split="coactivation")
                           for budget in (BUDGETS[1], BUDGETS[0], BUDGETS[2]))  # fmt: skip
        for at, rival, what in (("activity", base, "as many neurons"), ("compute", same, "as many multiply-adds")):
            statement = f"{kind}, {finest} groups a layer: more neurons in the first layer keep more, with {what}"
            claimed.append(judge(f"ladder.budget.{end}.{at}", "ours", statement, _gain(own, rival), above=0.0))
    return claimed


def _gain(own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> stats.Interval:
    """The differences in ratio of rows paired by target."""
    other = {row["target_seed"]: row["ratio"] for row in base}
    return stats.interval([row["ratio"] - other[row["target_seed"]] for row in own if row["target_seed"] in other])


def findings(records: Sequence[Record]) -> str:
    """Which rung loses most, as a Markdown list with its numbers filled in."""
    table, found = summary(records), []
    for kind in dict.fromkeys(row["target"] for row in table):
        here = [row for row in table if row["target"] == kind]
        for split in SPLITS:
            coarse, fine = (pick((r for r in here if r["split"] == split), key=lambda r: r["groups a layer"])
                            for pick in (min, max))  # fmt: skip
            found.append(
                f"- **{kind}, {split} split**: oracle groups keep {coarse['oracle groups'].format(2)} with "
                f"{coarse['groups a layer']} groups a layer and {fine['oracle groups'].format(2)} with "
                f"{fine['groups a layer']}, learned policies {coarse['learned policy'].format(2)} and "
                f"{fine['learned policy'].format(2)}; most is lost by the {coarse['loses most']} and the "
                f"{fine['loses most']}."
            )
    return "\n".join(found)


def answers(records: Sequence[Record]) -> list[Answer]:  # noqa: ARG001 (the papers have no such ladder)
    """No published number has its counterpart here."""
    return []


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 01 that are made from this study."""
    return dict.fromkeys(("ladder", "ladder_table", "ladder_budget_table"), records)


STUDY = studies.Study(
    name="partitioning-ladder",
    title="The oracle ladder",
    notebook="01_partitioning",
    specs=specs,
    compute=compute,
    answers=answers,
    claims=claims,
    promises=promises,
    audited=("target_accuracy", "ratios"),
)
