"""Balanced clustering: partitions read off the target's weights or activations, without any trial.

Every group gets its even share of every layer, so a group costs the same whichever it is, and activity and compute of
two such partitions can be compared. Assignments under these capacities are solved exactly by scipy.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from condcomp_lib.coactivation import coactivation
from condcomp_lib.errors import UsageError
from condcomp_lib.partitioners import check_worth
from condcomp_lib.partitions import Partition, check_counts, check_groups
from condcomp_lib.targets import MLP

ROUNDS = 20  # of k-means at most; it stops when no neuron changes its group


@dataclass(frozen=True, eq=False)
class Fixed:
    """A partitioner that has nothing to learn: always the same partition."""

    partition: Partition

    def propose(self, generator: torch.Generator) -> Partition:  # noqa: ARG002 (nothing is random)
        """See `Partitioner`."""
        return self.partition

    def update(self, partition: Partition, worth: float) -> None:  # noqa: ARG002
        """See `Partitioner`; checks the worth and learns nothing."""
        check_worth(worth)

    def best(self) -> Partition:
        """See `Partitioner`."""
        return self.partition


def capacities(widths: Sequence[int], groups: int | Sequence[int], scope: str = "network") -> list[Tensor]:
    """How many neurons of each layer every group gets (int64, groups): evenly, in scope "network" even in total too. In
    scope "layer" `groups` may be a number for each layer.

    >>> capacities([4, 5], 3)
    [tensor([2, 1, 1]), tensor([1, 2, 2])]
    """
    if isinstance(groups, int):
        check_groups(widths, groups, scope)
        groups = [groups] * len(widths)
    else:
        check_counts(widths, groups, scope, max(groups, default=0))
    found, start = [], 0
    for width, count in zip(widths, groups, strict=True):
        found.append(torch.bincount((start + torch.arange(width)) % count, minlength=count))
        start = (start + width) % count if scope == "network" else 0
    return found


def assigned(cost: Tensor, capacity: Tensor) -> Tensor:
    """The group of each neuron (int64, neurons) that makes the summed `cost` (float, neurons x groups) least, when
    group j takes exactly `capacity[j]` of them (int64, groups; together as many as there are neurons)."""
    slots = torch.repeat_interleave(torch.arange(len(capacity)), capacity)
    if len(slots) != len(cost):
        raise UsageError(f"capacities for {len(slots)} neurons cannot hold {len(cost)}")
    return slots[torch.from_numpy(linear_sum_assignment(cost[:, slots].double().numpy())[1])]


def balanced_kmeans(features: Tensor, capacity: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """k-means under capacities: the group of each neuron of each layer (int64, neurons).

    Arguments: `features` (float, neurons of all layers x dimensions), in which distances are taken; `capacity` for each
    layer the neurons that every group takes of it. Centres start at k-means++ draws and are means over all layers.
    """
    widths = [int(counts.sum()) for counts in capacity]
    centres = _spread(features, len(capacity[0]), generator)
    groups = torch.full((len(features),), -1)
    for _ in range(ROUNDS):
        costs = torch.cdist(features, centres).square().split(widths)
        found = torch.cat([assigned(cost, counts) for cost, counts in zip(costs, capacity, strict=True)])
        if torch.equal(found, groups):
            break
        groups = found
        members = one_hot(groups, len(centres)).to(features.dtype)
        centres = members.T @ features / members.sum(0).clamp(min=1)[:, None]
    return list(groups.split(widths))


def _spread(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: centres drawn one after the other, in proportion to the squared distance from those drawn before."""
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    nearest = torch.full((len(features),), float("inf"), dtype=torch.float64)
    while len(chosen) < count:
        distance = (features - features[chosen[-1]]).square().sum(1).double()
        nearest = torch.minimum(nearest, distance)
        nearest[chosen] = 0.0  # cancellation may leave a little
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)  # equal neurons: any of them
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return features[chosen]


def weight_partition(
    target: MLP, groups: int | Sequence[int], generator: torch.Generator, scope: str = "network"
) -> Partition:
    """Balanced k-means on incoming weights of length one, layer by layer (MoEfication's split). In scope "layer"
    `groups` may be a number for each layer.

    In scope "network" the clusters of a layer are then matched with those below so that the summed weight of the
    connections inside groups is greatest, for positive ones make neurons fire together; incoming weights of different
    layers have no common space to be clustered in.
    """
    capacity = capacities(target.hidden, groups, scope)
    if isinstance(groups, int) and groups > min(target.hidden):
        raise UsageError(f"clusters of weights are made layer by layer: groups must be at most the "
                         f"{min(target.hidden)} neurons of the smallest layer, not {groups}")  # fmt: skip
    for name, parameter in target.named_parameters():
        if not parameter.isfinite().all():
            raise UsageError(f"the target's {name} holds a number that is not finite; train it again")
    membership: list[Tensor] = []
    for layer, counts in zip(target.linears[:-1], capacity, strict=True):
        weight = layer.weight.detach()
        found = balanced_kmeans(normalize(weight), [counts], generator)[0]
        if membership and scope == "network":
            below, here = (one_hot(m, len(counts)).to(weight.dtype) for m in (membership[-1], found))
            found = _matched(here.T @ weight @ below, counts)[found]
        membership.append(found)
    return _cut(membership, groups, scope)


