"""The network first, then its policy, then both: what *dropout-policies* proposes in its conclusion, by the means of
`02_policies`, for networks of Figures 2 and 4.

Trained densely with dropout at random rates, split into groups that fire together, the policy's first epoch after the
oracle; then weights and policy learn together under hard masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from condcomp_lib import studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.datasets import Dataset
from condcomp_lib.joint_training import activity_by_layer
from condcomp_lib.lazy import evaluate
from condcomp_lib.policy_training import policy_plan
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import joint_results, policies, targets
from condcomp_lib.studies.joint_results import DENSE, NOTEBOOK, OURS, active, control_error, error
from condcomp_lib.studies.lazy_results import gains, over_runs
from condcomp_lib.studies.policy_results import TUNED, no_answers
from condcomp_lib.targets import hidden_widths, multiply_adds
from condcomp_lib.training import control_width, hits, obtain_control, obtain_target

RECIPE = 1
SEEDS = {"quick": 1, "paper": 3}
# Data set and architecture: groups a layer and the share of each layer that is asked for.
NETWORKS: dict[str, dict[tuple[str, str], tuple[int, tuple[float, ...]]]] = {
    "quick": {("digits", "48-32"): (8, (0.3, 0.3))},
    "paper": {
        ("mnist", "256"): (64, (0.07,)),
        ("cifar10", "640-640"): (80, (0.2, 0.15)),
        ("svhn", "800-704"): (100, (0.3, 0.2)),
    },
}
EPS = {"digits": 0.3}  # least keep probability in the dense training; elsewhere 0.5
DENSE_TRAINING = {"digits": {"batch": 32, "epochs": 40, "learning_rate": 1e-3}}
LONG = {"epochs": 24, "learning_rate": 5e-4}  # of the dense training elsewhere, and of controls
EPOCHS = {
    "digits": 8,
    "mnist": 20,
    "cifar10": 12,
    "svhn": 12,
}  # of weights and policy together, after one of the policy alone
MOVED = {"digits": 1, "mnist": 2, "cifar10": 2, "svhn": 2}  # pixels by which pictures are moved then


def specs(profile: str) -> list[RunSpec]:
    """One run per network and seed."""
    return [
        _spec(dataset, architecture, groups, rates, seed)
        for (dataset, architecture), (groups, rates) in NETWORKS[profile].items()
        for seed in range(SEEDS[profile])
    ]


def _spec(dataset: str, architecture: str, groups: int, rates: Sequence[float], seed: int) -> RunSpec:
    brief = policies.TRAINING.get(dataset, policies.TRAINING["svhn"])
    tuning = {**policies.TUNING, "augment": MOVED[dataset], "epochs": EPOCHS[dataset], "warm_start": 1}
    how = {**brief, **policies.COMMON, **policies.WARM_START, **tuning}
    settings = {
        "dataset": dataset,
        "architecture": architecture,
        "pretraining": "dropout-uniform",
        "dropout_eps": EPS.get(dataset, 0.5),
        "target_training": DENSE_TRAINING.get(dataset, LONG),
        "partitioner": "coactivation",
        "groups": groups,
        "scope": "layer",
        "rescale": "none",
        "pool": 0 if dataset == "digits" else 4,
        "method": TUNED,
        "target_seed": seed,
        "partition_seed": seed,
        "policy_seed": seed,
        **policy_plan(tau=float(sum(rates) / len(rates)), rates=list(rates), **how),
    }
    settings["target"] = targets.target_of(settings).name
    return RunSpec("joint-first", RECIPE, settings)


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train (or fetch) the dense network, its policy and the fine-tuned weights; test it, and the dense net of equal
    compute that is distilled from the same network on pictures moved as much."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    lazy, policy, trained = policies.learned(settings, data, artefacts)
    with torch.inference_mode():
        found = evaluate(lazy, torch.from_numpy(data.test.x))
    result: dict[str, Any] = {
        "error": 1 - hits(found.scores, data.test),
        "target_error": 1 - trained.result["test_accuracy"],
        "activity": lazy.partition.activity(found.mask).mean().item(),
        "activity_by_layer": activity_by_layer(lazy, found),
        "compute": lazy.compute(found.mask),
        "multiply_adds": lazy.cost(found.mask).total_multiply_adds,
    }
    control = _control(settings, result["multiply_adds"], trained, data, artefacts)
    result |= {"control_error": 1 - control.result["test_accuracy"]}
    result["control_width"] = hidden_widths(control.spec.settings["architecture"])[0]
    cited = {"target": trained.cite(), "policy": policy.cite(), "control": control.cite()}
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, cited)


def _control(settings: Mapping[str, Any], wanted: float, trained: Record, data: Dataset, artefacts: RunStore) -> Record:
    """The dense net of equal compute; distilled from the target as it was before its weights were fine-tuned."""
    fresh, _ = obtain_target(targets.target_of(settings), data, artefacts)
    width = control_width(fresh, wanted)
    cost = sum(multiply_adds([data.train.x.shape[1], *[width] * len(fresh.hidden), data.classes]))
    return obtain_control(fresh, trained, cost, data, artefacts, seed=settings["target_seed"],
                          augment=settings["augment"], **settings["target_training"])[1]  # fmt: skip


def name_of(record: Record) -> str:
    """A network in words."""
    settings = record.spec.settings
    return f"{settings['dataset']} {settings['architecture']}, {settings['groups']} groups a layer"


def by_network(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each data set and architecture."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.spec.settings["dataset"], record.spec.settings["architecture"]), []).append(record)
    return found


def table(records: Sequence[Record], together: Sequence[Record]) -> list[dict[str, Any]]:
    """Each network beside itself before (dense), the control, and the one that learned together with its policy from
    the start (`together`, records of the study `joint`)."""
    rows, others = [], joint_results.networks(together)
    for key, group in by_network(records).items():
        start = others.get((*key, OURS), [])
        rows.append(
            {
                "network": name_of(group[0]),
                "dense, %": over_runs(group, lambda r: 100 * r["target_error"]).format(2),
                "error, %": over_runs(group, error).format(2),
                "active, %": over_runs(group, active).format(1),
                "by layer": " / ".join(f"{100 * share:.0f}" for share in joint_results.by_layer(group)),
                "compute": over_runs(group, lambda r: r["compute"]).format(3),
                "dense of equal compute, %": over_runs(group, control_error).format(2),
                "together from the start, %": over_runs(start, error).format(2) if start else "",
                "its activity, %": over_runs(start, active).format(0) if start else "",
                "runs": len(group),
            }
        )
    return rows


def claims(records: Sequence[Record], together: Sequence[Record]) -> list[Claim]:
    """Better than the dense net of equal compute, and than the best dense net of the paper's rows (`together`: records
    of the study `joint`)."""
    found, others = [], joint_results.networks(together)
    for (dataset, _), group in by_network(records).items():
        if len(group) < 2:
            continue
        name, id = f"{name_of(group[0])}, dense first", f"joint.first.{dataset}"
        gain = over_runs(group, lambda r: control_error(r) - error(r))
        statement = f"{name}: fewer errors (in points) than the dense net of equal compute"
        found.append(judge(f"{id}.control", "dropout-policies, 6", statement, gain, above=0.0))
        if dataset == "cifar10":
            statement = f"{name}: at most 18% active"
            found.append(judge(f"{id}.active", "ours", statement, over_runs(group, active), below=18.0))
        if dataset == "mnist":
            statement = f"{name}: at most 1.9% wrong"
            found.append(judge(f"{id}.error", "ours", statement, over_runs(group, error), below=1.9))
            continue  # its dense nets are narrower
        rivals = [rival for key, rival in others.items() if key[0] == dataset and key[2] == DENSE]
        if rivals:
            best = min(rivals, key=lambda rival: sum(r.result["error"] for r in rival) / len(rival))
            less = gains(best, group, error)
            assert less is not None
            statement = f"{name}: fewer errors (in points) than the best dense net of the table, "
            statement += best[0].spec.settings["architecture"]
            found.append(
                judge(f"{id}.best-dense", "Ff4.03" if dataset == "svhn" else "Ff2.03", statement, less, above=0.0)
            )
    return found


def judged(records: Sequence[Record]) -> list[Claim]:
    """The claims beside the paper profile's records of the study `joint`, where there are any."""
    quick = any(record.spec.settings["dataset"] == "digits" for record in records)
    return claims(records, [] if quick else studies.records("joint", "paper", partial=True))


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """The table of notebook 06 that is made from this study."""
    return {"joint_first_table": records}


STUDY = studies.Study(
    name="joint-first",
    title="The network first, then its policy",
    notebook=NOTEBOOK,
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=judged,
    promises=promises,
    audited=("error", "activity"),
)
