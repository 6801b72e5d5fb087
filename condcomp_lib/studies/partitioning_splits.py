"""Every way to split a trained network under the same policy (*partitions*, sections 2 and 5.1-5.3, and beyond)."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from condcomp_lib import published, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.policy_training import obtain_policy, policy_plan
from condcomp_lib.published import Answer
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import partitioning, targets
from condcomp_lib.studies.lazy_results import SAMPLED, Kind, gains, kind_id, kind_of, label, over_runs
from condcomp_lib.studies.lazy_runs import DRAWS, control_of, deciding, measure
from condcomp_lib.studies.partition_search import obtain_partition
from condcomp_lib.studies.partitioning import GROUPS, KINDS, PAPER, SMALL, TAU
from condcomp_lib.studies.split_results import HELD, LED, PUBLISHED_WAY, kinds, of_kind, tracked_at
from condcomp_lib.training import obtain_target

RECIPE = 1
TRIALS = 20
BANDITS = ("optimistic greedy", "epsilon-greedy", "ucb1")
CONTEXTUAL = ("contextual", "contextual, both weights")
GUMBEL = {"gumbel": "constant", "gumbel, annealed": "annealed", "gumbel, annealed noise": "annealed-noise"}  # schedules
CLUSTERINGS = ("k-means", "coactivation", "spectral", "always-on")
SEARCHES = ("local search", "simulated annealing")
PARTITIONERS = ("random", *BANDITS, *CONTEXTUAL, *GUMBEL, *CLUSTERINGS, *SEARCHES)
ONCE = (*BANDITS, "gumbel, annealed noise", "simulated annealing")  # one search a target
CHEAP = ("random", "k-means", "coactivation", "spectral")
DIGITS: Kind = ("digits", "2x64", "dropout-uniform", 0.3, "activity")
# Which partitioners each kind of target is split by. Section 5.2 also has a contextual bandit on 2x200.
TABLE: dict[str, dict[Kind, Sequence[str]]] = {
    "quick": {DIGITS: PARTITIONERS},
    "paper": {
        PAPER: PARTITIONERS,
        partitioning.PLAIN: CHEAP,
        partitioning.UNSCALED: CHEAP,
        partitioning.SMALL: ("random", *CONTEXTUAL, "gumbel", "k-means", "coactivation", "spectral"),
        ("mnist", "2x400", "none", None, "none"): CHEAP,
    },
}
TARGETS = {"quick": 1, "paper": 3}  # seeds of each kind of target
AS_THERE = (DIGITS, PAPER, SMALL)  # kinds that are also evaluated as published; the others only at matched activity
TWICE = (PAPER, partitioning.PLAIN)  # kinds whose targets are split (and given a policy) twice
# How the policy is trained, how its masks are decided, and the activity asked for: as published, with a fixed weight
# of the sparsity terms, whatever activity results; the same policy held to 25%; a policy led to 25% in training.
WAYS = (("fixed", SAMPLED, None), ("fixed", "calibrated", TAU), ("led", "calibrated", TAU))
CONTROLLER = 0.05
POLICY: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 10, "learning_rate": 5e-3},
    "mnist": {"epochs": 3, "learning_rate": 1e-3},
    "svhn": {"epochs": 3, "learning_rate": 1e-3},
}
# Who is said to keep more of the accuracy than whom, and where: the papers' order, and this companion's expectations.
PUBLISHED_ORDER = (
    *((name, "random", "partitions, 5.1") for name in ("optimistic greedy", "ucb1")),
    ("gumbel", "ucb1", "partitions, 5.1 and Table 1"),
    ("contextual", "gumbel", "partitions, 5.3"),
    ("contextual", "random", "partitions, 5.2"),
)
BEYOND = (
    ("epsilon-greedy", "random", "ours"),
    ("contextual, both weights", "contextual", "partitions, 6"),
    *((name, "gumbel", "partitions, 5.3") for name in list(GUMBEL)[1:]),
    *((name, "random", "ours") for name in (*CLUSTERINGS, *SEARCHES)),
)
# The published trajectory of section 5.2: kind, id, lazy epoch, what is tracked, and its metric.
PUBLISHED_TRACK = (
    (PAPER, "Ps52.05", 1, "worth", "validation_accuracy_percent"),
    (PAPER, "Ps52.06", 1, "activity", "activity_percent"),
    (PAPER, "Ps52.07", 1, "sd_of_activity_by_group", "sd_of_activity_by_partition_percent"),
    (PAPER, "Ps52.08", 15, "activity", "activity_percent"),
    (PAPER, "Ps52.09", 15, "sd_of_activity_by_group", "sd_of_activity_by_partition_percent"),
    (PAPER, "Ps52.10", 15, "sd_of_size", "sd_of_partition_size"),
    (PAPER, "Ps52.16", 1, "worth", "accuracy_ratio"),
    (SMALL, "Ps52.13", 1, "worth", "validation_accuracy_percent"),
    (SMALL, "Ps52.14", 10, "worth", "validation_accuracy_percent"),
)
EPOCH_0 = {"activity": "Ps52.03", "sd_of_activity_by_group": "Ps52.04"}  # of the random partition on 3x800
# A trial's policy is trained until an epoch (of 150 minibatches on SVHN) no longer raises its validation accuracy.
TRIAL: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 5, "patience": 1, "learning_rate": 1e-2, "schedule": "constant"},
    "svhn": {
        "epochs": 10,
        "patience": 1,
        "learning_rate": 3e-3,
        "schedule": "constant",
        "epoch_examples": 19_200,
    },
}
JOINT = {"epochs": 4}  # of policy and preferences together
SWAPS = {"digits": {"examples": 256, "trials": 300}, "svhn": {"examples": 256, "trials": 1000}}
HEAT = 1e-3  # first temperature of simulated annealing; the first swaps change the loss by about as much


def search_of(partitioner: str, dataset: str, lambda_s: float) -> dict[str, Any]:
    """How a partitioner is used on a data set: what a spec records under "search"."""
    trial = {"policy": policy_plan(tau=TAU, lambda_s=lambda_s, **TRIAL.get(dataset, {}))}
    if partitioner in BANDITS:
        rule = {"optimistic greedy": "greedy"}.get(partitioner, partitioner)
        return {"rule": rule, "trials": TRIALS if dataset != "digits" else 4, **trial}
    if partitioner in CONTEXTUAL:
        context = "incoming" if partitioner == "contextual" else "incoming+outgoing"
        # One random partition first (lazy epoch 0), then the lazy epochs; on digits four of them.
        trials, span = (1 + TRIALS, 10) if dataset != "digits" else (5, 2)
        return {"context": context, "ridge": 1.0, "epsilon": [0.8, 0.1, span], "trials": trials, **trial}
    if partitioner in GUMBEL:
        joint = policy_plan(tau=TAU, lambda_s=lambda_s, **(POLICY[dataset] | JOINT))
        return {"gumbel": GUMBEL[partitioner], "policy": joint}
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
        if policy_seed and (kind not in TWICE or partitioner in ONCE or (training == "led" and kind == PAPER)):
            continue
        if training == "fixed" and kind not in AS_THERE:
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


def setup(profile: str) -> str:
    """The run table in words."""
    counts = "; ".join(f"{label(kind)}: {len(names)}" for kind, names in TABLE[profile].items())
    count = TARGETS[profile]
    text = f"{GROUPS} groups that span the layers. Partitioners by kind of target: {counts}. "
    text += f"Each on {count} target{'s' if count > 1 else ''}"
    if profile != "paper":
        return f"{text}."
    twice = " and ".join(label(kind) for kind in TWICE)
    once = f"one for {', '.join(ONCE)}, and one policy led to 25% on {label(PAPER)}"
    return f"{text}; {twice} with two partitions and policies for each target, but {once}."


def answers(records: Sequence[Record]) -> list[Answer]:
    """This study's numbers beside published ids: bandits and contextual bandits of sections 5.1 and 5.2."""
    place = {"notebook": "01_partitioning", "figure": "splits_table"}
    groups = of_kind(records, PAPER)[PUBLISHED_WAY]
    found = []
    for id, names, what in (
        ("Ps51.01", ("random",), ""),
        ("Ps51.02", ("optimistic greedy", "ucb1"), "the higher of the two, a new policy on the partition preferred; "),
    ):
        intervals = [over_runs(groups[name], _valid_ratio) for name in names if name in groups]
        if intervals:
            best = max(intervals, key=lambda interval: interval.estimate)
            others = _other_kinds(records, names)
            note = f"{what}{label(PAPER)}, sampled masks, validation data{others}; {targets.NO_EXTRA}"
            found.append(Answer(id, best, "accuracy_ratio", note, **place))
    place = {"notebook": "01_partitioning", "figure": "splits_trajectories"}
    for kind, id, epoch, field, metric in PUBLISHED_TRACK:
        group = of_kind(records, kind)[PUBLISHED_WAY].get("contextual", [])
        read = tracked_at(group, epoch, field)
        if read is None:
            continue
        scaled = _scaled(read, metric)
        note = f"{label(kind)}, lazy epoch {epoch}, incoming weights; {targets.NO_EXTRA}"
        found.append(Answer(id, over_runs(group, scaled), metric, note, **place))
    return found