def _cut(membership: Sequence[Tensor], groups: int | Sequence[int], scope: str) -> Partition:
    """The partition with as many groups in every layer, or with a number for each."""
    if isinstance(groups, int):
        return Partition(tuple(membership), groups, scope)
    return Partition(tuple(membership), max(groups), scope, tuple(groups))


def _matched(strength: Tensor, counts: Tensor) -> Tensor:
    """The new name of each cluster (int64, groups), such that the summed `strength` (clusters x names) is greatest
    among the renamings that keep every name's size."""
    names = torch.empty(len(counts), dtype=torch.int64)
    for size in counts.unique():
        same = (counts == size).nonzero().squeeze(1)
        rows, columns = linear_sum_assignment(-strength[same][:, same].numpy())
        names[same[torch.from_numpy(rows)]] = same[torch.from_numpy(columns)]
    return names


def activation_partition(
    patterns: Tensor,
    widths: Sequence[int],
    groups: int | Sequence[int],
    generator: torch.Generator,
    scope: str = "network",
) -> Partition:
    """The coactivation split: balanced k-means on the neurons' firing patterns, scaled to length one.

    In scope "network" all layers are clustered together, since their patterns are over the same examples; in scope
    "layer" `groups` may be a number for each layer.

    Arguments: `patterns` (bool, examples x neurons of all layers), as from `coactivation.firing_patterns`. A neuron
    that never fires is equally far from all centres and fills a place that is left.
    """
    features = normalize(_checked(patterns, widths).T.float())
    return _clustered(features, widths, groups, generator, scope)


def spectral_partition(
    patterns: Tensor, widths: Sequence[int], groups: int, generator: torch.Generator, scope: str = "network"
) -> Partition:
    """A spectral split of the coactivation graph: balanced k-means on the leading eigenvectors of its normalised
    adjacency D^-1/2 C D^-1/2, rows scaled to length one (Ng, Jordan and Weiss 2002). Arguments as for
    `activation_partition`."""
    check_groups(widths, groups, scope)
    graph = coactivation(_checked(patterns, widths)).double().numpy()
    ends = np.cumsum([0, *widths] if scope == "layer" else [0, sum(widths)])
    blocks = [graph[a:b, a:b] for a, b in itertools.pairwise(ends)]
    embedded = np.concatenate([_leading(block, groups) for block in blocks])
    return _clustered(normalize(torch.from_numpy(embedded)), widths, groups, generator, scope)


def _leading(graph: np.ndarray, count: int) -> np.ndarray:
    """The `count` leading eigenvectors (nodes x count) of the normalised adjacency."""
    degree = graph.sum(1)
    scale = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    nodes = len(graph)
    return eigh(scale[:, None] * graph * scale, subset_by_index=[max(0, nodes - count), nodes - 1])[1]


def always_on_partition(
    patterns: Tensor, widths: Sequence[int], groups: int, generator: torch.Generator, scope: str = "network"
) -> Partition:
    """Group 0 holds the neurons that fire most often in each layer, to be evaluated always (`Policy(always_on=True)`);
    the others are split as by `activation_partition` (CMoE's shared block). Arguments as there."""
    if groups < 2:
        raise UsageError(f"an always-on group needs at least one other: groups must be at least 2, not {groups}")
    features = normalize(_checked(patterns, widths).T.float())
    rates = patterns.float().mean(0).split(list(widths))
    capacity = capacities(widths, groups, scope)
    groups_of, rest, left = [], [], []
    for rate, counts in zip(rates, capacity, strict=True):
        order = rate.argsort(descending=True, stable=True)
        found = torch.zeros(len(rate), dtype=torch.int64)
        groups_of.append(found)
        rest.append(order[int(counts[0]) :].sort().values)
        left.append(counts[1:])
    starts = np.cumsum([0, *widths[:-1]])
    rows = [rows + int(start) for rows, start in zip(rest, starts, strict=True)]
    for found, places, others in zip(groups_of, rest, _by_scope(features, rows, left, generator, scope), strict=True):
        found[places] = 1 + others
    return Partition(tuple(groups_of), groups, scope)


def _clustered(
    features: Tensor, widths: Sequence[int], groups: int | Sequence[int], generator: torch.Generator, scope: str
) -> Partition:
    rows = list(torch.arange(sum(widths)).split(list(widths)))
    found = _by_scope(features, rows, capacities(widths, groups, scope), generator, scope)
    return _cut(found, groups, scope)


def _by_scope(
    features: Tensor, rows: Sequence[Tensor], capacity: Sequence[Tensor], generator: torch.Generator, scope: str
) -> list[Tensor]:
    """`balanced_kmeans` of these rows of `features` for each layer: all layers together, or each by itself."""
    if scope == "network":
        return balanced_kmeans(features[torch.cat(list(rows))], capacity, generator)
    return [balanced_kmeans(features[part], [counts], generator)[0]
            for part, counts in zip(rows, capacity, strict=True)]  # fmt: skip


def _checked(patterns: Tensor, widths: Sequence[int]) -> Tensor:
    if patterns.ndim != 2 or patterns.shape[1] != sum(widths) or not len(patterns):
        raise UsageError(f"firing patterns must be examples x {sum(widths)} neurons (all hidden layers), not of shape "
                         f"{list(patterns.shape)}")  # fmt: skip
    return patterns
