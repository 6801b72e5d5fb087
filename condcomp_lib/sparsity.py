"""Regularisers of a policy's probabilities (*faster-models*, section 3.2): L_b, L_e, L_v."""

from torch import Tensor

from condcomp_lib.errors import UsageError


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


def sparsity_loss(sigma: Tensor, tau: float, lambda_s: float, lambda_v: float = 0.0) -> Tensor:
    """lambda_s (L_b + L_e) + lambda_v L_v, the sum that *faster-models* adds to the loss."""
    loss = lambda_s * (batch_loss(sigma, tau) + example_loss(sigma, tau))
    return loss + lambda_v * variance_loss(sigma) if lambda_v else loss
