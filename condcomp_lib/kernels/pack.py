"""A lazy network's numbers as the kernels read them: neurons in the order of their groups, rows as long as a vector."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.kernels.tiles import LANES, LINE, QUAD, STEPS
from condcomp_lib.lazy import LazyNetwork, decided_by
from condcomp_lib.partitions import Partition
from condcomp_lib.policies import ALWAYS, Budget, Decision, Policy, Shared, Threshold, check_counts

NARROWEST = 8  # numbers of weights that rows are padded to
DTYPES = ("float32", "bfloat16", "int8")  # of the target's weights; everything else is float32

# Where the numbers of `Packed.meta` stand. First single ones, ...
INPUTS, CLASSES, GROUPS, GATES, LAYERS, TANH, RESCALED, ALWAYS_ON, BUDGETED, SCALED = range(10)
POOL, CHANNELS, HEIGHT, WIDTH, WIDEST, LONGEST, LOGITS_ROW, READ_ROWS, OUT_BIAS, OUT_SCALE = range(10, 20)
LOW, HIGH = 20, 21
HEAD = 22
# ... then for each hidden layer these (WHOLE_ROW: from one example's activations to the next, where all are kept), ...
NEURONS, H_ROW, BIAS, SCALE, WHOLE_ROW = range(5)
LAYER_FIELDS = 5
# ... for each gate these (a COUNT below zero: everything is evaluated; OWN: the bits that it needs), ...
GATE_BIAS, LEVEL, COUNT, OWN = range(4)
GATE_FIELDS = 4
# ... and spans: of the input, of what the first gate reads, of each gate's logits, of each hidden layer's groups and
# one more, of the scores. Each is neurons that stand together. FIRST: the first one's number in its layer; SIZE: how
# many. H_AT: where their sums stand in a row of sums; W_AT and W_ROW: where their weights start, a row for each neuron
# below, and the numbers from one row of them to the next; D_AT and D_ROW: the same of a row for each of these neurons.
# Both are 0 where there is no such copy: the first layer and the first gate have only rows for their neurons. X_AT and
# X_ROW: where their activations start and lie, group by group, X_AT times the examples.
FIRST, SIZE, H_AT, W_AT, W_ROW, D_AT, D_ROW, X_AT, X_ROW = range(9)
FIELDS = 9

assert NARROWEST % STEPS == QUAD % STEPS == 0  # zeros follow the last neuron of a group up to whole STEPS


@dataclass(frozen=True, eq=False)
class Packed:
    """What a lazy network computes with, in four flat arrays.

    `weights` (float32, bfloat16 as uint16, or int8) of the target, above the first layer in two copies: for each group
    of a layer a row for each neuron below, so that an evaluated neuron below adds a row, and one that is not or is zero
    adds none; and a row for each neuron of the group, for where all below is read, as the input is. `floats` (float32):
    policy (likewise), biases, levels, limits, scales. `meta` (int64): where they stand.
    """

    weights: np.ndarray
    floats: np.ndarray
    meta: np.ndarray

    @property
    def bits(self) -> int:
        """Bits of a mask."""
        return int(self.meta[GATES] * self.meta[GROUPS])


class Buffer:
    """Arrays in one flat one, each from a whole vector on."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0

    def add(self, numbers: np.ndarray) -> int:
        flat = numbers.ravel()
        self.parts += [flat, np.zeros(-len(flat) % LANES, flat.dtype)]
        at, self.size = self.size, self.size + whole(len(flat))
        return at

    def both(self, rows: np.ndarray, *, given: bool = False) -> list[int]:
        """Add weights (neurons below x neurons) as rows padded with zeros: one for each neuron below (and a few more,
        which may be read), unless what is below is the input, which is `given` in full; and one for each neuron, a
        multiple of QUAD. Returns where each begins and the numbers from one row to the next: W_AT to D_ROW."""
        below, count = rows.shape
        # The last vector of a row may reach into the next row: it adds to sums of no neuron, beyond the zeros that are
        # read behind the group's own.
        wide, long = _pitch(count, NARROWEST), _pitch(below)
        found = [0, 0] if given else [self.add(np.pad(rows, ((0, LANES), (0, wide - count)))), wide]
        return [*found, self.add(np.pad(rows.T, ((0, -count % QUAD), (0, long - below)))), long]

    def joined(self, kind: type) -> np.ndarray:
        found = aligned(self.size, kind)
        np.concatenate(self.parts, out=found)
        return found


