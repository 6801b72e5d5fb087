"""Bias and variance of every estimator against the exact gradient, on a network small enough to try every mask."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch.nn.functional import cross_entropy

from condcomp_lib import studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.datasets import Dataset
from condcomp_lib.estimators import Estimator, Minibatch, Reinforce
from condcomp_lib.estimators.disarm import DisARM
from condcomp_lib.estimators.dpg import DPG
from condcomp_lib.estimators.exact import measure_bias
from condcomp_lib.estimators.pathwise import GaussianNoise, GumbelSigmoid, Pathwise, StraightThrough, ThresholdThrough
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.partitions import make_partition
from condcomp_lib.policies import Policy, Pool, Sample
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.stats import Interval
from condcomp_lib.studies import policy_results, targets
from condcomp_lib.training import obtain_target

RECIPE = 1
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "REINFORCE, no baseline": lambda: Reinforce("none"),
    "REINFORCE, mean": lambda: Reinforce("mean"),
    "REINFORCE, leave-one-out": lambda: Reinforce("leave-one-out"),
    "REINFORCE, normalised": lambda: Reinforce("mean", normalise=True),
    "DisARM": DisARM,
    "straight-through": lambda: Pathwise(StraightThrough),
    "threshold-through": lambda: Pathwise(ThresholdThrough),
    "Gumbel-sigmoid": lambda: Pathwise(GumbelSigmoid),
    "Gaussian noise": lambda: Pathwise(GaussianNoise),
    "DPG": lambda: DPG(),
    "DPG, bits": lambda: DPG(reads="bits"),
}
LEVEL, LEAST_P = 0.01, 1e-300
UNBIASED = ("REINFORCE, no baseline", "REINFORCE, leave-one-out", "DisARM")
SAMPLES, WARM_UP = {"quick": 300, "paper": 10_000}, {"quick": 100, "paper": 2000}
QUICK = ("REINFORCE, leave-one-out", "DisARM", "straight-through", "DPG, bits")
WIDTHS, GROUPS, EXAMPLES, POOL = "2x6", 3, 8, 4
SCOPES = ("network", "layer")


def specs(profile: str) -> list[RunSpec]:
    """One run per estimator and scope; digits in both profiles."""
    names = QUICK if profile == "quick" else tuple(ESTIMATORS)
    found = []
    for scope, name in itertools.product(SCOPES, names):
        settings: dict[str, Any] = {
            "dataset": "digits",
            "architecture": WIDTHS,
            "pretraining": "none",
            "dropout_eps": None,
            "groups": GROUPS,
            "scope": scope,
            "estimator": name,
            "examples": EXAMPLES,
            "samples": SAMPLES[profile],
            "warm_up": WARM_UP[profile],
            "target_seed": 0,
            "policy_seed": 0,
        }
        settings["target"] = targets.target_of(settings).name
        found.append(RunSpec("policies-bias", RECIPE, settings))
    return found


def small_minibatch(
    settings: Mapping[str, Any], data: Dataset, artefacts: RunStore, draws: torch.Generator
) -> tuple[Minibatch, Record]:
    """The examples of these settings on a network small enough to try every mask, and the record of its target."""
    target, trained = obtain_target(targets.target_of(settings), data, artefacts)
    target.requires_grad_(False)
    partition = make_partition("balanced", target.hidden, settings["groups"], draws, settings["scope"])
    policy = Policy(partition, data.train.x.shape[1], Pool(data.shape, POOL), draws)
    x, y = (torch.from_numpy(part[: settings["examples"]]) for part in (data.train.x, data.train.y))
    lazy = LazyNetwork(target, partition, policy, Sample(draws))
    return Minibatch(lazy, x, lambda found: cross_entropy(found.scores, y, reduction="none")), trained


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Estimate one gradient again and again at fixed weights; an estimator that learns is warmed up before."""
    settings = spec.settings
    data, draws = studies.dataset(settings["dataset"]), torch.Generator().manual_seed(settings["policy_seed"])
    minibatch, trained = small_minibatch(settings, data, artefacts, draws)
    estimator = ESTIMATORS[settings["estimator"]]()
    for _ in range(settings["warm_up"] if isinstance(estimator, DPG) else 0):
        estimator(minibatch, draws)
    found = measure_bias(estimator, minibatch, settings["samples"], draws)
    result = dataclasses.asdict(found)
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, {"target": trained.cite()})


