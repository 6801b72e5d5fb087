"""What estimators are measured against: the exact gradient by enumeration of every mask, bias and variance."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from condcomp_lib.errors import UsageError
from condcomp_lib.estimators import Estimator, Minibatch, log_probability
from condcomp_lib.policies import Given

MOST_BITS = 12
RANK_TOLERANCE = 1e-6  # directions that vary less than this share of the widest one are taken as not varying


def exact_cost(minibatch: Minibatch) -> Tensor:
    """The expected cost, sum over all masks of pi(M | X) C(M), mean over the examples, with its graph in the policy.

    Raises UsageError for more than MOST_BITS bits, 2^MOST_BITS evaluations, and where bits are not only drawn.
    """
    partition = minibatch.lazy.partition
    if minibatch.lazy.policy.always_on or minibatch.lazy.rescale == "sigma":
        raise UsageError("the exact cost is that of plainly drawn bits: no always-on group, and no rescaling by sigma")
    if partition.bits > MOST_BITS:
        raise UsageError(f"every mask of {partition.bits} bits cannot be tried; at most {MOST_BITS} bits")
    total = torch.zeros(())
    for bits in itertools.product((False, True), repeat=partition.bits):
        costs, found = minibatch.under(Given(torch.tensor([bits])))
        total = total + (log_probability(found.logits, found.mask).exp() * costs.detach()).mean()
    return total


def gradient(loss: Tensor, minibatch: Minibatch) -> np.ndarray:
    """The gradient of `loss` in the policy's weights as one vector (float64, weights)."""
    weights = list(minibatch.lazy.policy.parameters())
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    filled = [torch.zeros_like(w) if part is None else part for w, part in zip(weights, parts, strict=True)]
    return torch.cat([part.flatten() for part in filled]).double().numpy()


@dataclass(frozen=True)
class Bias:
    """Estimates of one gradient against the exact one.

    `bias` is the length of the mean error over the length of the exact gradient, `noise` that length of the mean's
    standard error (a bias below it cannot be told from none); `deviation` the root of the total variance over the
    length of the exact gradient; `cosine` between mean estimate and exact gradient; `statistic`, Hotelling's T^2 of all
    components jointly, follows a chi-square distribution with `freedom` degrees where there is no bias and samples are
    many; `p_value` is the chance to exceed it, by the F distribution that holds for few samples, too.
    """

    bias: float
    noise: float
    deviation: float
    cosine: float
    statistic: float
    freedom: int
    p_value: float


def measure_bias(estimator: Estimator, minibatch: Minibatch, samples: int, generator: torch.Generator) -> Bias:
    """Draw `samples` estimates at fixed weights and compare their mean with the exact gradient.

    An estimator that learns (a critic, a moving baseline) does so while it is measured.
    """
    exact = gradient(exact_cost(minibatch), minibatch)
    found = np.stack([gradient(estimator(minibatch, generator).loss, minibatch) for _ in range(samples)])
    return compare(found, exact)


def compare(found: np.ndarray, exact: np.ndarray) -> Bias:
    """Compare estimates `found` (float64, samples x weights) with the `exact` gradient (float64, weights).

    Raises UsageError when there are not more samples than weights, or the exact gradient is zero.
    """
    if len(found) <= len(exact):
        raise UsageError(f"a joint test of {len(exact)} weights needs more samples than that, not {len(found)}")
    mean, length = found.mean(0), float(np.linalg.norm(exact))
    if not length:
        raise UsageError("the exact gradient is zero: there is nothing to measure a bias against")
    error, spread = mean - exact, np.atleast_2d(np.cov(found, rowvar=False)) / len(found)
    values, axes = np.linalg.eigh(spread)
    kept = values > RANK_TOLERANCE * max(values.max(), 0)
    along = (axes.T @ error)[kept]
    across = float(np.linalg.norm((axes.T @ error)[~kept]))
    statistic, freedom = float((along**2 / values[kept]).sum()), int(kept.sum())
    # An error in a direction that does not vary is a bias whatever the chi-square says, unless it is rounding.
    rest, p_value = len(found) - freedom, 0.0 if across > 1e-4 * length else 1.0
    if p_value and freedom:
        p_value = float(stats.f.sf(statistic * rest / (freedom * (len(found) - 1)), freedom, rest))
    total = float(np.trace(spread))
    return Bias(
        bias=float(np.linalg.norm(error)) / length,
        noise=total**0.5 / length,
        deviation=(total * len(found)) ** 0.5 / length,
        cosine=float(mean @ exact / (np.linalg.norm(mean) * length)) if mean.any() else 0.0,
        statistic=statistic,
        freedom=freedom,
        p_value=p_value,
    )
