"""How a policy learns from the cost of masks: one interface, and the score-function estimators behind it.

REINFORCE is *partitions*, section 3.1. The others lie beside it: `pathwise` (straight-through, Gumbel-sigmoid, Gaussian
noise), `disarm`, `dpg` (*partitions*, section 3.2), `supervised`, and `exact`, which they are measured against.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.lazy import Evaluation, LazyNetwork
from condcomp_lib.policies import Decision, Sample

BASELINES = ("none", "mean", "moving", "leave-one-out")
MOMENTUM = 0.99  # of the moving average
TINY = 1e-8  # added to a standard deviation that is divided by


@dataclass(frozen=True)
class Minibatch:
    """Examples that a policy learns from: the lazy network, its inputs `x` (float32, examples x features), what an
    evaluation costs each example (`cost`, from an `Evaluation` to float32, examples), the first layer's pre-activations
    where known, and whether the gradient of logits goes on into the layers below (see `LazyNetwork.evaluate`)."""

    lazy: LazyNetwork
    x: Tensor
    cost: Callable[[Evaluation], Tensor]
    first: Tensor | None = None
    through: bool = True

    def under(self, decision: Decision) -> tuple[Tensor, Evaluation]:
        """Costs (float32, examples) and the evaluation when masks are decided like this."""
        found = self.lazy.evaluate(self.x, self.first, decision, through=self.through)
        return self.cost(found), found


@dataclass(frozen=True, eq=False)
class Estimate:
    """What an estimator makes of a minibatch: a `loss` whose gradient in the policy's weights is the estimate of that
    of the expected cost (its value may mean nothing), the evaluation it learned from, and that evaluation's costs."""

    loss: Tensor
    found: Evaluation
    costs: Tensor


class Estimator(Protocol):
    """How the gradient of the expected cost, in the policy's weights, is estimated from sampled masks."""

    def __call__(self, minibatch: Minibatch, generator: torch.Generator) -> Estimate:
        """One estimate; whatever is drawn is drawn from `generator`."""
        ...


def log_probability(logits: Tensor, mask: Tensor) -> Tensor:
    """log pi(M | X) of each example (float32): the sum over the bits of `mask` (bool, examples x bits)."""
    return -binary_cross_entropy_with_logits(logits, mask.to(logits.dtype), reduction="none").sum(1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the bits' joint distribution for each example in nats (float32): the sum over independent bits.

    >>> entropy(torch.zeros(1, 2)) / torch.log(torch.tensor(2.0))
    tensor([2.])
    """
    return (softplus(logits) - logits * logits.sigmoid()).sum(1)


class Reinforce:
    """The score-function estimator (C - b) grad log pi(M | X), averaged over the minibatch (Williams 1992).

    `baseline` b: "none"; "mean" of the minibatch's costs, as in *partitions*: an example's own cost is part of it, so
    the gradient is (1 - 1/B) times the true one in expectation; "leave-one-out", the mean of the others' costs, which
    has no such factor; "moving", an exponential average of earlier minibatches' means (none in the first).

    `normalise` divides C - b by its standard deviation over the minibatch: the same direction on average, another
    length. `entropy_weight` subtracts that multiple of the policy's mean entropy, so that it stays undecided longer.
    Both change what is estimated; without them and with "none", "moving" or "leave-one-out" it is unbiased.
    """

    def __init__(self, baseline: str = "mean", *, normalise: bool = False, entropy_weight: float = 0.0) -> None:
        if baseline not in BASELINES:
            raise unknown("baseline", baseline, BASELINES)
        if not 0 <= entropy_weight < float("inf"):
            raise UsageError(f"the entropy's weight must be a number of at least 0, not {entropy_weight}")
        self.baseline, self.normalise, self.entropy_weight = baseline, normalise, entropy_weight
        self.moving: Tensor | None = None

    def __call__(self, minibatch: Minibatch, generator: torch.Generator) -> Estimate:
        """See `Estimator`: one sampled mask for each example."""
        costs, found = minibatch.under(Sample(generator))
        loss = self.loss(costs, log_probability(found.logits, found.mask))
        if self.entropy_weight:
            loss = loss - self.entropy_weight * entropy(found.logits).mean()
        return Estimate(loss, found, costs)

    def loss(self, costs: Tensor, log_probabilities: Tensor) -> Tensor:
        """A number whose gradient is the estimate; its value means nothing.

        Arguments: `costs` C (float32, examples), taken as constants; `log_probabilities` (float32, examples) as from
        `log_probability`, with their graph.
        """
        advantage = self._advantage(costs.detach())
        if self.normalise:
            advantage = advantage / (advantage.std(correction=0) + TINY)
        return (advantage * log_probabilities).mean()

    def _advantage(self, costs: Tensor) -> Tensor:
        if self.baseline in ("mean", "leave-one-out") and len(costs) < 2:
            raise UsageError(f"baseline {self.baseline!r} needs a minibatch of at least two examples, not one")
        if self.baseline == "none":
            return costs
        if self.baseline == "mean":
            return costs - costs.mean()
        if self.baseline == "leave-one-out":
            return (costs - costs.mean()) * (len(costs) / (len(costs) - 1))
        before = torch.zeros(()) if self.moving is None else self.moving
        mean = costs.mean()
        self.moving = mean if self.moving is None else MOMENTUM * self.moving + (1 - MOMENTUM) * mean
        return costs - before


class Dense:
    """No estimate at all: every group is evaluated, and only the target's weights can learn."""

    def __call__(self, minibatch: Minibatch, generator: torch.Generator) -> Estimate:  # noqa: ARG002 (draws nothing)
        """See `Estimator`; the loss is the mean cost."""
        costs, found = minibatch.under(lambda logits, gate: torch.ones_like(logits, dtype=torch.bool))  # noqa: ARG005
        return Estimate(costs.mean() + 0.0 * found.logits.sum(), found, costs.detach())