def published_track(kind: Kind, field: str) -> dict[int, float]:
    """The published values of what a figure tracks ("ratio", or a tracked field in percent), by lazy epoch."""
    rows = published.load()
    found = {epoch: rows[id].value for own, id, epoch, tracked, metric in PUBLISHED_TRACK
             if own == kind and (tracked == field or (field == "ratio" and metric == "accuracy_ratio"))}  # fmt: skip
    if kind == PAPER and field in EPOCH_0:
        found[0] = rows[EPOCH_0[field]].value
    if field == "ratio":
        base = {PAPER: ("Ps52.15", None), SMALL: ("Ps52.17", "Ps52.11")}[kind]
        found[0] = rows[base[0]].value
        if base[1]:  # accuracies are published, over the accuracy of the target
            found |= {epoch: (rows[id].value or 0) / (rows[base[1]].value or 1)
                      for own, id, epoch, tracked, _ in PUBLISHED_TRACK
                      if own == kind and tracked == "worth"}  # fmt: skip
    return {epoch: value for epoch, value in found.items() if value is not None}


def _valid_ratio(result: Mapping[str, Any]) -> float:
    return result["valid_accuracy"] / result["target_valid_accuracy"]


def _other_kinds(records: Sequence[Record], names: Sequence[str]) -> str:
    """The ratios of the other SVHN kinds that were split at random too, in words."""
    if names != ("random",):
        return ""
    others = []
    for kind in kinds(records):
        group = of_kind(records, kind)[PUBLISHED_WAY].get("random", [])
        if kind != PAPER and kind[0] == "svhn" and group:
            others.append(f"{label(kind)}: {over_runs(group, _valid_ratio).format(2)}")
    return f"; {'; '.join(others)}" if others else ""


