"""Every run of a declared random search (*faster-models*, Figure 3), and what lambda_s and lambda_v do (Figure 5)."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from condcomp_lib import stats, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import joint, joint_time
from condcomp_lib.studies.joint_results import DENSE, NOTEBOOK, active, described, error, last_entropy
from condcomp_lib.studies.lazy_results import over_runs
from condcomp_lib.studies.policy_results import no_answers

RECIPE = 1
SEARCHED = {"quick": 3, "paper": 16}  # conditional nets; half as many dense ones
DRAW = 2015
# What is drawn: widths by layer, block size, tau of both layers, learning rates, lambda_s and lambda_v.
SPACE: dict[str, dict[str, tuple[Any, ...]]] = {
    "digits": {"first": (48, 96), "second": (32, 64), "block": (8, 16), "tau": (0.125, 0.25),
               "rate": (1e-3, 3e-3), "lambda_s": (0.1, 0.3), "lambda_v": (0.0, 0.1)},
    "svhn": {"first": (224, 448, 800), "second": (128, 352, 704), "block": (16, 32), "tau": (1 / 22, 1 / 11, 1 / 5),
             "rate": (3e-4, 1e-3, 3e-3), "lambda_s": (0.03, 0.1, 0.3), "lambda_v": (0.0, 0.01, 0.03)},
}  # fmt: skip
EPOCHS = {"digits": 20, "svhn": 3}
# The sweeps: the network of Figure 5, trained as published but for one weight.
SWEPT = {
    "quick": ("digits", "48-32", 8, 0.25, 20, 1),
    "paper": ("cifar10", "256-512", 16, 1 / 16, 5, 2),  # data set, architecture, block, tau, epochs, seeds
}
LAMBDA_S = {"quick": (0.03, 0.3), "paper": (0.02, 0.05, 0.2, 0.5, 1.0)}
LAMBDA_V = {"quick": (0.0, 0.1), "paper": (0.0, 0.01, 0.03, 0.1, 0.3)}
SEARCH, SWEEP_S, SWEEP_V = "search", "lambda_s", "lambda_v"


def drawn(profile: str) -> list[joint.Row]:
    """The networks of the search, conditional and dense, drawn once from SPACE; all learn by REINFORCE and Adam."""
    dataset = "digits" if profile == "quick" else "svhn"
    draw, space = random.Random(DRAW), SPACE[dataset]
    rows = list[joint.Row]()
    for number in range(SEARCHED[profile]):
        own = {name: draw.choice(values) for name, values in space.items()}
        kind = {"dataset": dataset, "architecture": f"{own['first']}-{own['second']}", "block": own["block"]}
        plan = {"estimator": "reinforce", "epochs": EPOCHS[dataset], "network_rate": own["rate"],
                "learning_rate": draw.choice(space["rate"]), "keep": "last",
                **{name: own[name] for name in ("tau", "lambda_s", "lambda_v")}}  # fmt: skip
        rows.append((kind, SEARCH, plan))
        while number % 2:
            architecture = f"{draw.choice(space['first'])}-{draw.choice(space['second'])}"
            plan = {"epochs": EPOCHS[dataset], "network_rate": draw.choice(space["rate"]), "keep": "last"}
            row = joint.dense_row(dataset, architecture, **plan)
            if row not in rows:  # no network twice
                rows.append(row)
                break
    return rows


def specs(profile: str) -> list[RunSpec]:
    """One run per network of the search, and per weight and seed of the sweeps."""
    found = [_spec(SEARCH, row, 0, profile) for row in drawn(profile)]
    dataset, architecture, block, tau, epochs, seeds = SWEPT[profile]
    kind = {"dataset": dataset, "architecture": architecture, "block": block}
    for part, weights in ((SWEEP_S, LAMBDA_S), (SWEEP_V, LAMBDA_V)):
        rows = [(kind, part, {**joint.ADAM, "tau": tau, "epochs": epochs, part: weight}) for weight in weights[profile]]
        found += [_spec(part, row, seed, profile) for row in rows for seed in range(seeds)]
    return found


def _spec(part: str, row: joint.Row, seed: int, profile: str) -> RunSpec:
    settings = joint.spec_of(*row, seed).settings
    return RunSpec("joint-search", RECIPE, {**settings, "part": part, "repeats": joint_time.REPEATS[profile]})


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train one network, test it, and time a pass over test examples by compiled kernels (a dense net: by its fastest
    engine)."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    lazy, result, mask, cited = joint.trained(joint.network_spec(settings), data, artefacts)
    shown = None if settings["method"] == DENSE else mask
    result["us"] = joint_time.pass_us(lazy, data, shown, settings["repeats"])
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, cited)


def searched(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """For Figure 3: (microseconds an example, error in %) of every conditional and every dense run of the search."""
    found: dict[str, list[tuple[float, float]]] = {"conditional": [], "dense": []}
    for record in joint_time.part_of(records, SEARCH):
        kind = "dense" if record.spec.settings["method"] == DENSE else "conditional"
        found[kind].append((record.result["us"], error(record.result)))
    return {name: np.array(points) for name, points in found.items()}


def swept(records: Sequence[Record], part: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """For Figure 5a: the weights, and by seed (seeds x weights) the error and the activity in %, and microseconds an
    example."""
    groups = _by_weight(records, part)
    values = {"error": error, "active": active, "us": lambda r: r["us"]}
    found = {name: np.array([[value(r.result) for r in group] for group in groups.values()]).T
             for name, value in values.items()}  # fmt: skip
    return list(groups), found


def first_epochs(records: Sequence[Record]) -> dict[float, np.ndarray]:
    """For Figure 5b: validation error in % after each epoch (seeds x epochs) by lambda_v."""
    return {weight: np.array([100 * (1 - np.array(r.result["curve"]["accuracy"])) for r in group])
            for weight, group in _by_weight(records, SWEEP_V).items()}  # fmt: skip


def _by_weight(records: Sequence[Record], part: str) -> dict[float, list[Record]]:
    groups: dict[float, list[Record]] = {}
    for record in joint_time.part_of(records, part):
        groups.setdefault(record.spec.settings["training"][part], []).append(record)
    return groups


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every network of the search, the best first."""
    rows = []
    for record in sorted(joint_time.part_of(records, SEARCH), key=lambda r: r.result["error"]):
        settings, result = record.spec.settings, record.result
        training = settings["training"]
        dense = settings["method"] == DENSE
        rows.append(
            {
                "network": described(settings),
                "tau": "" if dense else f"{training['tau']:.3f}",
                "rate, network": f"{training['network_rate']:g}",
                "rate, policy": "" if dense else f"{training['learning_rate']:g}",
                "lambda_s, lambda_v": "" if dense else f"{training['lambda_s']:g}, {training['lambda_v']:g}",
                "error, %": f"{error(result):.1f}",
                "active, %": "" if dense else f"{active(result):.0f}",
                "multiply-adds": f"{result['multiply_adds'] / 1000:,.0f}k",
                "us an example": f"{result['us']:.1f}",
            }
        )
    return rows


