"""Regularisers of a policy's probabilities (*faster-models*, section 3.2; *dropout-policies*) and of its activity.

`sparsity_loss` is what the studies of *partitions* use, over all bits together; `gated_loss` takes the gates one by one
in any of FORMS.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from condcomp_lib.errors import UsageError, unknown

CODE_EXAMPLE_WEIGHT = 0.001  # of L_e in the authors' code
CODE_UNIT_WEIGHT = 0.1  # of the variance across units in the authors' code's L_v
LEAST = 1e-6  # probabilities stay as far from 0 and 1 in a KL divergence


def check_tau(tau: float) -> None:
    """Raise UsageError unless the sparsity target is in (0, 1]."""
    if not 0 < tau <= 1:
        raise UsageError(f"the sparsity target tau must be in (0, 1], not {tau}")


def batch_loss(sigma: Tensor, tau: float) -> Tensor:
    """L_b = sum_j | mean_i sigma_ij - tau |: each group's mean probability over the minibatch should be tau.

    `sigma` float32 (examples i x groups j).
    """
    check_tau(tau)
    return (sigma.mean(0) - tau).abs().sum()


def example_loss(sigma: Tensor, tau: float) -> Tensor:
    """L_e = mean_i | mean_j sigma_ij - tau |: each example should evaluate a share tau of the groups."""
    check_tau(tau)
    return (sigma.mean(1) - tau).abs().mean()


def variance_loss(sigma: Tensor) -> Tensor:
    """L_v = - sum_j var_i sigma_ij: each group should be decided differently for different examples.

    >>> import torch
    >>> variance_loss(torch.tensor([[0.0], [1.0]]))
    tensor(-0.2500)
    """
    if len(sigma) < 2:
        raise UsageError("L_v needs a minibatch of at least two examples, not one")
    return -sigma.var(0, correction=0).sum()


def squared_loss(sigma: Tensor, tau: float) -> Tensor:
    """L_b + L_e as in the authors' code for fully connected nets: squares instead of distances, sums over examples, L_e
    times 0.001. (Its costs are sums over a minibatch, too: weights there act 128 times as strongly.)"""
    check_tau(tau)
    batch = (sigma.mean(0) - tau).square().sum()
    return batch + CODE_EXAMPLE_WEIGHT * (sigma.mean(1) - tau).square().sum()


def code_variance_loss(sigma: Tensor) -> Tensor:
    """L_v as in the authors' code: a tenth of the variance across units is added to that across examples."""
    return variance_loss(sigma) - CODE_UNIT_WEIGHT * sigma.var(1, correction=0).sum()


def rate_loss(sigma: Tensor, tau: float) -> Tensor:
    """k (mean_ij sigma_ij - tau)^2, k the groups: only the mean activity is asked for; who gets it is left open."""
    check_tau(tau)
    return sigma.shape[1] * (sigma.mean() - tau).square()


def divergence(sigma: Tensor, tau: float) -> Tensor:
    """sum_j KL(sigma_ij || tau) of each example (float32), from the base rate `tau` (*dropout-policies*, equation 5).

    >>> divergence(torch.full((1, 2), 0.5), 0.5)
    tensor([0.])
    """
    check_tau(tau)
    sigma, q = sigma.clamp(LEAST, 1 - LEAST), min(max(tau, LEAST), 1 - LEAST)
    return (sigma * (sigma / q).log() + (1 - sigma) * ((1 - sigma) / (1 - q)).log()).sum(1)


def kl_loss(sigma: Tensor, tau: float) -> Tensor:
    """mean_i sum_j KL(sigma_ij || tau), with its own gradient. The paper has it inside REINFORCE's cost, which leaves
    that gradient out."""
    return divergence(sigma, tau).mean()


# How the activity of one gate is held to tau, and which L_v goes with it.
FORMS: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor], Tensor]]] = {
    "text": (lambda sigma, tau: batch_loss(sigma, tau) + example_loss(sigma, tau), variance_loss),
    "code": (squared_loss, code_variance_loss),
    "rate": (rate_loss, variance_loss),
    "kl": (kl_loss, variance_loss),
}


def gated_loss(
    sigma: Sequence[Tensor], taus: Sequence[float], form: str, lambda_s: float, lambda_v: float = 0.0
) -> Tensor:
    """lambda_s times the sparsity loss of this form plus lambda_v L_v, summed over the gates.

    Arguments: `sigma` (float32, examples x groups) of each gate, probabilities or numbers that stand for bits; `taus`
    the sparsity target of each; `form` one of FORMS.
    """
    if form not in FORMS:
        raise unknown("form of the sparsity loss", form, FORMS)
    if len(sigma) != len(taus):
        raise UsageError(f"{len(sigma)} gates need as many sparsity targets, not {len(taus)}")
    hold, vary = FORMS[form]
    total = torch.zeros(())
    for own, tau in zip(sigma, taus, strict=True):
        total = total + lambda_s * hold(own, tau)
        if lambda_v:
            total = total + lambda_v * vary(own)
    return total


def sparsity_loss(sigma: Tensor, tau: float, lambda_s: float, lambda_v: float = 0.0) -> Tensor:
    """lambda_s (L_b + L_e) + lambda_v L_v, the sum that *faster-models* adds to the loss."""
    loss = lambda_s * (batch_loss(sigma, tau) + example_loss(sigma, tau))
    return loss + lambda_v * variance_loss(sigma) if lambda_v else loss
