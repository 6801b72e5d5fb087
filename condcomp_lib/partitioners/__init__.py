"""Partitioners: what proposes partitions and learns from their worth (*partitions*, section 2, Algorithm 1).

All of them share one interface, `Partitioner`; `search` is Algorithm 1, one loop over it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from condcomp_lib.errors import UsageError
from condcomp_lib.partitions import Partition


class Partitioner(Protocol):
    """Proposes partitions and learns from their worth."""

    def propose(self, generator: torch.Generator) -> Partition:
        """The next partition to try; all that is random in it comes from `generator`."""
        ...

    def update(self, partition: Partition, worth: float) -> None:
        """Learn that `partition` was worth this much (higher is better, for instance a validation accuracy)."""
        ...

    def best(self) -> Partition:
        """The partition that is best by what has been learned so far, without exploration."""
        ...


@dataclass(frozen=True, eq=False)
class Trial:
    """One round of Algorithm 1: what was proposed and what it was worth."""

    partition: Partition
    worth: float


def search(
    partitioner: Partitioner,
    worth: Callable[[Partition], float],
    trials: int,
    generator: torch.Generator,
    *,
    enough: float = math.inf,
) -> list[Trial]:
    """Algorithm 1 of *partitions*: propose a partition, find its worth, let the partitioner learn from it.

    Arguments: `worth(partition)` a number, higher is better; in the paper the validation accuracy of a lazy network
    whose policy starts anew and is trained to convergence. `trials` rounds at most, fewer once a worth reaches `enough`
    (in the paper: the target's own accuracy).

    Raises UsageError when a worth is no number: nothing can be learned from it, and the partitioner is left as it was.

    >>> from condcomp_lib.partitioners.bandits import Bandits
    >>> bandits = Bandits([4], groups=2, rule="greedy")
    >>> together = lambda partition: float(partition.largest_share)
    >>> len(search(bandits, together, 5, torch.Generator().manual_seed(0)))
    5
    """
    if trials < 1:
        raise UsageError(f"a search needs at least one trial, not {trials}")
    done: list[Trial] = []
    while len(done) < trials and not (done and done[-1].worth >= enough):
        partition = partitioner.propose(generator)
        found = worth(partition)
        partitioner.update(partition, found)
        done.append(Trial(partition, found))
    return done


def check_worth(worth: float) -> float:
    """`worth`, when it is a finite number; raises UsageError otherwise."""
    if not math.isfinite(worth):
        raise UsageError(f"a partition's worth must be a finite number, not {worth}; look at how its policy trained")
    return worth


def check_cut(partition: Partition, widths: Sequence[int], groups: int, scope: str) -> None:
    """Raise UsageError unless `partition` cuts layers of these widths into so many groups, in that scope."""
    if partition.scope != scope:
        raise UsageError(f"this partitioner makes partitions of scope {scope!r}, not {partition.scope!r}")
    if partition.widths != tuple(widths) or partition.groups != groups:
        raise UsageError(f"this partitioner cuts layers of {list(widths)} neurons into {groups} groups, not layers of "
                         f"{list(partition.widths)} into {partition.groups}")  # fmt: skip