def sweep_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Both sweeps as a table: error, activity and time for each weight."""
    return [
        {
            "weight": part,
            "is": f"{weight:g}",
            "runs": len(group),
            "error, %": over_runs(group, error).format(1),
            "active, %": over_runs(group, active).format(1),
            "us an example": over_runs(group, lambda r: r["us"]).format(1),
            "entropy, nats a bit": over_runs(group, last_entropy).format(3),
        }
        for part in (SWEEP_S, SWEEP_V)
        for weight, group in _by_weight(records, part).items()
    ]


def claims(records: Sequence[Record]) -> list[Claim]:
    """What Figure 5 shows: more lambda_s, less activity; and lambda_v makes policies decide."""
    found = []
    for part, value, id, statement in (
        (SWEEP_S, active, "activity", "the highest lambda_s leaves fewer neurons active (in points) than the lowest"),
        (SWEEP_V, last_entropy, "entropy", "the highest lambda_v leaves less entropy (nats a bit) than none"),
        (SWEEP_V, error, "error", "the highest lambda_v leaves fewer errors (in points) than none"),
    ):
        groups = list(_by_weight(records, part).values())
        if groups and len(groups[0]) > 1:
            fall = [value(low.result) - value(high.result) for low, high in zip(groups[0], groups[-1], strict=True)]
            low, high = (over_runs(part, active).estimate for part in (groups[0], groups[-1]))
            name = f"{records[-1].spec.settings['dataset']}, {described(records[-1].spec.settings)}: {statement} "
            name += f"({high:.0f}% against {low:.0f}% active)"
            found.append(judge(f"joint.sweep.{part}.{id}", "faster-models, Figure 5", name, stats.interval(fall),
                               above=0.0))  # fmt: skip
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 06 that are made from this study."""
    names = ("joint_search", "joint_search_table", "joint_sweeps", "joint_sweeps_table")
    return dict.fromkeys(names, records)


STUDY = studies.Study(
    name="joint-search",
    title="A declared random search, and lambda_s and lambda_v",
    notebook=NOTEBOOK,
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=claims,
    promises=promises,
    audited=("error", "activity"),
)
