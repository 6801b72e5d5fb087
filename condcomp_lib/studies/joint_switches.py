"""What the retrospective of *faster-models* would do otherwise, one switch at a time: other optimisers, the policy
switched on late, entropy, a cost for each layer, estimators with less variance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from condcomp_lib import studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import joint
from condcomp_lib.studies.joint_results import NOTEBOOK, active, described, error, last_entropy
from condcomp_lib.studies.lazy_results import gains, over_runs
from condcomp_lib.studies.policy_results import no_answers

RECIPE = 1
SEEDS = {"quick": 1, "paper": 3}
BASE = {  # data set, architecture, block size, tau, epochs
    "quick": ("digits", "48-32", 8, 0.25, 30),
    "paper": ("mnist", "128-128", 16, 0.125, 8),
}
SGD, ADAM = "SGD", "Adam"
MORE = 3.0  # points of activity at which two ways can still be compared
# Rates of the other optimisers: the usual ones, not tuned; momentum 0.9 makes steps about ten times as long.
RATES: dict[str, dict[str, Any]] = {
    "SGD with momentum": {"optimiser": "momentum", "network_rate": 0.0128, "learning_rate": 0.00064},
    "RMSprop": {"optimiser": "rmsprop", "network_rate": 1e-3, "learning_rate": 1e-3},
    ADAM: {"optimiser": "adam", "network_rate": 1e-3, "learning_rate": 1e-3},
}
# Weights at which the paper's losses let two layers learn (see `joint.ADAM`), the same for all optimisers.
WEIGHTS = {"lambda_s": 0.3, "lambda_v": 0.1, "l2": 0.0, "schedule": "cosine"}
KL = {"lambda_s": 0.02, "lambda_v": 0.0}
# One switch each, from the paper's training with Adam.
SWITCHES: dict[str, dict[str, Any]] = {
    "policy on after 3 epochs": {"dense_epochs": 3},
    "entropy kept up": {"options": {"entropy_weight": 0.01}},
    "without L_v": {"lambda_v": 0.0},
    "losses of the code": {"sparsity": "code"},
    "moving baseline": {"baseline": "moving"},
    "normalised costs": {"options": {"normalise": True}},
    "KL in the cost": {**KL, "kl": "cost"},
    "KL in the cost, to go": {**KL, "kl": "cost", "to_go": True},
    "KL corrected": {**KL, "kl": "corrected"},
    "KL corrected, to go": {**KL, "kl": "corrected", "to_go": True},
    "DisARM": {"estimator": "disarm"},
    "Gumbel-sigmoid": {"estimator": "gumbel-sigmoid"},
    "straight-through": {"estimator": "straight-through"},
    "budget-through": {"estimator": "budget-through", "lambda_s": 0.3, "lambda_v": 0.3},
    "sum-and-sample": {"estimator": "sum-and-sample", "lambda_s": 0.1, "lambda_v": 0.0},
}
QUICK = ("Adam", "policy on after 3 epochs", "KL corrected, to go", "budget-through")


def ways() -> dict[str, dict[str, Any]]:
    """Every way to train by name: the optimisers, and the switches on top of Adam."""
    found = {SGD: {**joint.TEXT, **WEIGHTS}}
    for name, rates in RATES.items():
        found[name] = {**found[SGD], **rates}
    for name, own in SWITCHES.items():
        found[name] = {**found[ADAM], **own}
    return found


def specs(profile: str) -> list[RunSpec]:
    """One run per way to train and seed."""
    dataset, architecture, block, tau, epochs = BASE[profile]
    kind = {"dataset": dataset, "architecture": architecture, "block": block}
    found = []
    for name, way in ways().items():
        if profile == "paper" or name in (SGD, *QUICK):
            row = (kind, name, {**way, "tau": tau, "epochs": epochs})
            found += [joint.spec_of(*row, seed) for seed in range(SEEDS[profile])]
    return [RunSpec("joint-switches", RECIPE, spec.settings) for spec in found]


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train one network its way and test it."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    _, result, _, cited = joint.trained(joint.network_spec(settings), data, artefacts)
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, cited)


def by_way(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each way to train."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.spec.settings["method"], []).append(record)
    return groups


def base_of(name: str) -> str:
    """What a way differs from in one switch.

    >>> base_of("KL corrected, to go"), base_of("Adam")
    ('KL corrected', 'SGD')
    """
    if name.endswith(", to go"):
        return name.removesuffix(", to go")
    return SGD if name in RATES else ADAM


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every way: error and activity, and how many points of error less than without its switch."""
    rows, groups = [], by_way(records)
    for name, group in groups.items():
        base = base_of(name)
        gain = gains(groups[base], group, error) if name != SGD and base in groups else None
        rows.append(
            {
                "way": name,
                "instead of": "" if name == SGD else base,
                "error, %": over_runs(group, error).format(2),
                "points less": gain.format(2) if gain and len(group) > 1 else "",
                "active, %": over_runs(group, active).format(1),
                "entropy, nats a bit": over_runs(group, last_entropy).format(3),
                "best epoch": f"{np.mean([r.result['curve']['epoch'] for r in group]):.0f}",
            }
        )
    return rows


def points(records: Sequence[Record]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For the figure: activity and error in % of the runs of each way."""
    return {
        name: (np.array([active(r.result) for r in group]), np.array([error(r.result) for r in group]))
        for name, group in by_way(records).items()
    }


def claims(records: Sequence[Record]) -> list[Claim]:
    """Each switch that leaves no more neurons active leaves fewer errors than the same training without it."""
    groups, found = by_way(records), []
    if not records or len(groups[SGD]) < 2:
        return []
    settings = records[0].spec.settings
    net = f"{settings['dataset']}, {described(settings)}"
    for name, group in groups.items():
        if name == SGD:
            continue
        base = base_of(name)
        gain = gains(groups[base], group, error)
        assert gain is not None
        there, here = (over_runs(part, active).estimate for part in (groups[base], group))
        if here > there + MORE:
            continue  # with more neurons evaluated fewer errors say nothing of the switch
        statement = f"{net}: {name} ({here:.0f}% active) leaves fewer errors (in points) than {base} ({there:.0f}%)"
        id = f"joint.switch.{name.replace(', ', '-').replace(' ', '-')}"
        found.append(judge(id, "retrospective", statement, gain, above=0.0))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 06 that are made from this study."""
    return dict.fromkeys(("joint_switches", "joint_switches_table"), records)


STUDY = studies.Study(
    name="joint-switches",
    title="The retrospective's advice as switches",
    notebook=NOTEBOOK,
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=claims,
    promises=promises,
    audited=("error", "activity"),
)
