"""Partitions: which hidden neurons are evaluated together (*partitions*, section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from condcomp_lib.errors import UsageError, unknown

SCOPES = ("network", "layer")
KINDS = ("random", "balanced", "contiguous")


@dataclass(frozen=True, eq=False)
class Partition:
    """An assignment of every hidden neuron to one group, P = {H_1 .. H_k}.

    Arguments: `membership` one int64 tensor (neurons) for each hidden layer, entries from 0 to `groups` - 1; `scope`
    "network" (group j spans all layers, a mask has `groups` bits) or "layer" (group j of each layer is a group of its
    own, a mask has `groups` bits for each layer, first layer first). A group may be empty. `counts`, in scope "layer",
    the groups of each layer where layers are cut into different numbers (None: `groups` each): `groups` is the largest
    of them, and the bits that a layer does not need are never set.

    Raises UsageError when no layer or an empty one is given, or an entry names no group.

    >>> Partition((torch.tensor([0, 1, 1]), torch.tensor([0, 0])), groups=2).sizes
    tensor([3, 2])
    """

    membership: tuple[Tensor, ...]
    groups: int
    scope: str = "network"
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        widths = [len(groups) for groups in self.membership]
        if self.counts is None:
            check_groups(widths, self.groups, self.scope)
        else:
            check_counts(widths, self.counts, self.scope, self.groups)
        for number, (groups, count) in enumerate(zip(self.membership, self.groups_by_layer, strict=True), 1):
            if groups.dtype != torch.int64 or groups.ndim != 1:
                raise UsageError(
                    f"membership of layer {number} must be one int64 number a neuron, "
                    f"not {groups.dtype} of shape {list(groups.shape)}"
                )
            if int(groups.min()) < 0 or int(groups.max()) >= count:
                raise UsageError(f"layer {number} has a neuron in group {_outside(groups, count)}; "
                                 f"groups go from 0 to {count - 1}")  # fmt: skip

    @property
    def groups_by_layer(self) -> tuple[int, ...]:
        """Groups that each hidden layer is cut into."""
        return self.counts or (self.groups,) * len(self.membership)

    @property
    def groups_by_gate(self) -> tuple[int, ...]:
        """Groups that each gate of a policy switches: one gate for the network, or one for each layer."""
        return self.groups_by_layer if self.scope == "layer" else (self.groups,)

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each hidden layer."""
        return tuple(len(groups) for groups in self.membership)

    @property
    def bits(self) -> int:
        """Bits of a mask: `groups`, in scope "layer" for each layer."""
        return self.groups * (len(self.membership) if self.scope == "layer" else 1)

    def by_gate(self, numbers: Tensor) -> list[Tensor]:
        """`numbers` (examples x bits) of each gate (examples x groups), without those of bits that are never set."""
        parts = numbers.split(self.groups, dim=1)
        return [part[:, :count] for part, count in zip(parts, self.groups_by_gate, strict=True)]

    @cached_property
    def columns(self) -> tuple[Tensor, ...]:
        """For each layer, the mask's bit that each neuron obeys (int64, neurons)."""
        step = self.groups if self.scope == "layer" else 0
        return tuple(groups + layer * step for layer, groups in enumerate(self.membership))

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """For each layer, membership as one-hot columns (float32, groups x neurons)."""
        return tuple(one_hot(groups, self.groups).float().T.contiguous() for groups in self.membership)

    @cached_property
    def alone(self) -> tuple[bool, ...]:
        """For each layer, whether every neuron has the bit of its own number: groups are single neurons."""
        every = torch.arange(self.groups)
        return tuple(torch.equal(groups, every) for groups in self.membership)

    @cached_property
    def sizes_by_layer(self) -> Tensor:
        """Neurons that each bit switches in each layer (int64, layers x bits)."""
        return torch.stack([torch.bincount(columns, minlength=self.bits) for columns in self.columns])

    @property
    def sizes(self) -> Tensor:
        """Neurons that each bit switches (int64, bits)."""
        return self.sizes_by_layer.sum(0)

    @property
    def largest_share(self) -> float:
        """Share of all hidden neurons that the largest group holds; at least 1 / bits."""
        return self.sizes.max().item() / sum(self.widths)

    def neurons(self, mask: Tensor) -> Tensor:
        """Neurons evaluated in each layer (float64, examples x layers) under `mask` (bool, examples x bits)."""
        return mask.double() @ self.sizes_by_layer.T.double()

    def activity(self, mask: Tensor) -> Tensor:
        """Share of the hidden neurons evaluated for each example (float64) under `mask` (bool, examples x bits)."""
        return self.neurons(mask).sum(1) / sum(self.widths)


