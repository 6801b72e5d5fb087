"""A lazy network's numbers as the kernels read them: neurons in the order of their groups, rows as long as a vector."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.kernels.tiles import LANES
from condcomp_lib.lazy import LazyNetwork, decided_by
from condcomp_lib.policies import Budget, Decision, Policy, Shared, Threshold, check_counts

DTYPES = ("float32", "bfloat16", "int8")  # of the target's weights; everything else is float32

# Where the numbers of `Packed.meta` stand. First single ones, ...
INPUTS, X_ROW, CLASSES, GROUPS, GATES, LAYERS, TANH, RESCALED, FILLED, ALWAYS_ON, BUDGETED, SCALED = range(12)
POOL, CHANNELS, HEIGHT, WIDTH, GATE_INPUTS, GATE_ROW, WIDEST, OUT_WEIGHTS, OUT_BIAS, OUT_SCALE = range(12, 22)
HEAD = 22
# ... then for each hidden layer these, ...
NEURONS, H_ROW, BIAS, SCALE, BELOW, W_ROW, ROWS_AT = range(7)
LAYER_FIELDS = 7
# ... for each gate these (a count below zero: everything is evaluated), ...
GATE_WEIGHTS, GATE_BIAS, LEVEL, COUNT = range(4)
# ... and for each group of each layer these: its first neuron, how many there are, where its numbers start in a row of
# activations (padded to whole vectors), and where its weights start.
FIRST, SIZE, H_AT, W_AT = range(4)
FIELDS = 4
MOST = np.iinfo(np.int64).max
LINE = 64  # bytes of a cache line


@dataclass(frozen=True, eq=False)
class Packed:
    """What a lazy network computes with, in four flat arrays.

    `weights` (float32, bfloat16 as uint16, or int8) of the target. For each layer a row for each of its neurons, so
    that a group is one panel of rows; and, for the layers above the first, for each group a row for each neuron below,
    of the group's weights, so that an evaluated neuron below adds a row, and one that is not or is zero adds none. The
    former serve where little is zero below: upper layers are held twice. `floats` (float32): policy, biases,
    levels, scales. `meta` (int64): where they stand.
    """

    weights: np.ndarray
    floats: np.ndarray
    meta: np.ndarray

    @property
    def bits(self) -> int:
        """Bits of a mask."""
        return int(self.meta[GATES] * self.meta[GROUPS])


class _Buffer:
    """Arrays in one flat one, each from a whole vector on."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0

    def add(self, numbers: np.ndarray) -> int:
        flat = numbers.ravel()
        self.parts += [flat, np.zeros(-len(flat) % LANES, flat.dtype)]
        at, self.size = self.size, self.size + whole(len(flat))
        return at

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


