"""The estimators by name: what each is made from, the options it takes, and what it can train."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from condcomp_lib.errors import UsageError
from condcomp_lib.estimators import Dense, Estimator, Reinforce
from condcomp_lib.estimators.disarm import DisARM
from condcomp_lib.estimators.dpg import DPG
from condcomp_lib.estimators.pathwise import (
    BudgetThrough,
    GaussianNoise,
    GumbelSigmoid,
    Pathwise,
    StraightThrough,
    ThresholdThrough,
)
from condcomp_lib.estimators.sum_and_sample import SumAndSample
from condcomp_lib.estimators.supervised import Supervised
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.oracle import Oracle
from condcomp_lib.policies import Budget

# What each estimator is made from: the settings' options, the lazy network and the share of groups asked of each gate.
Maker = Callable[[Mapping[str, Any], LazyNetwork, Sequence[float]], Estimator]
ESTIMATORS: dict[str, Maker] = {
    "dense": lambda own, lazy, asked: Dense(),  # noqa: ARG005
    "reinforce": lambda own, lazy, asked: Reinforce(**own),  # noqa: ARG005
    "dpg": lambda own, lazy, asked: DPG(**own),  # noqa: ARG005
    "dpg-bits": lambda own, lazy, asked: DPG(reads="bits", **own),  # noqa: ARG005
    "disarm": lambda own, lazy, asked: DisARM(**own),  # noqa: ARG005
    "straight-through": lambda own, lazy, asked: Pathwise(StraightThrough),  # noqa: ARG005
    "threshold-through": lambda own, lazy, asked: Pathwise(ThresholdThrough),  # noqa: ARG005
    "budget-through": lambda own, lazy, asked: Pathwise(lambda draws: BudgetThrough(draws, counts(lazy, asked), **own)),
    "sum-and-sample": lambda own, lazy, asked: SumAndSample(lambda: counts(lazy, asked)),  # noqa: ARG005
    "gumbel-sigmoid": lambda own, lazy, asked: Pathwise(lambda draws: GumbelSigmoid(draws, **own)),  # noqa: ARG005
    "gaussian": lambda own, lazy, asked: Pathwise(lambda draws: GaussianNoise(draws, **own)),  # noqa: ARG005
    "regression": lambda own, lazy, asked: Supervised(_oracle(lazy), asked, "regression"),  # noqa: ARG005
    "cross-entropy": lambda own, lazy, asked: Supervised(_oracle(lazy), asked, "cross-entropy"),  # noqa: ARG005
}
SUPERVISED = ("regression", "cross-entropy")
BUDGETED = ("budget-through", "sum-and-sample")  # a fixed number of groups is evaluated for every example
# Those whose loss is the cost itself, so that the target's weights have a gradient in it.
TUNING = (
    "dense",
    "sum-and-sample",
    "straight-through",
    "threshold-through",
    "budget-through",
    "gumbel-sigmoid",
    "gaussian",
)
_OPTIONS = {
    "reinforce": ("normalise", "entropy_weight"),
    **dict.fromkeys(("dpg", "dpg-bits"), ("noise", "capacity", "batch", "hidden", "rate", "seed")),
    "budget-through": ("noise",),
    "gumbel-sigmoid": ("temperature",),
    "gaussian": ("deviation",),
}


def check_options(estimator: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError unless the estimator takes these options, with these values."""
    known = _OPTIONS.get(estimator, ())
    for name in options:
        if name not in known:
            takes = ", ".join(known) or "none"
            raise UsageError(f"estimator {estimator!r} has no option {name!r}; known: {takes}")
    draws = torch.Generator()
    if estimator == "budget-through":
        BudgetThrough(draws, (), **options)
    if estimator in ("gumbel-sigmoid", "gaussian"):
        {"gumbel-sigmoid": GumbelSigmoid, "gaussian": GaussianNoise}[estimator](draws, **options)
    if estimator in ("reinforce", "dpg", "dpg-bits"):
        (Reinforce if estimator == "reinforce" else DPG)(**options)


def counts(lazy: LazyNetwork, asked: Sequence[float]) -> tuple[int, ...]:
    """The number of groups nearest to the asked share, for each gate."""
    return Budget.of(tuple(asked), lazy.partition, lazy.policy).counts


def _oracle(lazy: LazyNetwork) -> Oracle:
    """The oracle of the lazy network that a router learns from."""
    if lazy.policy.always_on:
        raise UsageError("a supervised router needs a policy without an always-on group")
    return Oracle(lazy.mlp, lazy.partition, lazy.policy.pool)