def aligned(count: int, kind: type) -> np.ndarray:
    """So many zeros from the start of a cache line on: a vector that lies across two lines takes two reads."""
    flat = np.zeros(count * np.dtype(kind).itemsize + LINE, np.uint8)
    start = -flat.ctypes.data % LINE
    return flat[start : start + count * np.dtype(kind).itemsize].view(kind)


def checked(lazy: LazyNetwork, batch: str) -> LazyNetwork:
    """The lazy network with the decision of one example, where one is shared.

    Raises UsageError where it cannot be compiled: a policy of another kind, a decision that draws or does not fit the
    gates, or a shared one without batch "shared".
    """
    if isinstance(lazy.decision, Shared):
        if batch != "shared":
            raise UsageError(f'a Shared decision goes with batch="shared", not with "{batch}"')
        lazy = decided_by(lazy, lazy.decision.decision)
    if type(lazy.policy) is not Policy:
        raise UsageError(f"only a Policy can be compiled, not a {type(lazy.policy).__name__}, which computes more than "
                         "it saves")  # fmt: skip
    if not isinstance(lazy.decision, Threshold | Budget):
        raise UsageError(f"a compiled network decides by Threshold or Budget, not by {type(lazy.decision).__name__}; "
                         "see `lazy.calibrated`")  # fmt: skip
    gates = len(lazy.policy.gates)
    if isinstance(lazy.decision, Budget):
        check_counts(lazy.decision.counts, gates, lazy.partition.groups)
    elif len(lazy.decision.levels) != gates:
        raise UsageError(f"each of {gates} gates must have a level, not {len(lazy.decision.levels)} levels")
    return lazy


def check_filters(partition: Partition) -> None:
    """Raise UsageError unless every filter of a conv net has a bit of its own, in a mask for each layer."""
    own = all(len(set(groups.tolist())) == len(groups) for groups in partition.membership)
    if partition.scope != "layer" or not own:
        raise UsageError('a compiled conv net switches single filters, by gates of scope "layer"; see '
                         "`partitions.cut_into_blocks` with blocks of 1")  # fmt: skip


