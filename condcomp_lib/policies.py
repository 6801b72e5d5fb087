"""Computation policies and the ways to decide a mask from them (*partitions*, section 3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from condcomp_lib.errors import UsageError
from condcomp_lib.partitions import Partition
from condcomp_lib.targets import linear

LEAST_FACTOR = 1e-3  # of a layer's share: none is left out altogether
ALWAYS = 30.0  # the logit of a group that is always evaluated: sigma is exactly 1 in float32, its logarithm finite


class Pool:
    """Average pooling of flattened images, so that a policy reads a smaller picture.

    Arguments: `shape` (channels, height, width) of an image; `size` pixels a side that are averaged into one.

    >>> Pool((3, 32, 32), 4).outputs
    192
    """

    def __init__(self, shape: tuple[int, int, int], size: int) -> None:
        channels, height, width = shape
        if size < 1 or height % size or width % size:
            raise UsageError(f"a pool's size must divide the image's sides, {height} x {width}, which {size} does not")
        self.shape, self.size = shape, size
        self.inputs, self.outputs = channels * height * width, channels * (height // size) * (width // size)

    def __call__(self, x: Tensor) -> Tensor:
        """Pooled images (float32, examples x outputs) of `x` (float32, examples x inputs)."""
        return avg_pool2d(x.reshape(-1, *self.shape), self.size).flatten(1)


class Policy(nn.Module):
    """Sigmoid-Bernoulli policies: the bits of a mask are independent with probability sigma = sigmoid(Z s + d).

    A *gate* is one linear map Z s + d. In scope "network" there is one, which reads the input X (or pooled X) and sets
    one bit for each group (*partitions*, section 3). In scope "layer" there is one for each hidden layer, which reads
    the layer below after its own mask, the first one X or pooled X (*faster-models*).

    Arguments: `partition` whose groups are switched; `inputs` features of X; `pool` how X is made smaller (None: not);
    `generator` draws the weights; `always_on` gives group 0 of every gate a fixed logit, ALWAYS, whatever the input,
    and a lazy network evaluates it whatever is decided; `limits` between which probabilities are kept (*faster-models*'
    code), so that no group is ever certain: beyond them there is no gradient.
    """

    def __init__(
        self,
        partition: Partition,
        inputs: int,
        pool: Pool | None = None,
        generator: torch.Generator | None = None,
        always_on: bool = False,
        limits: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if limits is not None and not 0 < limits[0] < limits[1] < 1:
            raise UsageError(f"limits must be two rising probabilities between 0 and 1, not {list(limits)}")
        if pool is not None and pool.inputs != inputs:
            raise UsageError(f"the pool takes {pool.inputs} features, the input has {inputs}")
        first = pool.outputs if pool else inputs
        sources = [first, *partition.widths[:-1]] if partition.scope == "layer" else [first]
        self.scope, self.pool, self.always_on = partition.scope, pool, always_on
        self.limits = None if limits is None else tuple(math.log(rate / (1 - rate)) for rate in limits)
        self._groups = partition.groups
        counts = partition.groups_by_gate
        self._gates = nn.ModuleList(linear(*sides, generator) for sides in zip(sources, counts, strict=True))

    @property
    def gates(self) -> list[nn.Linear]:
        """The linear maps, first layer first."""
        return list(self._gates)  # type: ignore[arg-type]

    @property
    def bits(self) -> int:
        """Bits of a mask over all gates; also those that a gate with fewer groups than others does not need."""
        return self._groups * len(self.gates)

    def start_at(self, rate: float) -> None:
        """Set the biases so that every bit's probability is `rate` where a gate reads zeros.

        Raises UsageError unless the rate lies between 0 and 1: from either end no gradient leads back.
        """
        if not 0 < rate < 1:
            raise UsageError(f"a policy must start at a rate between 0 and 1, not at {rate}")
        for gate in self.gates:
            nn.init.constant_(gate.bias, math.log(rate / (1 - rate)))

    def reads(self) -> list[int]:
        """Features that each gate is given, before pooling."""
        read = [gate.in_features for gate in self.gates]
        return [self.pool.inputs, *read[1:]] if self.pool else read

    def logits(self, gate: int, s: Tensor) -> Tensor:
        """Z s + d of one gate (float32, examples x groups); `s` is X for the first gate, else the masked layer below.
        Bits that a gate with fewer groups than others does not need have a logit of -ALWAYS.

        Logits rather than probabilities, because sigma rounds to exactly 0 or 1 where a policy is sure.
        """
        logits: Tensor = self.gates[gate](self.pool(s) if self.pool and gate == 0 else s)
        if self.limits:
            logits = logits.clamp(*self.limits)
        if missing := self._groups - logits.shape[1]:
            logits = torch.cat([logits, logits.new_full((len(logits), missing), -ALWAYS)], 1)
        if not self.always_on:
            return logits
        # The others stay below it, so that it comes first in every ranking.
        return torch.cat([torch.full_like(logits[:, :1], ALWAYS), logits[:, 1:].clamp(max=ALWAYS - 1)], 1)


class Decision(Protocol):
    """How a mask is decided from one gate's logits."""

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """The bits (bool, examples x groups) for `logits` (float32, examples x groups) of that gate."""
        ...


