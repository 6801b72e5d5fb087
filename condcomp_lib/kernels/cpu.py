"""The evaluation of a packed lazy network: one call, no allocation, only what the mask asks for."""

import numpy as np

from condcomp_lib.kernels import pack
from condcomp_lib.kernels.layers import ALL, DOTS, Room, activate, cheapest, dense_product, product
from condcomp_lib.kernels.products import compiled, decide, inlined, kept
from condcomp_lib.kernels.tiles import AHEAD, LANES
from condcomp_lib.policies import ALWAYS

ROWS = 128  # examples at a time: what they need stays in the L2 and L3 caches


@compiled
def _evaluate(x, first_row, n, weights, floats, meta, out, space, lists, bits, known, shared):  # type: ignore[no-untyped-def]
    """Scores of `n` examples from `first_row` on; see `_run`."""
    groups, gates, layers = meta[pack.GROUPS], meta[pack.GATES], meta[pack.LAYERS]
    gates_from = pack.HEAD + layers * pack.LAYER_FIELDS
    spans_from = gates_from + gates * pack.GATE_FIELDS
    layer_meta = meta[pack.HEAD : gates_from].reshape((layers, pack.LAYER_FIELDS))
    gate_meta = meta[gates_from:spans_from].reshape((gates, pack.GATE_FIELDS))
    spans, row = meta[spans_from:].reshape((-1, pack.FIELDS)), groups * gates
    room, wide, read, invalid = _room(n, meta, spans, space, lists)
    invalid[:] = 0
    given = _padded(x, first_row, n, meta[pack.INPUTS], spans[0, pack.X_ROW], wide)
    pooled = _pooled(x, first_row, n, meta, spans[1, pack.X_ROW], read) if meta[pack.POOL] else given
    hidden, sources, way, whole_row, below = spans[2 + gates : -1], spans[:1], DOTS, 0, ALL
    for layer in range(layers):
        gate = min(layer, gates - 1)
        own, level = first_row * row + gate * groups, floats[gate_meta[gate, pack.LEVEL]]
        if layer < gates and gate_meta[gate, pack.COUNT] < 0 and not known:  # everything is evaluated: do not ask
            for i in range(n):
                for group in range(groups):
                    bits[own + i * row + group] = not meta[pack.BUDGETED] or group < gate_meta[gate, pack.OWN]
        elif layer < gates:
            own_gate = spans[2 + gate : 3 + gate]
            if layer == 0:
                length = spans[1, pack.X_ROW]
                dense_product(n, pooled, length, length, floats, own_gate, ALL, bits, row, room, room.logits,
                              meta[pack.LOGITS_ROW])  # fmt: skip
            else:
                product(n, way, whole_row, sources, below, floats, own_gate, ALL, bits, row, room, room.logits,
                        meta[pack.LOGITS_ROW])  # fmt: skip
            _finish_logits(n, floats, gate_meta[gate], meta, shared, room.logits)
            for i in range(n):
                logits = room.logits[i * meta[pack.LOGITS_ROW] : i * meta[pack.LOGITS_ROW] + groups]
                if not known:
                    decide(logits, bits[own + i * row : own + i * row + groups], level, gate_meta[gate, pack.COUNT],
                            meta[pack.BUDGETED], meta[pack.ALWAYS_ON], room.scratch)  # fmt: skip
                if layer == 0:
                    invalid[i] = np.isnan(logits[groups - 1])
        h_row, own_spans = layer_meta[layer, pack.H_ROW], hidden[layer * (groups + 1) : (layer + 1) * (groups + 1)]
        if layer == 0:
            length = spans[0, pack.X_ROW]
            dense_product(n, given, length, length, weights, own_spans[:groups], own, bits, row, room, room.h, h_row)
            for i in range(n):
                invalid[i] = invalid[i] or _nothing(own_spans[:groups], bits, own + i * row, room.h, i * h_row)
        else:
            product(n, way, whole_row, sources, below, weights, own_spans[:groups], own, bits, row, room, room.h, h_row)
        way = cheapest(n, own_spans, own, bits, row, layer_meta[layer, pack.NEURONS])
        activate(n, way, own_spans, own, bits, row, floats, layer_meta[layer], meta, room, h_row)
        sources, below, whole_row = own_spans, own, layer_meta[layer, pack.WHOLE_ROW]
    product(n, way, whole_row, sources, below, weights, spans[-1:], ALL, bits, row, room, room.h, meta[pack.WIDEST])
    _finish_scores(first_row, n, floats, meta, invalid, room.h, out)


@inlined
def _room(n, meta, spans, space, lists):  # type: ignore[no-untyped-def]
    """The working space divided for `n` examples: the room, and for the input, for what the policy reads, and for
    flags of examples; `room` says how much it takes."""
    groups, entries, at = meta[pack.GROUPS], meta[pack.WIDEST] + meta[pack.GROUPS] + 3 * LANES, 0
    h, at = space[: n * meta[pack.WIDEST]], n * meta[pack.WIDEST]
    x, at = space[at : at + n * meta[pack.LONGEST]], at + n * meta[pack.LONGEST]
    logits, at = space[at : at + n * meta[pack.LOGITS_ROW]], at + n * meta[pack.LOGITS_ROW]
    value, at = space[at : at + n * entries], at + n * entries
    wide, at = space[at : at + n * spans[0, pack.X_ROW]], at + n * spans[0, pack.X_ROW]
    read, at = space[at : at + n * spans[1, pack.X_ROW]], at + n * spans[1, pack.X_ROW]
    scratch = space[at : at + groups]
    index, at = lists[: n * entries], n * entries
    counts, at = lists[at : at + groups], at + groups
    owners, at = lists[at : at + n * groups], at + n * groups
    lengths, at = lists[at : at + n], at + n
    rows, at = lists[at : at + n], at + n
    invalid = lists[at : at + n]
    return Room(h, logits, x, value, scratch, index, counts, owners, lengths, rows, entries), wide, read, invalid


