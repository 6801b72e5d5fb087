"""DisARM, an unbiased estimator from antithetic pairs of masks (Dong, Mnih, Tucker 2020)."""

import torch
from torch import Tensor

from condcomp_lib.estimators import Estimate, Minibatch


class _Pair:
    """A decision that records the uniform numbers it draws, or repeats the bits of another evaluation up to a gate,
    takes the antithetic ones there and draws new ones above."""

    def __init__(self, generator: torch.Generator, other: "_Pair | None" = None, gate: int = 0) -> None:
        self.generator, self.other, self.gate = generator, other, gate
        self.uniforms: list[Tensor] = []
        self.bits: list[Tensor] = []

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        if self.other is None or gate > self.gate:
            self.uniforms.append(torch.rand(logits.shape, generator=self.generator))
            self.bits.append(self.uniforms[-1] < logits.sigmoid())
        elif gate < self.gate:
            self.bits.append(self.other.bits[gate])
        else:
            self.bits.append(1 - self.other.uniforms[gate] < logits.sigmoid())
        return self.bits[-1]


class DisARM:
    """Each gate is sampled twice, with uniform numbers u and 1 - u; where a bit differs between the two, the difference
    of the costs says which value is better:

        grad_logit = 1/2 (C(b) - C(b')) (-1)^{b'} 1(b != b') sigma(|logit|).

    The gates above see other layers under b' than under b, so they are drawn anew and every gate has a pair of its own:
    one evaluation more than there are gates.
    """

    def __call__(self, minibatch: Minibatch, generator: torch.Generator) -> Estimate:
        """See `Estimator`."""
        base = _Pair(generator)
        costs, found = minibatch.under(base)
        loss = torch.zeros(())
        gates = len(minibatch.lazy.policy.gates)
        for gate, logits in enumerate(found.logits.split(found.logits.shape[1] // gates, dim=1)):
            with torch.no_grad():
                pair = _Pair(generator, base, gate)
                difference = costs.detach() - minibatch.under(pair)[0]
                sign = base.bits[gate].to(logits.dtype) - pair.bits[gate].to(logits.dtype)
                gradient = 0.5 * difference[:, None] * sign * logits.abs().sigmoid()
            loss = loss + (gradient * logits).sum(1).mean()
        return Estimate(loss, found, costs.detach())