@dataclass(frozen=True)
class Sample:
    """Every bit is drawn with its probability, in training and at inference, as in the papers."""

    generator: torch.Generator

    def __call__(self, logits: Tensor, gate: int) -> Tensor:  # noqa: ARG002 (all gates alike)
        """See `Decision`."""
        return torch.rand(logits.shape, generator=self.generator) < logits.sigmoid()


@dataclass(frozen=True)
class Blind:
    """Bits drawn at fixed rates whatever the input: the same groups as often, without a policy. What one must beat.

    `rates` float (groups) in [0, 1] for each gate.
    """

    rates: tuple[Tensor, ...]
    generator: torch.Generator

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """See `Decision`; of the logits only the shape matters."""
        return torch.rand(logits.shape, generator=self.generator) < self.rates[gate]


@dataclass(frozen=True)
class Threshold:
    """A bit is set where its logit lies above the gate's level (one level for each gate)."""

    levels: tuple[float, ...]

    @classmethod
    def at(cls, probability: float, policy: Policy) -> "Threshold":
        """The threshold at one probability for all gates; 0.5 decides each bit by what is likelier."""
        if not 0 < probability < 1:
            raise UsageError(f"a threshold must lie between 0 and 1, not at {probability}")
        return cls((math.log(probability / (1 - probability)),) * len(policy.gates))

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """See `Decision`."""
        return logits > self.levels[gate]


@dataclass(frozen=True)
class Budget:
    """The `counts[gate]` groups with the highest logits are evaluated, as many for every example."""

    counts: tuple[int, ...]

    @classmethod
    def of(cls, activity: float | Sequence[float], partition: Partition, policy: Policy) -> "Budget":
        """The number of groups nearest to the asked share of them (one share, or one for each gate), at least one.

        Where groups differ in size, the activity in neurons differs from it.
        """
        asked = asked_by_gate(activity, len(policy.gates))
        counts = partition.groups_by_gate
        return cls(tuple(max(1, round(share * count)) for share, count in zip(asked, counts, strict=True)))

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """See `Decision`."""
        count = self.counts[gate]
        if not 1 <= count <= logits.shape[1]:
            raise UsageError(f"a budget must be from 1 to {logits.shape[1]} groups, not {count}")
        chosen = logits.topk(count, dim=1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)


@dataclass(frozen=True)
class Given:
    """Bits that are known already: `mask` (bool, examples x bits), or one row for every example."""

    mask: Tensor

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """See `Decision`; of the logits only the shape matters."""
        groups = logits.shape[1]
        return self.mask[:, gate * groups : (gate + 1) * groups].expand(len(logits), -1)


