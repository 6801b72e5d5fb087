"""How a policy learns from the cost of sampled masks: REINFORCE and its baselines (*partitions*, section 3.1)."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from condcomp_lib.errors import UsageError, unknown

BASELINES = ("none", "mean", "moving", "leave-one-out")
MOMENTUM = 0.99  # of the moving average


def log_probability(logits: Tensor, mask: Tensor) -> Tensor:
    """log pi(M | X) of each example (float32): the sum over the bits of `mask` (bool, examples x bits)."""
    return -binary_cross_entropy_with_logits(logits, mask.to(logits.dtype), reduction="none").sum(1)


class Reinforce:
    """The score-function estimator (C - b) grad log pi(M | X), averaged over the minibatch (Williams 1992).

    `baseline` b: "none"; "mean" of the minibatch's costs, as in *partitions*: an example's own cost is part of it, so
    the gradient is (1 - 1/B) times the true one in expectation; "leave-one-out", the mean of the others' costs, which
    has no such factor; "moving", an exponential average of earlier minibatches' means (none in the first).
    """

    def __init__(self, baseline: str = "mean") -> None:
        if baseline not in BASELINES:
            raise unknown("baseline", baseline, BASELINES)
        self.baseline = baseline
        self.moving: Tensor | None = None

    def loss(self, costs: Tensor, log_probabilities: Tensor) -> Tensor:
        """A number whose gradient is the estimate; its value means nothing.

        Arguments: `costs` C (float32, examples), taken as constants; `log_probabilities` (float32, examples) as from
        `log_probability`, with their graph.
        """
        advantage = self._advantage(costs.detach())
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