def _outside(groups: Tensor, count: int) -> int:
    return int(groups[(groups < 0) | (groups >= count)][0])


def check_groups(widths: Sequence[int], groups: int, scope: str) -> None:
    """Raise UsageError unless neurons of these layers can be put into that many groups."""
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if not widths or min(widths) < 1:
        raise UsageError(f"a partition needs hidden layers of at least one neuron each, not widths {list(widths)}")
    most = sum(widths) if scope == "network" else min(widths)
    where = "the network" if scope == "network" else "the smallest layer"
    if not 1 <= groups <= most:
        raise UsageError(f"groups must be from 1 to the {most} neurons of {where}, not {groups}")


def check_counts(widths: Sequence[int], counts: Sequence[int], scope: str, most: int) -> None:
    """Raise UsageError unless each layer of these widths can be cut into its own of these numbers of groups."""
    if scope != "layer":
        raise UsageError(f'numbers of groups for each layer go with scope "layer", not "{scope}"')
    if len(counts) != len(widths) or max(counts) != most:
        raise UsageError(f"{len(widths)} hidden layers need as many numbers of groups, the largest {most}; not "
                         f"{list(counts)}")  # fmt: skip
    for width, count in zip(widths, counts, strict=True):
        check_groups([width], count, scope)


def cut_into_blocks(widths: Sequence[int], size: int) -> Partition:
    """The blocks of *faster-models*: each layer cut into runs of `size` neurons, with a gate for each layer.

    Raises UsageError where the size does not divide a layer.

    >>> cut_into_blocks([4, 2], 2).membership, cut_into_blocks([4, 2], 2).counts
    ((tensor([0, 0, 1, 1]), tensor([0, 0])), (2, 1))
    """
    for number, width in enumerate(widths, 1):
        if size < 1 or width % size or not width:
            raise UsageError(f"blocks of {size} neurons do not divide layer {number} of {width}; choose a block size "
                             "that divides every layer")  # fmt: skip
    counts = tuple(width // size for width in widths)
    return Partition(tuple(torch.arange(width) // size for width in widths), max(counts, default=1), "layer", counts)


def make_partition(
    kind: str, widths: Sequence[int], groups: int, generator: torch.Generator, scope: str = "network"
) -> Partition:
    """A partition that does not look at the network.

    `kind`: "random" puts each neuron into a group drawn uniformly, so sizes vary (16 groups of 2,400 neurons: 150 with
    a standard deviation of 12; *partitions*, section 5.2, reports about 10); "balanced" deals shuffled neurons out
    evenly (sizes differ by at most one); "contiguous" cuts every layer into runs of even size, one for each group.

    >>> make_partition("contiguous", [4, 2], 2, torch.Generator()).membership
    (tensor([0, 0, 1, 1]), tensor([0, 1]))
    """
    if kind not in KINDS:
        raise unknown("partition", kind, KINDS)
    check_groups(widths, groups, scope)
    if kind == "random":
        draws = [torch.randint(groups, (width,), generator=generator) for width in widths]
        return Partition(tuple(draws), groups, scope)
    if kind == "contiguous":
        return Partition(tuple(torch.arange(width) * groups // width for width in widths), groups, scope)
    if scope == "layer":
        return Partition(tuple(_dealt(width, groups, generator) for width in widths), groups, scope)
    return Partition(_dealt(sum(widths), groups, generator).split(list(widths)), groups, scope)


def _dealt(neurons: int, groups: int, generator: torch.Generator) -> Tensor:
    """Groups of shuffled neurons dealt out in turn (int64, neurons)."""
    return (torch.arange(neurons) % groups)[torch.randperm(neurons, generator=generator)]