@dataclass(frozen=True)
class Shared:
    """One mask for all examples that come together, or for each run of so many `examples` of them, decided from their
    mean logits (our reading: *dropout-policies* shares one mask among 32 examples and leaves open how it is decided).
    """

    decision: Decision
    examples: int | None = None

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """See `Decision`."""
        size = self.examples or max(1, len(logits))
        return self.decision(means_of_runs(logits, size), gate).repeat_interleave(size, 0)[: len(logits)]


def means_of_runs(numbers: Tensor, size: int) -> Tensor:
    """Means over runs of `size` rows of `numbers`, the last run maybe shorter.

    >>> means_of_runs(torch.tensor([[1.0], [3.0], [5.0]]), 2)
    tensor([[2.],
            [5.]])
    """
    return torch.stack([part.mean(0) for part in numbers.split(size)]) if len(numbers) else numbers


def asked_by_gate(activity: float | Sequence[float], gates: int) -> tuple[float, ...]:
    """The asked activity for each gate, from one share for all or one for each; every share in (0, 1]."""
    asked = tuple(activity) if isinstance(activity, Sequence) else (activity,) * gates
    if len(asked) != gates:
        raise UsageError(f"give one activity, or one for each of the {gates} gates, not {len(asked)}")
    for share in asked:
        if not 0 < share <= 1:
            raise UsageError(f"activity must be in (0, 1], not {share}")
    return asked


def spread_over(activity: float, factors: Sequence[float], widths: Sequence[int]) -> list[float]:
    """The share of each layer (of so many neurons), in proportion to `factors`, with which `activity` of all neurons is
    evaluated; what a layer that is evaluated whole cannot take goes to the others.

    >>> spread_over(0.5, [1, 1], [100, 100]), spread_over(0.9, [3, 1], [100, 100])
    ([0.5, 0.5], [1.0, 0.8])
    """
    own, sizes = np.array(factors, float).clip(min=LEAST_FACTOR), np.array(widths, float)
    rates = np.zeros(len(own))
    while (lacks := activity * sizes.sum() - rates @ sizes) > 1e-9:
        room = own * (rates < 1)
        rates = (rates + room * lacks / (room @ sizes)).clip(max=1)
    return rates.round(6).tolist()


def check_counts(counts: Sequence[int], gates: int, groups: int) -> None:
    """Raises UsageError unless `counts` asks each gate for 1 to `groups` groups."""
    if len(counts) != gates or not all(1 <= count <= groups for count in counts):
        raise UsageError(f"each of {gates} gates must be asked for 1 to {groups} groups, not for {list(counts)}")


def level_for(logits: Tensor, sizes: Tensor, activity: float) -> float:
    """The level above which groups must be set so that mean activity comes nearest to what is asked.

    Arguments: `logits` (float32, examples x groups) of calibration data; `sizes` (int64, groups) the neurons that each
    group switches; `activity` the share of these neurons to evaluate, in (0, 1].

    Equal logits stand or fall together: a policy that does not look at its input cannot be calibrated finely.
    """
    if not len(logits):
        raise UsageError("there are no examples to calibrate on")
    if activity == 1:
        return -math.inf
    values, order = logits.flatten().sort(descending=True)
    weights = sizes.double().expand(logits.shape).flatten()[order] / (sizes.sum() * len(logits))
    # A cut is possible only between different values; `reached[i]` is the activity of a cut after the i-th.
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])
    reached = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(0)[last]])
    ends = torch.cat([values.new_tensor([math.inf]), values[last], values.new_tensor([-math.inf])])
    best = int((reached - activity).abs().argmin())
    above, below = ends[best].item(), ends[best + 1].item()
    # Half-way between the two values, or the lower one where rounding would meet the upper one or one end is infinite.
    level = values.new_tensor((above + below) / 2).item()  # as float32, in which it will be compared
    return level if math.isfinite(level) and below <= level < above else below