def _scaled(read: Callable[[Mapping[str, Any]], float], metric: str) -> Callable[[Mapping[str, Any]], float]:
    """A tracked field in the unit of the published metric."""
    if metric == "accuracy_ratio":
        return lambda result: read(result) / result["target_valid_accuracy"]
    return lambda result: (100 if metric.endswith("percent") else 1) * read(result)


def claims(records: Sequence[Record]) -> list[Claim]:
    """The published order of partitioners, in every way to train and decide; what lies beyond it, at 25% activity."""
    found = []
    for kind in kinds(records):
        if len({record.spec.settings["target_seed"] for record in records if kind_of(record) == kind}) < 2:
            continue  # one target says nothing about another
        ways = of_kind(records, kind)
        table = [(way, pair) for way in ways for pair in PUBLISHED_ORDER] + [
            (way, pair) for way in (HELD, LED) for pair in BEYOND
        ]
        for way, (better, worse, source) in table:
            gain = gains(ways[way].get(better, []), ways[way].get(worse, []), lambda r: r["accuracy_ratio"])
            if gain is None:
                continue
            id = f"splits.{better}.{worse}.{kind_id(kind)}.{way}".replace(" ", "-").replace(",", "")
            active = [over_runs(ways[way][name], lambda r: 100 * r["activity"]).format(0).split(" ")[0]
                      for name in (better, worse)]  # fmt: skip
            statement = f"{label(kind)}, {way}: {better} ({active[0]}% active) keeps more of the accuracy than "
            statement += f"{worse} ({active[1]}%)"
            found.append(judge(id, source, statement, gain, above=0.0))
        found.append(_control_claim(kind, ways[LED]))
    return found + _published_levels(records)


def _control_claim(kind: Kind, groups: Mapping[str, Sequence[Record]]) -> Claim:
    """Whether the best split makes a lazy network better than the dense net of equal compute."""
    margins = {
        name: over_runs(group, lambda r: r["accuracy"] - r["control_accuracy"]) for name, group in groups.items()
    }
    best = max(margins, key=lambda name: margins[name].estimate)
    statement = f"{label(kind)}, {LED}: the best split ({best}) beats the dense net of equal compute"
    return judge(f"splits.control.{kind_id(kind)}", "ours", statement, margins[best], above=0.0)


def _published_levels(records: Sequence[Record]) -> list[Claim]:
    """Section 5.2's contextual bandit: its accuracy ratio and activity after one lazy epoch."""
    rows, found = published.load(), []
    group = of_kind(records, PAPER)[PUBLISHED_WAY].get("contextual", [])
    for id, field, metric, what in (
        ("Ps52.16", "worth", "accuracy_ratio", "keeps the published share of the accuracy or more"),
        ("Ps52.06", "activity", "activity_percent", "evaluates the published share of the neurons or more"),
    ):
        read = tracked_at(group, 1, field)
        if read is not None:
            statement = f"{label(PAPER)}: the contextual bandit {what} after one lazy epoch"
            interval = over_runs(group, _scaled(read, metric))
            found.append(judge(f"splits.{id}", id, statement, interval, above=rows[id].value))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 01 that are made from this study."""
    names = ("splits_ratios", "splits_kinds", "splits_trajectories", "splits_gumbel", "splits_groups", "splits_table",
             "splits_size_table")  # fmt: skip
    return dict.fromkeys(names, records)


STUDY = studies.Study(
    name="partitioning-splits",
    title="Every way to split a trained network",
    notebook="01_partitioning",
    specs=specs,
    compute=compute,
    answers=answers,
    claims=claims,
    promises=promises,
    audited=("target_accuracy", "accuracy", "blind_accuracy", "activity", "compute", "control_accuracy"),
)
