"""Coactivation: which hidden neurons fire together (*partitions*, section 5.4), and measures to compare networks by."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.linalg import eigh
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans
from torch import Tensor

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.targets import MLP

MOST_BLOCKS = 512  # a side of a stored or drawn matrix
STRIP = 200  # rows of the matrix that are computed together
LEVEL = 0.1  # a pair counts as coactive above it
SPLITS = range(2, 9)  # numbers of communities that are tried
ORDERINGS = ("mean", "hierarchical", "spectral")


@torch.inference_mode()
def firing_patterns(target: MLP, x: Tensor, batch: int = 2048) -> Tensor:
    """On which examples each hidden neuron is above zero (bool, examples x neurons of all hidden layers, in order).

    >>> firing_patterns(MLP(5, (4, 3), 2), torch.zeros(6, 5)).shape
    torch.Size([6, 7])
    """
    return torch.cat(list(_patterns(target, x, batch)))


def _patterns(target: MLP, x: Tensor, batch: int) -> Iterator[Tensor]:
    if not len(x):
        raise UsageError("there are no examples to look at")
    for h in x.split(batch):
        if not h.isfinite().all():
            raise UsageError("the examples hold a number that is not finite")
        layers = []
        for layer in target.linears[:-1]:
            h = target.activation(layer(h))
            layers.append(h > 0)
        yield torch.cat(layers, 1)


def coactivation(patterns: Tensor) -> Tensor:
    """c_ij = E[ 1(h_i > 0) 1(h_j > 0) ] (float32, neurons x neurons) of `patterns` (bool, examples x neurons).

    >>> coactivation(torch.tensor([[True, True], [True, False]]))
    tensor([[1.0000, 0.5000],
            [0.5000, 0.5000]])
    """
    fired = patterns.float()
    return fired.T @ fired / len(patterns)


@torch.inference_mode()
def network_coactivation(target: MLP, x: Tensor, batch: int = 2048) -> Tensor:
    """c_ij of all hidden neurons (float32, neurons x neurons), a minibatch of examples at a time.

    Counts are whole numbers in float32, hence exact up to sixteen million examples.
    """
    neurons = sum(target.hidden)
    counts = torch.zeros(neurons, neurons)
    for fired in _patterns(target, x, batch):
        part = fired.float()
        for start in range(0, neurons, STRIP):  # the matrix is symmetric: below the diagonal nothing is multiplied
            counts[start : start + STRIP, start:].addmm_(part[:, start : start + STRIP].T, part[:, start:])
    counts.triu_()
    return (counts + counts.triu(1).T).div_(len(x))


@torch.inference_mode()
def ingoing_flow(target: MLP, x: Tensor) -> Tensor:
    """The flow that enters each hidden neuron, sum_i |h_i w_ij| (float32, examples x neurons of all hidden layers)."""
    h, found = x, []
    for layer in target.linears[:-1]:
        found.append(h.abs() @ layer.weight.abs().T)
        h = target.activation(layer(h))
    return torch.cat(found, 1)


def ordering(c: Tensor, how: str) -> Tensor:
    """A permutation of the neurons (int64) that shows the structure of their coactivation `c` (neurons x neurons).

    - "mean": by mean coactivation with all neurons, the most coactive first (the papers' figures sort so, we think).
    - "hierarchical": leaves of average linkage on the distance 1 - c_ij / max(c_ii, c_jj).
    - "spectral": by the second eigenvector of the random walk D^-1 C on the graph of c_ij (Shi and Malik 2000), its
      largest entry positive.

    Neurons by group of a partition: `torch.argsort(membership, stable=True)`.
    """
    if how not in ORDERINGS:
        raise unknown("ordering", how, ORDERINGS)
    _check(c)
    if how == "mean" or len(c) < 3:
        return c.mean(1).argsort(descending=True, stable=True)
    values = c.double().numpy()
    if how == "hierarchical":
        rates = np.diag(values)
        either = np.maximum(np.maximum.outer(rates, rates), np.finfo(float).tiny)
        distance = np.clip(1 - values / either, 0, 1)
        np.fill_diagonal(distance, 0)
        found = leaves_list(linkage(squareform(distance, checks=False), "average"))
        return torch.from_numpy(found.astype(np.int64))
    degree = values.sum(1)
    scale = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    second = eigh(scale[:, None] * values * scale, subset_by_index=[len(c) - 2, len(c) - 2])[1][:, 0] * scale
    second = second * np.sign(second[np.abs(second).argmax()])
    return torch.from_numpy(np.argsort(second, kind="stable"))


def block_means(c: Tensor, most: int = MOST_BLOCKS) -> Tensor:
    """`c` (neurons x neurons) as means over blocks of neighbouring neurons, at most `most` blocks a side.

    >>> block_means(torch.eye(4), 2)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    _check(c, least=1)
    if most < 1:
        raise UsageError(f"at least one block a side is needed, not {most}")
    sides = min(most, len(c))
    edges = torch.linspace(0, len(c), sides + 1).round().long()
    running = torch.zeros(len(c) + 1, len(c) + 1, dtype=torch.float64)
    running[1:, 1:] = c.double().cumsum(0).cumsum(1)
    sums = running[edges][:, edges]
    total = sums[1:, 1:] - sums[:-1, 1:] - sums[1:, :-1] + sums[:-1, :-1]
    sizes = edges.diff()
    return (total / (sizes[:, None] * sizes)).to(c.dtype)


@dataclass(frozen=True)
class Measures:
    """A network's coactivation in a few numbers, over all pairs of different neurons.

    `mean` c_ij; `gini` of all c_ij (0: all pairs alike, 1: one pair has all); `above` the share of pairs above LEVEL;
    `lift` mean c_ij over mean c_ii c_jj, what it would be if neurons fired independently; `partners` for a neuron that
    fires the share of the others that fire with it at least every tenth time; `modularity` of the best split tried (0:
    no communities); `firing` the mean of c_ii.
    """

    mean: float
    gini: float
    above: float
    lift: float
    partners: float
    modularity: float
    firing: float


def measures(c: Tensor, seed: int = 0) -> Measures:
    """The Measures of a coactivation matrix (neurons x neurons); `seed` starts the search for communities.

    >>> round(measures(torch.eye(4) / 4).mean, 3)
    0.0
    """
    _check(c)
    values = c.double()
    rates = values.diagonal().clone()
    pairs = torch.triu_indices(len(c), len(c), 1)
    each = values[pairs[0], pairs[1]]
    alone = (rates[pairs[0]] * rates[pairs[1]]).mean()
    given = values[rates > 0] / rates[rates > 0, None]
    partners = (given >= LEVEL).double().sum(1).sub(1).mean() / (len(c) - 1) if len(given) else torch.zeros(())
    return Measures(
        each.mean().item(),
        gini(each),
        (each > LEVEL).double().mean().item(),
        (each.mean() / alone).item() if alone > 0 else 1.0,
        partners.item(),
        max(modularity(c, split) for split in communities(c, seed)),
        rates.mean().item(),
    )


def gini(values: Tensor) -> float:
    """The Gini coefficient of non-negative numbers: 0 where all are equal, near 1 where one has everything.

    >>> gini(torch.tensor([1.0, 1.0, 1.0])), gini(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    (0.0, 0.75)
    """
    ordered = values.double().sort().values
    total = ordered.sum()
    if total == 0:
        return 0.0
    ranks = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    return max(0.0, ((2 * ranks - len(ordered) - 1) @ ordered / (len(ordered) * total)).item())


def modularity(c: Tensor, membership: Tensor) -> float:
    """Newman's modularity of a split of the graph whose edges weigh c_ij, i != j: the share of the weight inside groups
    less what it would be between neurons of the same degrees joined at random.

    Arguments: `c` (neurons x neurons), `membership` (int64, neurons) the group of each.
    """
    _check(c, membership)
    weights = c.double() - torch.diag(c.diagonal().double())
    degree, total = weights.sum(1), weights.sum()
    if total == 0:
        return 0.0
    members = torch.nn.functional.one_hot(membership).double()
    inside = ((weights @ members) * members).sum()
    return (inside / total - ((degree @ members) / total).square().sum()).item()


def communities(c: Tensor, seed: int = 0) -> list[Tensor]:
    """Splits of the neurons (int64, neurons) into 1 to 8 communities each: k-means on the leading eigenvectors of the
    modularity matrix (Newman 2006). None of them need be the best there is."""
    weights = c.double().numpy() - np.diag(np.diag(c.double().numpy()))
    degree, total = weights.sum(1), weights.sum()
    most = min(SPLITS[-1], len(c) - 1)
    if total == 0 or most < SPLITS[0]:
        return [torch.zeros(len(c), dtype=torch.int64)]
    leading = eigh(weights - np.outer(degree, degree) / total, subset_by_index=[len(c) - most, len(c) - 1])
    found = [torch.zeros(len(c), dtype=torch.int64)]
    for count in range(SPLITS[0], most + 1):
        values, vectors = leading[0][-count + 1 :], leading[1][:, -count + 1 :]
        features = vectors * np.sqrt(np.clip(values, 0, None))
        if len(np.unique(features.round(9), axis=0)) < count:
            continue  # neurons that are alike cannot be split so often
        split = KMeans(count, n_init=2, random_state=seed).fit_predict(features)
        found.append(torch.from_numpy(split.astype(np.int64)))
    return found


def explained(c: Tensor, membership: Tensor) -> float:
    """How much of the coactivation a partition explains: the share of the variance of c_ij over pairs of different
    neurons that lies between the blocks of its groups (0 to 1).

    A partition into single neurons explains all; compare partitions of as many groups. Much of c_ij is only how often
    the two neurons fire: groups of neurons that fire equally often explain that, so look at `beyond_rates` as well.
    """
    _check(c, membership)
    values = c.double()
    members = torch.nn.functional.one_hot(membership).double()
    apart = 1 - torch.eye(len(c), dtype=torch.float64)
    sums, counts = members.T @ (values * apart) @ members, members.T @ apart @ members
    means = sums / counts.clamp(min=1)
    pairs = apart.sum()
    centre = (values * apart).sum() / pairs
    spread = ((values - centre).square() * apart).sum()
    return ((means - centre).square() * counts).sum().item() / spread.item() if spread > 0 else 0.0


def beyond_rates(c: Tensor) -> Tensor:
    """What coactivation there is beyond that of neurons that fire as often, each for itself: c_ij - c_ii c_jj."""
    _check(c)
    rates = c.diagonal()
    return c - rates[:, None] * rates


def _check(c: Tensor, membership: Tensor | None = None, least: int = 2) -> None:
    if c.ndim != 2 or c.shape[0] != c.shape[1] or len(c) < least:
        raise UsageError(f"coactivation must be neurons x neurons, for at least {least}, not of shape {list(c.shape)}")
    if membership is not None and len(membership) != len(c):
        raise UsageError(f"{len(c)} neurons need as many groups, not {len(membership)}")
    if not c.isfinite().all():
        raise UsageError("coactivation holds a number that is not finite")
