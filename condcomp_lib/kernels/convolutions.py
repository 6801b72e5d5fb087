"""Lazy conv nets, compiled: the chosen filters of a layer, applied to the channels that were chosen below.

Vectors hold neighbouring positions of a picture, so that any filter and any channel can be left out without packing
weights anew. A picture is kept row after row with a zero behind each row and zeros around, so that all of it is one
long row to which each of the nine weights of a filter adds from another start; where one or two rows fill a vector,
rows are read one by one and what lies between them is not computed. Pictures that a layer of stride 2 reads
are kept as four, of every other row and column.
"""

from typing import Any

import numba
import numpy as np

from condcomp_lib.kernels import pack
from condcomp_lib.kernels.pack import ALWAYS_ON, BUDGETED, CLASSES, GATES, GROUPS, INPUTS, LAYERS, Packed
from condcomp_lib.kernels.products import UNCOUNTED, compiled, decide, kept
from condcomp_lib.kernels.tiles import LANES, filter_tile
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.policies import ALWAYS, Budget, Policy, Threshold
from condcomp_lib.targets import ConvNet

# Of a tile: its sums, a part of a row of pictures and a weight fill the registers.
FILTERS_AT_ONCE, VECTORS = 4, 6 if LANES == 16 else 3
_tile_6, _tile_5, _tile_4, _tile_3, _tile_2, _tile_1 = (
    filter_tile(FILTERS_AT_ONCE, min(vectors, VECTORS)) for vectors in (6, 5, 4, 3, 2, 1)
)
ROWS_AT_ONCE = 4 if LANES == 16 else 2  # vectors of a tile of whole rows, where one or two rows fill a vector
_rows_1, _rows_2 = (filter_tile(FILTERS_AT_ONCE, ROWS_AT_ONCE, parts, LANES // parts + 1) for parts in (1, 2))
TAPS = 9
# Sums in any order, so that they fit vectors; what is no number stays none.
summing = numba.njit(nogil=True, error_model="numpy", boundscheck=False, fastmath={"reassoc", "nsz"},
                     **UNCOUNTED)  # fmt: skip

# `Packed.meta` starts as that of fully connected networks does, as far as the names above go; then these, ...
RESCALED, POOL, OUT, OUT_BIAS, SPACE, SUMS_ROW, LOW, HIGH, MOST = range(10, 19)
HEAD = 19
# ... and for each layer these. BELOW: channels of what it reads; ROW, PHASE, START: of the pictures that it reads, the
# numbers from one row to the next, from one of four to the next, and to the first number behind the zeros; PICTURE: all
# that one channel takes; X_AT: where the first one lies in the space to work in; PARTS: rows that fill a vector, 0
# where pictures are one long row; SUM_ROW: from one row of sums to the next; TAP: nine starts.
FILTERS, BELOW, STRIDE, HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH, ROW, PHASE, START, PICTURE, X_AT = range(12)
W_AT, B_AT, GATE_AT, GATE_BIAS, LEVEL, COUNT, PARTS, SUM_ROW, TAP = range(12, 21)
FIELDS = TAP + TAPS


@summing
def _place(from_, at, row, height, width, bias, factor, rectified, x, to, layer):  # type: ignore[no-untyped-def]
    """Put a picture, `height` rows of `row` numbers in `from_` from `at` on, where the layer reads its channel (from
    `to` on in `x`); with a bias, rectified and times a factor, or as it is. Returns the sum of what was put."""
    stride, phase, pitch, total = layer[STRIDE], layer[PHASE], layer[ROW], np.float32(0)
    for y in range(height):
        first, own = at + y * row, to + layer[START] + (y // stride) * pitch + (y % stride) * stride * phase
        given = from_[first : first + width]
        if not rectified and stride == 1:
            for column in range(width):
                x[own + column] = given[column]
        elif stride == 1:
            put = x[own : own + width]
            for column in range(width):
                number = (given[column] + bias) * factor
                put[column] = np.float32(0) if number < 0 else number
                total += put[column]
        else:
            even, odd = x[own : own + (width + 1) // 2], x[own + phase : own + phase + width // 2]
            for column in range(width // 2):
                left, right = given[2 * column], given[2 * column + 1]
                if rectified:
                    left, right = (left + bias) * factor, (right + bias) * factor
                    left = np.float32(0) if left < 0 else left
                    right = np.float32(0) if right < 0 else right
                    total += left + right
                even[column], odd[column] = left, right
            if width % 2:
                left = given[width - 1]
                if rectified:
                    left = (left + bias) * factor
                    left = np.float32(0) if left < 0 else left
                    total += left
                even[width // 2] = left
    return total


@summing
def _averaged(sums, at, row, height, width, bias, factor):  # type: ignore[no-untyped-def]
    """The sum of a picture that only its mean is needed of."""
    total = np.float32(0)
    for y in range(height):
        given = sums[at + y * row : at + y * row + width]
        for column in range(width):
            number = (given[column] + bias) * factor
            total += np.float32(0) if number < 0 else number
    return total


@compiled
def _filtered(positions, chosen, count, below, read, weights, layer, x, channel, weight, starts, sums, sums_row):  # type: ignore[no-untyped-def]
    """The sums of `count` chosen filters over the `read` chosen channels below, `positions` of each."""
    if read == 0:
        sums[: count * sums_row] = 0
        return
    entries = 0
    for i in range(read):
        for tap in range(TAPS):
            channel[entries] = layer[X_AT] + below[i] * layer[PICTURE] + layer[TAP + tap]
            weight[entries] = below[i] * TAPS + tap
            entries += 1
    for i in range(count + FILTERS_AT_ONCE - 1):  # a tile that is not full takes its last filter several times
        starts[i] = layer[W_AT] + chosen[min(i, count - 1)] * layer[BELOW] * TAPS
    at, parts = 0, layer[PARTS]
    while parts and at < positions:
        start = at // layer[OUT_WIDTH] * layer[ROW]
        for i in range(0, count, FILTERS_AT_ONCE):
            to = i * sums_row + at
            if parts == 1:
                _rows_1(x, start, channel, weight, entries, weights, starts, i, sums, sums_row, to)
            else:
                _rows_2(x, start, channel, weight, entries, weights, starts, i, sums, sums_row, to)
        at += ROWS_AT_ONCE * LANES
    while at < positions:  # the part of the pictures that a turn reads stays in the L1 cache
        left = (positions - at + LANES - 1) // LANES
        turns = (left + VECTORS - 1) // VECTORS
        vectors = (left + turns - 1) // turns  # as even as can be
        for i in range(0, count, FILTERS_AT_ONCE):
            to = i * sums_row + at
            if vectors == 6:
                _tile_6(x, at, channel, weight, entries, weights, starts, i, sums, sums_row, to)
            elif vectors == 5:
                _tile_5(x, at, channel, weight, entries, weights, starts, i, sums, sums_row, to)
            elif vectors == 4:
                _tile_4(x, at, channel, weight, entries, weights, starts, i, sums, sums_row, to)
            elif vectors == 3:
                _tile_3(x, at, channel, weight, entries, weights, starts, i, sums, sums_row, to)
            elif vectors == 2:
                _tile_2(x, at, channel, weight, entries, weights, starts, i, sums, sums_row, to)
            else:
                _tile_1(x, at, channel, weight, entries, weights, starts, i, sums, sums_row, to)
        at += vectors * LANES


@summing
def _pooled(x, first, meta, layer, means, band):  # type: ignore[no-untyped-def]
    """What the first gate reads of an image: the mean of every channel, or of every square of `POOL` pixels a side.
    Rows are added up in `band` first, as whole vectors."""
    height, width, size, at = layer[HEIGHT], layer[WIDTH], meta[POOL], 0
    high, wide = (size, size) if size else (height, width)
    part = np.float32(1) / np.float32(high * wide)
    for start in range(0, layer[BELOW] * height, high):
        band[:width] = 0
        for y in range(start, start + high):
            given = x[first + y * width :][:width]
            for column in range(width):
                band[column] += given[column]
        for left in range(0, width, wide):
            total = np.float32(0)
            for column in range(left, left + wide):
                total += band[column]
            means[at] = total * part
            at += 1
    return at


@compiled
def _gate(read, reads, means, weights, layer, meta, logits):  # type: ignore[no-untyped-def]
    """The logits of a gate that reads the listed means."""
    groups = meta[GROUPS]
    bias, at = layer[GATE_BIAS], layer[GATE_AT]
    for group in range(groups):
        logits[group] = weights[bias + group]
    for i in range(reads):
        mean, own = means[i], weights[at + read[i] * groups :][:groups]  # a slice: its index cannot be below zero
        for group in range(groups):
            logits[group] += mean * own[group]
    for group in range(layer[FILTERS]):
        logits[group] = min(max(logits[group], weights[meta[LOW]]), weights[meta[HIGH]])
    if meta[ALWAYS_ON]:
        for group in range(groups):
            logits[group] = min(logits[group], np.float32(ALWAYS - 1))
        logits[0] = ALWAYS


@compiled
def _one(x, first, weights, meta, layers, scores, space, lists, bits, known):  # type: ignore[no-untyped-def]
    """The scores of one example; see `_run`."""
    groups, classes, most = meta[GROUPS], meta[CLASSES], meta[MOST]
    below, chosen, starts = lists[:most], lists[most : 2 * most], lists[2 * most : 3 * most + FILTERS_AT_ONCE]
    channel, weight = lists[3 * most + FILTERS_AT_ONCE :][: TAPS * most], lists[(3 + TAPS) * most + FILTERS_AT_ONCE :]
    sums, means = space[meta[SPACE] :], space[meta[SPACE] + meta[SUMS_ROW] * (most + FILTERS_AT_ONCE) :]
    logits, scratch, means = means[:groups], means[groups : 2 * groups], means[2 * groups :]
    image, factor, invalid = layers[0], np.float32(1), False
    size = image[HEIGHT] * image[WIDTH]
    for own in range(image[BELOW]):
        _place(x, first + own * size, image[WIDTH], image[HEIGHT], image[WIDTH], factor, factor, False,
               space, image[X_AT] + own * image[PICTURE], image)  # fmt: skip
        below[own] = own
    count = image[BELOW]
    reads = _pooled(x, first, meta, image, means, sums)
    for number in range(len(layers)):
        layer = layers[number]
        own_bits, read = bits[number * groups : (number + 1) * groups], count
        if number == 0:
            for i in range(reads):
                chosen[i] = i
            _gate(chosen, reads, means, weights, layer, meta, logits)
        else:
            _gate(below, read, means, weights, layer, meta, logits)
        invalid = invalid or np.isnan(logits[0]) or np.isnan(logits[layer[FILTERS] - 1])
        if not known:
            decide(logits, own_bits, weights[layer[LEVEL]], layer[COUNT], meta[BUDGETED], meta[ALWAYS_ON], scratch)
        count = 0
        for group in range(layer[FILTERS]):
            if own_bits[group]:
                chosen[count] = group
                count += 1
        factor = np.float32(layer[FILTERS]) / np.float32(max(count, 1)) if meta[RESCALED] else np.float32(1)
        row, height, width = layer[SUM_ROW], layer[OUT_HEIGHT], layer[OUT_WIDTH]
        if count:
            _filtered(height * row, chosen, count, below, read, weights, layer, space, channel, weight, starts,
                      sums, meta[SUMS_ROW])  # fmt: skip
        for i in range(count):
            bias, at = weights[layer[B_AT] + chosen[i]], i * meta[SUMS_ROW]
            if number + 1 < len(layers):
                above = layers[number + 1]
                total = _place(sums, at, row, height, width, bias, factor, True, space,
                               above[X_AT] + chosen[i] * above[PICTURE], above)  # fmt: skip
            else:
                total = _averaged(sums, at, row, height, width, bias, factor)
            means[i], below[i] = total / np.float32(height * width), chosen[i]
    for own in range(classes):
        # An input that is not a number decides for nothing, which must not look like a result.
        scores[own] = np.nan if invalid else weights[meta[OUT_BIAS] + own]
    for i in range(count):
        for own in range(classes):
            scores[own] += means[i] * weights[meta[OUT] + below[i] * classes + own]


def _run(x, weights, floats, meta, out, space, lists, bits, known, step, shared):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Scores of the examples, one after the other; arguments as of `cpu.run`, which it stands for."""
    layers = meta[HEAD:].reshape((-1, FIELDS))
    flat = x.reshape(-1)
    for example in range(len(x)):
        _one(flat, example * meta[INPUTS], floats, meta, layers, out[example], space, lists, bits[example], known)


def room(packed: Packed) -> tuple[int, int]:
    """The float32 and int64 numbers that `run` needs to work in; the float32 ones must be zeros at first."""
    meta, most = packed.meta, int(packed.meta[MOST])
    sums = int(meta[SUMS_ROW]) * (most + FILTERS_AT_ONCE)
    return int(meta[SPACE]) + sums + 2 * int(meta[GROUPS]) + most, (3 + 2 * TAPS) * most + FILTERS_AT_ONCE


def pack_filters(lazy: LazyNetwork) -> Packed:
    """The numbers of a lazy conv net, which must have passed `pack.checked`.

    Raises UsageError where filters are not switched one by one or an activity is asked of the network as a whole.
    """
    target, policy, buffer = lazy.target, lazy.policy, pack.Buffer()
    assert isinstance(target, ConvNet)
    pack.check_filters(lazy.partition)
    head, groups = np.zeros(HEAD, np.int64), lazy.partition.groups
    layers = _geometry(target)
    for number, (own, given) in enumerate(zip(layers, target.linears, strict=False)):
        own[W_AT], own[B_AT] = (buffer.add(part.detach().contiguous().numpy()) for part in (given.weight, given.bias))
        _pack_gate(own, number, policy, lazy.decision, buffer)
    last = target.linears[-1]
    head[OUT] = buffer.add(np.ascontiguousarray(last.weight.detach().numpy().T))
    head[OUT_BIAS] = buffer.add(last.bias.detach().numpy())
    head[[LOW, HIGH]] = pack.add_limits(policy, buffer)
    head[[INPUTS, CLASSES, GROUPS, GATES, LAYERS]] = target.inputs, last.out_features, groups, len(layers), len(layers)
    head[[RESCALED, POOL]] = lazy.rescale == "activity", policy.pool.size if policy.pool else 0
    head[[ALWAYS_ON, BUDGETED]] = policy.always_on, isinstance(lazy.decision, Budget)
    head[MOST] = max(*target.hidden, target.shape[0], policy.gates[0].in_features)
    head[SPACE] = layers[-1, X_AT] + layers[-1, PICTURE] * layers[-1, BELOW] + 2 * VECTORS * LANES
    head[SUMS_ROW] = pack.whole(int((layers[:, OUT_HEIGHT] * layers[:, ROW]).max())) + VECTORS * LANES
    return Packed(np.zeros(0, np.float32), buffer.joined(np.float32), np.concatenate([head, layers.ravel()]))


def _geometry(target: ConvNet) -> np.ndarray:
    """Of each layer what does not depend on weights."""
    layers = np.zeros((len(target.hidden), FIELDS), np.int64)
    channels, sides, at = (target.shape[0], *target.hidden), (target.shape[1:], *target.sides), 0
    for number, (own, stride) in enumerate(zip(layers, target.strides, strict=True)):
        (height, width), (out_height, out_width) = sides[number : number + 2]
        row = out_width + 1
        start = row + 1
        phase = start + (out_height + 1) * row + 1
        own[[FILTERS, BELOW, STRIDE]] = channels[number + 1], channels[number], stride
        own[[HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH]] = height, width, out_height, out_width
        own[[ROW, PHASE, START, PICTURE]] = row, phase, start, phase * stride**2
        own[SUM_ROW], parts = row, LANES // out_width
        if parts in (1, 2) and LANES % out_width == 0 and out_height % (parts * ROWS_AT_ONCE) == 0:
            own[SUM_ROW], own[PARTS] = out_width, parts  # rows fill vectors: what lies between them is not computed
        own[X_AT] = at
        at += own[PICTURE] * own[BELOW]
        for tap in range(TAPS):
            (down, y), (right, column) = divmod(tap // 3 - 1, stride), divmod(tap % 3 - 1, stride)
            own[TAP + tap] = (y * stride + column) * phase + start + down * row + right
    return layers


def _pack_gate(own: np.ndarray, gate: int, policy: Policy, decision: Any, buffer: Any) -> None:
    """The entries of a layer for its gate; its weights, bias and level are added."""
    linear = policy.gates[gate]
    absent = policy.bits // len(policy.gates) - linear.out_features  # as in Policy.logits
    own[GATE_AT] = buffer.add(np.pad(linear.weight.detach().numpy().T, ((0, 0), (0, absent))))
    own[GATE_BIAS] = buffer.add(np.pad(linear.bias.detach().numpy(), (0, absent), constant_values=-ALWAYS))
    own[LEVEL] = buffer.add(np.array([decision.levels[gate] if isinstance(decision, Threshold) else 0.0], np.float32))
    own[COUNT] = min(decision.counts[gate], linear.out_features) if isinstance(decision, Budget) else 0


run = kept(_run, "filters")