def pack(lazy: LazyNetwork, dtype: str = "float32") -> Packed:
    """The lazy network's numbers, its weights as `dtype`.

    Raises UsageError for another `dtype`; the lazy network must have passed `checked`.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    weights, floats = Buffer(), Buffer()
    head = np.zeros(HEAD, np.int64)
    order = tuple(torch.argsort(groups, stable=True).numpy() for groups in lazy.partition.membership)
    last, read = lazy.target.linears[-1], lazy.policy.gates[0].in_features
    inputs = [_span(size, whole(size)) for size in (lazy.target.linears[0].in_features, read)]
    gates, logits = _gates(lazy.policy, lazy.decision, order, _extra(lazy), floats)
    layers, spans = _layers(lazy, dtype, order, weights, floats)
    rows, scale = quantised(_rows_below(lazy, len(order), last.weight.detach().numpy(), order[-1]), dtype)
    scores = _span(last.out_features, 0, weights.both(rows))
    head[[OUT_SCALE, OUT_BIAS]] = floats.add(scale), floats.add(_bias(lazy, len(order)))
    head[[INPUTS, CLASSES, GROUPS]] = lazy.target.linears[0].in_features, last.out_features, lazy.partition.groups
    head[[GATES, LAYERS]] = len(lazy.policy.gates), len(order)
    head[[TANH, RESCALED]] = isinstance(lazy.target.activation, nn.Tanh), lazy.rescale == "activity"
    head[[ALWAYS_ON, BUDGETED]] = lazy.policy.always_on, isinstance(lazy.decision, Budget)
    head[SCALED] = dtype == "int8"
    head[[LOW, HIGH]] = add_limits(lazy.policy, floats)
    if pool := lazy.policy.pool:
        head[[POOL, CHANNELS, HEIGHT, WIDTH]] = pool.size, *pool.shape
    head[WIDEST] = max(*layers[:, H_ROW], whole(last.out_features), whole(lazy.partition.groups))
    head[[LOGITS_ROW, READ_ROWS]] = whole(lazy.partition.groups), sum(span[X_ROW] for span in inputs)
    head[LONGEST] = max(*(spans[:, -1, X_AT] + spans[:, -1, X_ROW]), *layers[:, WHOLE_ROW])
    spans = np.concatenate([np.stack([*inputs, *logits]), spans.reshape(-1, FIELDS), scores[None]])
    meta = np.concatenate([head, layers.ravel(), gates.ravel(), spans.ravel()])
    kind = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}[dtype]
    return Packed(weights.joined(kind), floats.joined(np.float32), meta)


def whole(count: int) -> int:
    """`count` rounded up to whole vectors."""
    return -(-count // LANES) * LANES


def _pitch(count: int, unit: int = LANES) -> int:
    """Numbers from one row of `count` to the next: a multiple of `unit`, and not of 64 where only part of a row is
    read at a time, because such rows fall on the same places of a cache."""
    least = -(-count // unit) * unit
    return least + (unit if least % 64 == 0 and count > 64 else 0)


def _span(size: int, row: int, at: Sequence[int] = (0, 0, 0, 0)) -> np.ndarray:
    """The entry of `meta` for neurons that have a layer to themselves, their activations in rows of `row` numbers, with
    weights `at` (see `Buffer.both`)."""
    found = np.zeros(FIELDS, np.int64)
    found[[SIZE, X_ROW]], found[[W_AT, W_ROW, D_AT, D_ROW]] = (size, row), at
    return found


def _layers(
    lazy: LazyNetwork, dtype: str, order: Sequence[np.ndarray], weights: Buffer, floats: Buffer
) -> tuple[np.ndarray, np.ndarray]:
    """The entries of `meta` for hidden layers and the spans of their groups, and of one more: bits that stand for the
    groups where skipped neurons are filled in. Their weights, biases and scales are added."""
    groups = lazy.partition.groups
    layers = np.zeros((len(order), LAYER_FIELDS), np.int64)
    spans = np.zeros((len(order), groups + 1, FIELDS), np.int64)
    for layer, numbers in enumerate(order):
        matrix, bias = lazy.target.linears[layer].weight.detach().numpy()[numbers], _bias(lazy, layer)[numbers]
        sizes = np.bincount(lazy.partition.membership[layer].numpy(), minlength=groups)
        spans[layer, :, SIZE] = *sizes, _extra(lazy)
        spans[layer, :, X_ROW] = -(-spans[layer, :, SIZE] // LANES) * LANES
        padded = spans[layer, :-1, X_ROW]
        spans[layer, :-1, H_AT] = np.cumsum(padded) - padded
        for at, sized in ((FIRST, SIZE), (X_AT, X_ROW)):
            spans[layer, :, at] = np.cumsum(spans[layer, :, sized]) - spans[layer, :, sized]
        below = len(numbers) + _extra(lazy)
        layers[layer, [NEURONS, H_ROW, WHOLE_ROW]] = len(numbers), _pitch(padded.sum()), whole(below) + 2 * LANES
        rows = matrix.T if layer == 0 else _rows_below(lazy, layer, matrix, order[layer - 1])
        rows, scale = quantised(rows, dtype)
        biases, scales = np.zeros((2, padded.sum()), np.float32)
        for group in range(groups):
            first, size, at = spans[layer, group, [FIRST, SIZE, H_AT]]
            own = slice(first, first + size)
            biases[at : at + size], scales[at : at + size] = bias[own], scale[own]
            spans[layer, group, [W_AT, W_ROW, D_AT, D_ROW]] = weights.both(rows[:, own], given=layer == 0)
        layers[layer, [BIAS, SCALE]] = floats.add(biases), floats.add(scales)
    return layers, spans


def _gates(
    policy: Policy, decision: Decision, order: Sequence[np.ndarray], extra: int, floats: Buffer
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The entries of `meta` for gates and the spans of their logits; their weights, biases and levels are added."""
    found, spans = np.zeros((len(policy.gates), GATE_FIELDS), np.int64), []
    for gate, linear in enumerate(policy.gates):
        absent = policy.bits // len(policy.gates) - linear.out_features  # as in Policy.logits
        rows = np.pad(linear.weight.detach().numpy().T, ((0, 0), (0, absent)))
        if gate:  # as the layers above the first one: what was skipped adds nothing
            rows = np.concatenate([rows[order[gate - 1]], np.zeros((extra, rows.shape[1]), np.float32)])
        spans.append(_span(rows.shape[1], 0, floats.both(rows, given=gate == 0)))
        level = decision.levels[gate] if isinstance(decision, Threshold) else 0.0
        bias = np.pad(linear.bias.detach().numpy(), (0, absent), constant_values=-ALWAYS)
        found[gate, GATE_BIAS] = floats.add(bias)
        found[gate, LEVEL] = floats.add(np.array([level], np.float32))
        found[gate, [COUNT, OWN]] = _count(decision, gate, linear.out_features), linear.out_features
    return found, spans


