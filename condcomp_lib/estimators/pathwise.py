"""Estimators that send the gradient of the scores through the bits: straight-through (sampled, by a threshold or by a
budget), Gumbel-sigmoid, Gaussian noise.

They are biased and vary little. Each is a decision whose numbers stand for the bits and carry a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from condcomp_lib.errors import UsageError
from condcomp_lib.estimators import Estimate, Minibatch
from condcomp_lib.policies import Budget, Decision

LEAST_UNIFORM = 1e-6  # uniform numbers stay as far from 0 and 1, so that their logarithms are finite


def gumbel_noise(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel numbers in the shape of `logits`: added to these, the highest k are k picks without replacement,
    each by the softmax of those that are left (Kool et al. 2019)."""
    u = torch.rand(logits.shape, generator=generator).clamp(LEAST_UNIFORM, 1 - LEAST_UNIFORM)
    return -(-u.log()).log()


@dataclass(frozen=True)
class StraightThrough:
    """The sampled bits going forward, the probabilities sigma going backward (Bengio, Leonard, Courville 2013, in the
    variant with the slope of the sigmoid)."""

    generator: torch.Generator

    def __call__(self, logits: Tensor, gate: int) -> Tensor:  # noqa: ARG002 (all gates alike)
        """See `Decision`; float32."""
        sigma = logits.sigmoid()
        return _through(torch.rand(logits.shape, generator=self.generator) < sigma, sigma)


@dataclass(frozen=True)
class ThresholdThrough:
    """The bits of a threshold at 0.5 going forward, the probabilities sigma going backward: nothing is sampled."""

    generator: torch.Generator

    def __call__(self, logits: Tensor, gate: int) -> Tensor:  # noqa: ARG002 (all gates alike)
        """See `Decision`; float32."""
        return _through(logits > 0, logits.sigmoid())


@dataclass(frozen=True)
class BudgetThrough:
    """The `counts[gate]` groups with the highest logits going forward, the probabilities sigma going backward. The
    logits carry Gumbel noise of this scale: at 1 a group is drawn with the softmax of the logits (Kool et al. 2019)."""

    generator: torch.Generator
    counts: tuple[int, ...]
    noise: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise UsageError(f"the noise's scale must be a number of at least 0, not {self.noise}")

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """See `Decision`; float32."""
        noisy = logits.detach() + self.noise * gumbel_noise(logits, self.generator)
        return _through(Budget(self.counts)(noisy, gate), logits.sigmoid())


@dataclass(frozen=True)
class GumbelSigmoid:
    """sigmoid((logit + g) / temperature), g logistic noise: a binary Concrete number (Maddison et al. 2017, Jang et al.
    2017), which becomes the sampled bit as the temperature falls. Between 0 and 1, so a group is partly evaluated."""

    generator: torch.Generator
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"the temperature must be a number above 0, not {self.temperature}")

    def __call__(self, logits: Tensor, gate: int) -> Tensor:  # noqa: ARG002 (all gates alike)
        """See `Decision`; float32."""
        u = torch.rand(logits.shape, generator=self.generator).clamp(LEAST_UNIFORM, 1 - LEAST_UNIFORM)
        return ((logits + u.logit()) / self.temperature).sigmoid()


@dataclass(frozen=True)
class GaussianNoise:
    """sigma plus Gaussian noise, cut to [0, 1]: the small noise that the retrospective wishes for in place of discrete
    jumps. No bit is drawn in training."""

    generator: torch.Generator
    deviation: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.deviation < float("inf"):
            raise UsageError(f"the noise's standard deviation must be a number of at least 0, not {self.deviation}")

    def __call__(self, logits: Tensor, gate: int) -> Tensor:  # noqa: ARG002 (all gates alike)
        """See `Decision`; float32."""
        sigma = logits.sigmoid()
        noisy = sigma + self.deviation * torch.randn(logits.shape, generator=self.generator)
        # Where it is cut the gradient goes on as if it were not, or a sure policy could not change its mind.
        return sigma + (noisy.clamp(0, 1) - sigma).detach()


class Pathwise:
    """The gradient of the mean cost through a relaxed decision; `relaxed(generator)` makes the decision."""

    def __init__(self, relaxed: Callable[[torch.Generator], Decision]) -> None:
        self.relaxed = relaxed

    def __call__(self, minibatch: Minibatch, generator: torch.Generator) -> Estimate:
        """See `Estimator`."""
        costs, found = minibatch.under(self.relaxed(generator))
        return Estimate(costs.mean(), found, costs.detach())


def _through(bits: Tensor, sigma: Tensor) -> Tensor:
    return bits.to(sigma.dtype) + (sigma - sigma.detach())
