"""Local search and simulated annealing over partitions: classical search as a baseline."""

import math

import torch

from condcomp_lib.errors import UsageError
from condcomp_lib.partitioners import check_cut, check_worth
from condcomp_lib.partitions import Partition


class LocalSearch:
    """Swap two neurons of one layer that are in different groups; keep the swap when the partition's worth rises.

    Sizes stay as they are, by layer too. Give it a worth that does not change from one call to the next, such as minus
    the loss on fixed minibatches; for a worth that must be learned anew for every partition it is far too slow.

    Arguments: `start` the first partition; `swaps` pairs a proposal; `temperature` above 0 makes it simulated
    annealing: a loss of worth d is accepted with probability exp(-d / T), T falling from `temperature` evenly to 0 over
    `span` proposals; `generator` draws those acceptances.
    """

    def __init__(
        self,
        start: Partition,
        *,
        swaps: int = 1,
        temperature: float = 0.0,
        span: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if swaps < 1 or span < 1:
            raise UsageError(f"swaps and span must be at least 1, not {swaps} and {span}")
        if not 0 <= temperature < math.inf:
            raise UsageError(f"the temperature must be a number of at least 0, not {temperature}")
        if all(len(groups.unique()) < 2 for groups in start.membership):
            raise UsageError("there is nothing to swap: every layer lies in one group")
        self.current, self.swaps = start, swaps
        self.temperature, self.span, self.generator = temperature, span, generator
        self.worth = -math.inf  # of `current`; the start is proposed first, so that it is known
        self.accepted = self.trials = 0
        self._best, self._best_worth = start, -math.inf

    def propose(self, generator: torch.Generator) -> Partition:
        """See `Partitioner`."""
        if not self.trials:
            return self.current
        membership = [groups.clone() for groups in self.current.membership]
        for _ in range(self.swaps):
            groups = membership[_drawn_layer(membership, generator)]
            first = int(torch.randint(len(groups), (1,), generator=generator))
            others = (groups != groups[first]).nonzero().squeeze(1)
            second = int(others[torch.randint(len(others), (1,), generator=generator)])
            groups[[first, second]] = groups[[second, first]]
        return Partition(tuple(membership), self.current.groups, self.current.scope)

    def update(self, partition: Partition, worth: float) -> None:
        """See `Partitioner`."""
        check_worth(worth)
        check_cut(partition, self.current.widths, self.current.groups, self.current.scope)
        if not torch.equal(partition.sizes_by_layer, self.current.sizes_by_layer):
            raise UsageError("local search keeps the sizes of its groups; this partition has others")
        heat = self.temperature * max(0.0, 1 - self.trials / self.span)
        self.trials += 1
        fall = self.worth - worth
        if fall < 0 or (heat and fall / heat < -math.log(float(torch.rand(1, generator=self.generator)) + 1e-12)):
            self.current, self.worth = partition, worth
            self.accepted += 1
        if worth > self._best_worth:
            self._best, self._best_worth = partition, worth

    def best(self) -> Partition:
        """The partition of the highest worth so far; the start before any is known."""
        return self._best


def _drawn_layer(membership: list[torch.Tensor], generator: torch.Generator) -> int:
    """A layer with at least two groups, in proportion to its neurons."""
    weights = torch.tensor([len(groups) if len(groups.unique()) > 1 else 0 for groups in membership]).double()
    return int(torch.multinomial(weights, 1, generator=generator))
