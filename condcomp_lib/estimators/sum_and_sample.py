"""Sum-and-sample: groups picked without replacement, and the last pick of a gate not sampled but summed over (Liang et
al. 2018; Kool et al. 2020): the classical search that the retrospective of *faster-models* misses, made a gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condcomp_lib.errors import UsageError
from condcomp_lib.estimators import Estimate, Minibatch
from condcomp_lib.estimators.pathwise import gumbel_noise
from condcomp_lib.lazy import Evaluation, LazyNetwork
from condcomp_lib.policies import Decision


class SumAndSample:
    """Each gate picks `counts[gate]` groups one after the other, each by the softmax of the logits that are left. All
    picks but the last are sampled; for the last one every group that is left is tried:

        sum_j p_j C(picked before and j),   p the softmax over the groups that are left.

    For a budget of one group its gradient in the gate's logits is exact, given the picks of the other gates; for more
    it leaves out what the earlier picks are worth. Every group learns from every example, as much as the gate would
    pick it. There is an evaluation for every group, but a single one of the first layer, and where nothing lies above
    (see `_at_the_top`) a single one of all. The gates above the one where groups are tried sample picks of their own.

    The loss holds the costs' own gradient, too. `found` of the estimate is one sampled evaluation. `counts` says how
    many groups each gate is to pick now.
    """

    def __init__(self, counts: Callable[[], Sequence[int]]) -> None:
        self.counts = counts

    def __call__(self, minibatch: Minibatch, generator: torch.Generator) -> Estimate:
        """See `Estimator`."""
        lazy, counts = minibatch.lazy, self.counts()
        first = lazy.mlp.linears[0](minibatch.x) if minibatch.first is None else minibatch.first
        base = _Picks(counts, generator)
        found = lazy.evaluate(minibatch.x, first, base, through=minibatch.through)
        loss, groups = torch.zeros(()), lazy.partition.groups_by_gate
        for gate, logits in enumerate(lazy.partition.by_gate(found.logits)):
            before = _without_last(base.order[gate], groups[gate])
            left = logits.masked_fill(before, -torch.inf).softmax(1)
            if gate == len(groups) - 1 and _adds_up(lazy):
                tried = _at_the_top(lazy, found, before)
            else:
                ways = [_Tried(base, gate, before, group) for group in range(groups[gate])]
                tried = [self._under(one, minibatch, first) for one in ways]
            costs = torch.stack([minibatch.cost(one) for one in tried], 1)
            loss = loss + (left * costs.detach()).sum(1).mean()
            loss = loss + (left.detach() * costs).sum(1).mean() / len(groups)
        return Estimate(loss, found, minibatch.cost(found).detach())

    def _under(self, decision: Decision, minibatch: Minibatch, first: Tensor) -> Evaluation:
        return minibatch.lazy.evaluate(minibatch.x, first, decision, through=minibatch.through)


class _Picks:
    """A decision that picks groups without replacement, and remembers in which `order`: gate by gate int64, examples x
    picks."""

    def __init__(self, counts: Sequence[int], generator: torch.Generator) -> None:
        self.counts, self.generator, self.order, self.bits = counts, generator, list[Tensor](), list[Tensor]()

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """See `Decision`."""
        if not 1 <= self.counts[gate] <= logits.shape[1]:
            raise UsageError(f"a budget must be from 1 to {logits.shape[1]} groups, not {self.counts[gate]}")
        order = (logits.detach() + gumbel_noise(logits, self.generator)).topk(self.counts[gate], dim=1).indices
        bits = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, True)
        self.order.append(order)
        self.bits.append(bits)
        return bits


@dataclass(frozen=True, eq=False)
class _Tried:
    """The decision that picks this `group` at one gate, beside those picked `before`."""

    base: _Picks
    gate: int
    before: Tensor
    group: int

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """See `Decision`."""
        if gate < self.gate:
            return self.base.bits[gate]
        if gate > self.gate:
            return _Picks(self.base.counts, self.base.generator)(logits, gate)
        bits = torch.zeros_like(logits, dtype=torch.bool)
        bits[:, : self.before.shape[1]] = self.before
        bits[:, self.group] = True
        return bits


def _adds_up(lazy: LazyNetwork) -> bool:
    """Whether the scores are a sum over the last layer's groups, all of them of the same size."""
    partition = lazy.partition
    sizes = torch.bincount(partition.membership[-1], minlength=partition.groups_by_gate[-1])
    own = len(partition.groups_by_gate) == len(lazy.target.hidden)
    return own and lazy.rescale == "none" and lazy.fill is None and bool((sizes == sizes[0]).all())


def _at_the_top(lazy: LazyNetwork, found: Evaluation, before: Tensor) -> list[Evaluation]:
    """What `found` becomes with each group in turn as the last gate's last pick. What lies below stays, so what every
    group adds to the scores is computed once.

    `before` (bool, examples x groups) the groups that were picked earlier.
    """
    layer, groups = lazy.mlp.linears[-1], before.shape[1]
    order = lazy.partition.membership[-1].argsort(stable=True)
    h = found.hidden[-1][:, order].reshape(len(before), groups, -1)
    added = torch.einsum("ngs,cgs->ngc", h, layer.weight[:, order].reshape(len(layer.weight), groups, -1))
    bits = before[:, None] | torch.eye(groups, dtype=torch.bool)  # examples x tries x groups
    if lazy.policy.always_on:
        bits[:, :, 0] = True
    scores = torch.bmm(bits.to(added.dtype), added) + layer.bias
    below, above = found.mask.split([lazy.partition.bits - lazy.partition.groups, lazy.partition.groups], 1)
    unused = torch.zeros_like(above[:, groups:])
    return [
        Evaluation(scores[:, group], torch.cat([below, bits[:, group], unused], 1), found.logits)
        for group in range(groups)
    ]


def _without_last(order: Tensor, groups: int) -> Tensor:
    """The groups that were picked before the last one (bool, examples x groups)."""
    return torch.zeros(len(order), groups, dtype=torch.bool).scatter_(1, order[:, :-1], True)
