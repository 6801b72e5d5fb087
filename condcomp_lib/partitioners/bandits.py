"""Bandits: one per neuron, whose actions are the groups (*partitions*, section 2.1)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.partitioners import check_cut, check_worth
from condcomp_lib.partitions import Partition, check_groups

RULES = ("greedy", "epsilon-greedy", "ucb1")


class Bandits:
    """One bandit per neuron; all of them get the same reward, the worth of the partition that they made together.

    `rule`: "greedy" takes the action of the highest value, values being means of rewards with `initial` counted as one
    more reward, so that an optimistic initial value makes it try everything; "epsilon-greedy" does the same but takes a
    random action with probability `epsilon`; "ucb1" (Auer et al. 2002) takes untried actions first, then the one of the
    highest mean + sqrt(2 ln t / n). Ties are broken at random.

    Arguments: `widths` neurons of each hidden layer; `groups` k; `initial` value (None: 1 for "greedy", which is
    optimistic for an accuracy, 0 for "epsilon-greedy"; UCB1 has none); `scope` as for `Partition`.

    >>> bandits = Bandits([3, 3], groups=2, rule="ucb1")
    >>> bandits.propose(torch.Generator().manual_seed(0)).widths
    (3, 3)
    """

    def __init__(
        self,
        widths: Sequence[int],
        groups: int,
        rule: str,
        *,
        epsilon: float = 0.1,
        initial: float | None = None,
        scope: str = "network",
    ) -> None:
        if rule not in RULES:
            raise unknown("bandit rule", rule, RULES)
        if not 0 <= epsilon <= 1:
            raise UsageError(f"epsilon must be between 0 and 1, not {epsilon}")
        check_groups(widths, groups, scope)
        self.widths, self.groups, self.scope = tuple(widths), groups, scope
        self.rule, self.epsilon = rule, epsilon
        if initial is not None and not math.isfinite(initial):
            raise UsageError(f"the initial value must be a finite number, not {initial}")
        self.initial = {"greedy": 1.0}.get(rule, 0.0) if initial is None else initial
        self.trials = 0
        self.counts = torch.zeros(sum(widths), groups, dtype=torch.float64)
        self.sums = torch.zeros(sum(widths), groups, dtype=torch.float64)

    def propose(self, generator: torch.Generator) -> Partition:
        """See `Partitioner`."""
        values = self._bounds() if self.rule == "ucb1" else self._values()
        chosen = first_of_best(values, generator)
        if self.rule == "epsilon-greedy":
            chosen = explored(chosen, self.groups, self.epsilon, generator)
        return self._partition(chosen)

    def update(self, partition: Partition, worth: float) -> None:
        """See `Partitioner`."""
        check_worth(worth)
        check_cut(partition, self.widths, self.groups, self.scope)
        pulled = torch.nn.functional.one_hot(torch.cat(partition.membership), self.groups).double()
        self.counts += pulled
        self.sums += worth * pulled
        self.trials += 1

    def best(self) -> Partition:
        """Each neuron in its group of the highest mean reward among those tried; before any trial, in the first."""
        means = self.sums / self.counts.clamp(min=1)
        return self._partition(means.masked_fill(self.counts == 0, -math.inf).argmax(1))

    def _values(self) -> Tensor:
        if self.rule == "ucb1":
            return self.sums / self.counts.clamp(min=1)
        return (self.initial + self.sums) / (1 + self.counts)

    def _bounds(self) -> Tensor:
        """UCB1's index; untried actions have an infinite one."""
        width = (2 * math.log(max(1, self.trials)) / self.counts.clamp(min=1)).sqrt()
        return (self._values() + width).masked_fill(self.counts == 0, math.inf)

    def _partition(self, chosen: Tensor) -> Partition:
        return Partition(chosen.split(list(self.widths)), self.groups, self.scope)


def first_of_best(values: Tensor, generator: torch.Generator) -> Tensor:
    """For each row of `values` the column (int64) of its highest value, drawn at random where several are equal."""
    draws = torch.rand(values.shape, generator=generator)
    return draws.masked_fill(values < values.max(1, keepdim=True).values, -1.0).argmax(1)


def explored(chosen: Tensor, groups: int, epsilon: float, generator: torch.Generator) -> Tensor:
    """`chosen` (int64, neurons) with each entry replaced by a random group with probability `epsilon`."""
    if not 0 <= epsilon <= 1:
        raise UsageError(f"epsilon must be between 0 and 1, not {epsilon}")
    random = torch.randint(groups, chosen.shape, generator=generator)
    return torch.where(torch.rand(chosen.shape, generator=generator) < epsilon, random, chosen)