def pack(lazy: LazyNetwork, dtype: str = "float32") -> Packed:
    """The lazy network's numbers, its weights as `dtype`.

    Raises UsageError for another `dtype`; the lazy network must have passed `checked`.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    weights, floats = _Buffer(), _Buffer()
    head = np.zeros(HEAD, np.int64)
    order = tuple(torch.argsort(groups, stable=True).numpy() for groups in lazy.partition.membership)
    layers, spans = _layers(lazy, dtype, order, weights, floats)
    gates = _gates(lazy.policy, lazy.decision, order, _extra(lazy), floats)
    last = lazy.target.linears[-1]
    rows, scale = _quantised(_rows_below(lazy, len(order), last.weight.detach().numpy(), order[-1]), dtype)
    head[OUT_WEIGHTS], head[OUT_SCALE] = weights.add(_wide(rows)), floats.add(scale)
    head[OUT_BIAS] = floats.add(_bias(lazy, len(order)))
    head[[INPUTS, X_ROW]] = lazy.target.linears[0].in_features, pitch(lazy.target.linears[0].in_features)
    head[[CLASSES, GROUPS]] = last.out_features, lazy.partition.groups
    head[[GATES, LAYERS]] = len(lazy.policy.gates), len(order)
    head[[TANH, RESCALED]] = isinstance(lazy.target.activation, nn.Tanh), lazy.rescale == "activity"
    head[[FILLED, ALWAYS_ON]] = lazy.fill is not None, lazy.policy.always_on
    head[[BUDGETED, SCALED]] = isinstance(lazy.decision, Budget), dtype == "int8"
    if pool := lazy.policy.pool:
        head[[POOL, CHANNELS, HEIGHT, WIDTH]] = pool.size, *pool.shape
    head[GATE_INPUTS] = lazy.policy.gates[0].in_features
    head[[GATE_ROW, WIDEST]] = pitch(int(head[GATE_INPUTS])), max(layers[:, H_ROW].max(), whole(last.out_features))
    meta = np.concatenate([head, layers.ravel(), gates.ravel(), spans.ravel()])
    kind = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}[dtype]
    return Packed(weights.joined(kind), floats.joined(np.float32), meta)


def whole(count: int) -> int:
    """`count` rounded up to whole vectors."""
    return -(-count // LANES) * LANES


def pitch(count: int) -> int:
    """Numbers from one row of `count` to the next: whole vectors, and not a multiple of 1 KiB, because rows a power of
    two apart fall on the same places of a cache."""
    return whole(count) + (2 * LANES if whole(count) % 256 == 0 else 0)


def _layers(
    lazy: LazyNetwork, dtype: str, order: Sequence[np.ndarray], weights: _Buffer, floats: _Buffer
) -> tuple[np.ndarray, np.ndarray]:
    """The entries of `meta` for hidden layers and for their groups; their weights, biases and scales are added."""
    groups = lazy.partition.groups
    layers = np.zeros((len(order), LAYER_FIELDS), np.int64)
    spans = np.zeros((len(order), groups, FIELDS), np.int64)
    for layer, numbers in enumerate(order):
        matrix, bias = lazy.target.linears[layer].weight.detach().numpy()[numbers], _bias(lazy, layer)[numbers]
        sizes = np.bincount(lazy.partition.membership[layer].numpy(), minlength=groups)
        spans[layer, :, SIZE], spans[layer, :, FIRST] = sizes, np.cumsum(sizes) - sizes
        # Rows of the first layer are written number by number, those above by whole vectors.
        padded = sizes if layer == 0 else -(-sizes // LANES) * LANES
        spans[layer, :, H_AT] = np.cumsum(padded) - padded
        layers[layer, [NEURONS, H_ROW]] = len(numbers), padded.sum()
        rows = matrix.T if layer == 0 else _rows_below(lazy, layer, matrix, order[layer - 1])
        rows, scale = _quantised(rows, dtype)
        layers[layer, [BELOW, W_ROW]] = len(rows), pitch(len(rows))
        layers[layer, ROWS_AT] = weights.add(_wide(rows.T, pitch(len(rows))))
        biases, scales = np.zeros((2, padded.sum()), np.float32)
        for group in range(groups):
            first, size, at = spans[layer, group, [FIRST, SIZE, H_AT]]
            own = slice(first, first + size)
            biases[at : at + size], scales[at : at + size] = bias[own], scale[own]
            spans[layer, group, W_AT] = weights.add(_wide(rows[:, own])) if layer else 0
        layers[layer, [BIAS, SCALE]] = floats.add(biases), floats.add(scales)
    return layers, spans


def _gates(policy: Policy, decision: Decision, order: Sequence[np.ndarray], extra: int, floats: _Buffer) -> np.ndarray:
    """The entries of `meta` for gates; their weights, biases and levels are added."""
    found = np.zeros((len(policy.gates), FIELDS), np.int64)
    for gate, linear in enumerate(policy.gates):
        matrix = linear.weight.detach().numpy()
        if gate:  # as the layers above the first one: what was skipped adds nothing
            matrix = np.concatenate([matrix[:, order[gate - 1]].T, np.zeros((extra, len(matrix)), np.float32)])
        found[gate, GATE_WEIGHTS] = floats.add(_wide(matrix, 0 if gate else pitch(matrix.shape[1])))
        found[gate, GATE_BIAS] = floats.add(linear.bias.detach().numpy())
        level = decision.levels[gate] if isinstance(decision, Threshold) else 0.0
        found[gate, LEVEL] = floats.add(np.array([level], np.float32))
        found[gate, COUNT] = _count(decision, gate, len(linear.bias))
    return found


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


def _wide(rows: np.ndarray, width: int = 0) -> np.ndarray:
    """Rows padded with zeros to `width`, or to whole vectors."""
    return np.pad(rows, ((0, 0), (0, (width or whole(rows.shape[1])) - rows.shape[1])))


def _quantised(matrix: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The matrix (below x neurons) as `dtype`, and what each neuron's sum is to be multiplied with (float32)."""
    neurons = matrix.shape[1]
    if dtype == "float32":
        return matrix, np.ones(neurons, np.float32)
    if dtype == "bfloat16":  # rounded to nearest, ties to even
        bits = matrix.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), np.ones(neurons, np.float32)
    scale = np.maximum(np.abs(matrix).max(axis=0, initial=0), np.finfo(np.float32).tiny) / 127
    return np.rint(matrix / scale).astype(np.int8), scale.astype(np.float32)