def add_limits(policy: Policy, floats: Buffer) -> tuple[int, int]:
    """Add the least and the most that logits may be, the ends of float32 where there are none; return where."""
    most = float(np.finfo(np.float32).max)
    low, high = policy.limits or (-most, most)
    return floats.add(np.array([low], np.float32)), floats.add(np.array([high], np.float32))


def _count(decision: Decision, gate: int, groups: int) -> int:
    """The groups that a budget asks for, -1 for all of them, whatever the input."""
    if isinstance(decision, Budget):
        return decision.counts[gate] if decision.counts[gate] < groups else -1
    return -1 if isinstance(decision, Threshold) and decision.levels[gate] == -math.inf else 0


def _extra(lazy: LazyNetwork) -> int:
    """Rows below the neurons' own: one for each group where skipped neurons are filled in."""
    return 0 if lazy.fill is None else lazy.partition.groups


def _rows_below(lazy: LazyNetwork, layer: int, matrix: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The rows (float32, neurons below and extra x neurons) that neurons below add, in their new order.

    Where skipped neurons are filled in, all of the filling is in the bias (see `_bias`), and an evaluated group adds a
    row that takes its own away, so that evaluated zeros still add nothing.
    """
    rows = matrix[:, below].T
    if lazy.fill is None:
        return rows
    fill, groups = lazy.fill[layer - 1].numpy()[below], lazy.partition.membership[layer - 1].numpy()[below]
    away = np.zeros((lazy.partition.groups, rows.shape[1]), np.float32)
    np.add.at(away, groups, -fill[:, None] * rows)
    return np.concatenate([rows, away])


def _bias(lazy: LazyNetwork, layer: int) -> np.ndarray:
    """The bias of a layer (float32, neurons) with everything below filled in."""
    linear = lazy.target.linears[layer]
    if lazy.fill is None or layer == 0:
        return linear.bias.detach().numpy()
    filled: Tensor = linear.bias + linear.weight @ lazy.fill[layer - 1]
    return filled.detach().numpy()


def quantised(matrix: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The matrix (below x neurons) as `dtype`, and what each neuron's sum is to be multiplied with (float32)."""
    neurons = matrix.shape[1]
    if dtype == "float32":
        return matrix, np.ones(neurons, np.float32)
    if dtype == "bfloat16":  # rounded to nearest, ties to even
        bits = matrix.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), np.ones(neurons, np.float32)
    scale = np.maximum(np.abs(matrix).max(axis=0, initial=0), np.finfo(np.float32).tiny) / 127
    return np.rint(matrix / scale).astype(np.int8), scale.astype(np.float32)