def combined(records: Sequence[Record]) -> dict[str, float]:
    """For each estimator the p-value of no bias in any scope, both scopes' combined by Fisher's method: among
    many tests one or the other rejects by chance."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record.spec.settings["estimator"], []).append(record.result["p_value"])
    # A p-value of 0 has no logarithm.
    return {name: float(stats.combine_pvalues(np.maximum(ps, LEAST_P)).pvalue) for name, ps in found.items()}


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Bias, spread and test of every estimator, by scope."""
    both = combined(records)
    return [
        {
            "scope": record.spec.settings["scope"],
            "estimator": record.spec.settings["estimator"],
            "bias": f"{record.result['bias']:.3f}",
            "standard error": f"{record.result['noise']:.3f}",
            "standard deviation": f"{record.result['deviation']:.2f}",
            "cosine": f"{record.result['cosine']:.3f}",
            "T² (directions)": f"{record.result['statistic']:.1f} ({record.result['freedom']})",
            "p": f"{record.result['p_value']:.2g}",
            "p, both scopes": f"{both[record.spec.settings['estimator']]:.2g}",
        }
        for record in records
    ]


def errors(records: Sequence[Record]) -> dict[str, dict[str, tuple[float, float]]]:
    """For each estimator and scope the bias with the p-value of none, and the standard deviation of one estimate."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    both = combined(records)
    for record in records:
        name, scope = record.spec.settings["estimator"], record.spec.settings["scope"]
        own = found.setdefault(name, {})
        own[scope] = (record.result["bias"], both[name])
        own[f"deviation, {scope}"] = (record.result["deviation"], 0.0)
    return found


def finding(records: Sequence[Record]) -> str:
    """Which estimators are told from unbiased ones, and whose estimates vary least, in words with numbers filled in."""
    said = ", ".join(name for name, p in combined(records).items() if p > LEVEL) or "none"
    rows = sorted(records, key=lambda record: record.result["deviation"])
    drawn = [record for record in rows if record.result["deviation"] > 0]
    least, most = drawn[0], drawn[-1]
    return (
        f"Not told from the exact gradient at 1%: {said}. Among those that draw at all, one estimate varies least with "
        f"{least.spec.settings['estimator']} ({least.result['deviation']:.2f} of the gradient, bias "
        f"{least.result['bias']:.2f}) and most with {most.spec.settings['estimator']} "
        f"({most.result['deviation']:.2f}, bias {most.result['bias']:.2f})."
    )


def claims(records: Sequence[Record]) -> list[Claim]:
    """Estimators that are unbiased on paper are not told from the exact gradient at 1%."""
    found = []
    for name, p in combined(records).items():
        if name in UNBIASED:
            samples = records[0].spec.settings["samples"]
            id = f"bias.{name.replace(', ', '.').replace(' ', '-')}".lower()
            statement = f"{name}: the mean of {samples:,} estimates is not told from the exact gradient at 1% (p-value)"
            found.append(judge(id, "ours", statement, Interval(p, p, p, samples, 0.95), above=LEVEL))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 02 that are made from this study."""
    return dict.fromkeys(("policies_bias", "policies_bias_table"), records)


STUDY = studies.Study(
    name="policies-bias",
    title="Bias and variance of estimators",
    notebook="02_policies",
    specs=specs,
    compute=compute,
    answers=policy_results.no_answers,
    claims=claims,
    promises=promises,
    audited=("deviation",),
)