@inlined
def _padded(x, first_row, n, width, row, to):  # type: ignore[no-untyped-def]
    """The examples from `first_row` on in rows of `row` numbers, zeros behind them; one that needs none as it is."""
    if width == row:
        return x[first_row * width :]
    for i in range(n):
        for j in range(width):
            to[i * row + j] = x[(first_row + i) * width + j]
        for j in range(width, row):
            to[i * row + j] = 0
    return to


@inlined
def _pooled(x, first_row, n, meta, row, to):  # type: ignore[no-untyped-def]
    """The pictures from `first_row` on averaged over squares, in rows of `row` numbers."""
    channels, height, width, size = meta[pack.CHANNELS], meta[pack.HEIGHT], meta[pack.WIDTH], meta[pack.POOL]
    down, across, share = height // size, width // size, np.float32(1.0 / (size * size))
    for i in range(n):
        own, given = to[i * row : (i + 1) * row], x[(first_row + i) * meta[pack.INPUTS] :]
        own[channels * down * across :] = 0
        for place in range(channels * down * across):
            channel, at, column = place // (down * across), place // across % down, place % across
            total = np.float32(0)
            for k in range(size):
                start = (channel * height + at * size + k) * width + column * size
                for j in range(size):
                    total += given[start + j]
            own[place] = total * share
    return to


@inlined
def _nothing(spans, bits, own, h, start):  # type: ignore[no-untyped-def]
    """Whether a sum of the first layer is no number, which then all of them are; false where nothing is evaluated."""
    for group in range(len(spans)):
        if bits[own + group] and spans[group, pack.SIZE]:
            return np.isnan(h[start + spans[group, pack.H_AT]])
    return False


@compiled
def _finish_logits(n, floats, gate, meta, shared, logits):  # type: ignore[no-untyped-def]
    """Sums made logits in place: biases, limits, the group that is always on, and their mean where a mask is shared
    (`policies.Shared`)."""
    groups, row, bias = meta[pack.GROUPS], meta[pack.LOGITS_ROW], floats[gate[pack.GATE_BIAS] :]
    low, high = floats[meta[pack.LOW]], floats[meta[pack.HIGH]]
    for i in range(n):
        own = logits[i * row : i * row + groups]
        for group in range(groups):
            own[group] += bias[group]
            if group < gate[pack.OWN] and own[group] < low:
                own[group] = low
            elif group < gate[pack.OWN] and own[group] > high:
                own[group] = high
            if meta[pack.ALWAYS_ON]:
                own[group] = min(own[group], np.float32(ALWAYS - 1)) if group else np.float32(ALWAYS)
    if shared:
        for group in range(groups):
            total = 0.0
            for i in range(n):
                total += logits[i * row + group]
            for i in range(n):
                logits[i * row + group] = total / n


@compiled
def _finish_scores(first_row, n, floats, meta, invalid, h, out):  # type: ignore[no-untyped-def]
    """Sums made scores."""
    classes = meta[pack.CLASSES]
    for i in range(n):
        for j in range(classes):
            scale = floats[meta[pack.OUT_SCALE] + j] if meta[pack.SCALED] else np.float32(1)
            score = h[i * meta[pack.WIDEST] + j] * scale + floats[meta[pack.OUT_BIAS] + j]
            # An input that is not a number decides for nothing, which must not look like a result.
            out[(first_row + i) * classes + j] = np.nan if invalid[i] else score


def _run(x, weights, floats, meta, out, space, lists, bits, known, step, shared):  # type: ignore[no-untyped-def]
    """Scores of the examples, `step` at a time.

    Arguments: `x` (float32, examples x inputs); `weights`, `floats`, `meta` as in `pack.Packed`; `out` (float32,
    examples x classes) is written; `space` (float32) and `lists` (int64) to work in, see `room`; `bits` (uint8,
    examples x bits) is written, or read where it is `known`; `shared`: one mask for `step` examples, decided from mean
    logits.
    """
    flat, scores, masks = x.reshape(-1), out.reshape(-1), bits.reshape(-1)
    for row in range(0, len(x), step):
        n = min(step, len(x) - row)
        _evaluate(flat, row, n, weights, floats, meta, scores, space, lists, masks, known, shared)


def room(packed: pack.Packed, n: int) -> tuple[int, int]:
    """The float32 and int64 numbers that `run` needs to work on `n` examples at a time."""
    meta, groups = packed.meta, int(packed.meta[pack.GROUPS])
    entries = int(meta[pack.WIDEST]) + groups + 3 * LANES
    row = int(meta[[pack.WIDEST, pack.LONGEST, pack.LOGITS_ROW, pack.READ_ROWS]].sum()) + entries
    return n * row + groups, n * (entries + groups + 3) + groups + AHEAD


run = kept(_run, "run")
