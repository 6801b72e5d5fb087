"""The evaluation of a packed lazy network: one call, no allocation, only what the mask asks for."""

import math
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numpy as np

from condcomp_lib import policies
from condcomp_lib.kernels import pack
from condcomp_lib.kernels.products import compiled, dot, spread
from condcomp_lib.kernels.tiles import LANES
from condcomp_lib.policies import ALWAYS

ROWS = 128  # examples at a time: what they need stays in the L2 and L3 caches
SOME = 4096  # weights of a group above that are read together, 16 KiB: half of the L1 cache
DENSE = 0.45  # the share of neurons below that are not zero from which on rows are not worth a list


@compiled
def _highest(logits, count, scratch):  # type: ignore[no-untyped-def]
    """The value that exactly `count` of the logits reach or exceed where none are equal (Hoare's selection)."""
    scratch[:] = logits
    low, high, wanted = 0, len(logits) - 1, count - 1
    while low < high:
        pivot, i, j = scratch[(low + high) // 2], low, high
        while i <= j:
            while scratch[i] > pivot:
                i += 1
            while scratch[j] < pivot:
                j -= 1
            if i <= j:
                scratch[i], scratch[j] = scratch[j], scratch[i]
                i, j = i + 1, j - 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return scratch[wanted]


@compiled
def _decide(logits, bits, level, count, budgeted, always_on, scratch):  # type: ignore[no-untyped-def]
    """Set the bits (uint8, groups) of one gate and example from its logits; as `policies.Threshold` and `Budget`."""
    if not budgeted:
        for group in range(len(logits)):
            bits[group] = logits[group] > level
    else:
        least, left = _highest(logits, count, scratch), count
        for group in range(len(logits)):
            bits[group] = logits[group] > least
            left -= bits[group]
        for group in range(len(logits)):  # equal ones: the first
            if left and logits[group] == least:
                bits[group], left = 1, left - 1
    if always_on:
        bits[0] = 1


@compiled
def _pooled(x, to, channels, height, width, size):  # type: ignore[no-untyped-def]
    """One flat picture averaged over squares of `size` pixels a side."""
    across, share = width // size, 1.0 / (size * size)
    for place in range(channels * (height // size) * across):
        channel, row, column = place // (height // size * across), place // across % (height // size), place % across
        total = np.float32(0)
        for i in range(size):
            start = (channel * height + row * size + i) * width + column * size
            for j in range(size):
                total += x[start + j]
        to[place] = total * share


@compiled
def _evaluate(x, first_row, n, weights, floats, meta, out, space, lists, bits, known, shared):  # type: ignore[no-untyped-def]
    """Scores of `n` examples from `first_row` on; see `run`."""
    groups, gates, layers, classes = meta[pack.GROUPS], meta[pack.GATES], meta[pack.LAYERS], meta[pack.CLASSES]
    gate_from = pack.HEAD + layers * pack.LAYER_FIELDS
    layer_meta = meta[pack.HEAD : gate_from].reshape((layers, pack.LAYER_FIELDS))
    gate_meta = meta[gate_from : gate_from + gates * pack.FIELDS].reshape((gates, pack.FIELDS))
    spans = meta[gate_from + gates * pack.FIELDS :].reshape((layers, groups, pack.FIELDS))
    widest, all_bits, inputs = meta[pack.WIDEST], groups * gates, meta[pack.INPUTS]
    # The parts of the working space, each for `n` examples.
    entries = widest + groups + 3 * LANES  # of one example's list of evaluated neurons
    listed, counts, starts, indexes = lists[:n], lists[n : 2 * n], lists[2 * n :], lists[2 * n + n * (groups + 1) :]
    half = n * entries
    logits, at = space[: n * all_bits], n * all_bits
    scratch, at = space[at : at + groups], at + groups
    h, at = space[at : at + n * widest], at + n * widest
    values, at = space[at : at + 2 * half], at + 2 * half
    dense, at = space[at : at + half], at + half
    x_row, wide = inputs, x[first_row * inputs :]
    if n > 3 or inputs % LANES:
        x_row = meta[pack.X_ROW]
        wide, at = space[at : at + n * x_row], at + n * x_row
        _padded(x, first_row, n, inputs, wide, x_row)
    read, read_row = wide, x_row
    if meta[pack.POOL]:
        read, read_row = space[at : at + n * meta[pack.GATE_ROW]], meta[pack.GATE_ROW]
        for i in range(n):
            row = read[i * read_row : (i + 1) * read_row]
            row[meta[pack.GATE_INPUTS] :] = 0
            _pooled(x[(first_row + i) * inputs :], row, meta[pack.CHANNELS], meta[pack.HEIGHT], meta[pack.WIDTH],
                    meta[pack.POOL])  # fmt: skip
    index, value, next_index, next_value = indexes[:half], values[:half], indexes[half:], values[half:]
    asked = known or gate_meta[0, pack.COUNT] >= 0
    for layer in range(layers):
        gate = min(layer, gates - 1)
        if layer < gates and gate_meta[gate, pack.COUNT] < 0 and not known:  # everything is evaluated: do not ask
            for i in range(n):
                start = (first_row + i) * all_bits + gate * groups
                bits[start : start + groups] = 1
        elif layer < gates:
            _logits(gate, n, read, read_row, listed, index, value, counts, entries, floats, meta, gate_meta, logits)
            if shared:
                _averaged(logits, n, all_bits, gate * groups, groups)
            if not known:
                for i in range(n):
                    own = i * all_bits + gate * groups
                    row = (first_row + i) * all_bits + gate * groups
                    level = floats[gate_meta[gate, pack.LEVEL]]
                    _decide(logits[own : own + groups], bits[row : row + groups], level, gate_meta[gate, pack.COUNT],
                            meta[pack.BUDGETED], meta[pack.ALWAYS_ON], scratch)  # fmt: skip
        h_row, masks = layer_meta[layer, pack.H_ROW], bits[first_row * all_bits + gate * groups :]
        below = layer_meta[layer, pack.BELOW]
        wide_row = (below + LANES - 1) // LANES * LANES
        if layer and n > 1 and counts.sum() > DENSE * n * below:
            dense_row = layer_meta[layer, pack.W_ROW]
            _unlisted(n, index, value, counts, entries, dense, dense_row)
            _panels(dense, dense_row, n, weights, dense_row, layer_meta[layer, pack.ROWS_AT], wide_row, spans[layer],
                    masks, all_bits, listed, h, h_row)  # fmt: skip
        elif layer:
            _lists(n, index, value, starts, entries, weights, spans[layer], spans[layer - 1], masks, all_bits, listed,
                   h, h_row)  # fmt: skip
        else:
            _panels(wide, x_row, n, weights, layer_meta[0, pack.W_ROW], layer_meta[0, pack.ROWS_AT], wide_row, spans[0],
                    masks, all_bits, listed, h, h_row)  # fmt: skip
        for i in range(n):
            own, at = masks[i * all_bits : i * all_bits + groups], i * entries
            counts[i] = _collect(h[i * h_row :], own, spans[layer], floats, layer_meta[layer], meta, next_index[at:],
                                 next_value[at:], starts[i * (groups + 1) :])  # fmt: skip
        index, next_index, value, next_value = next_index, index, next_value, value
    w_row = (classes + LANES - 1) // LANES * LANES
    for i in range(n):
        h[:w_row] = 0
        spread(index, value, i * entries, counts[i], weights, w_row, meta[pack.OUT_WEIGHTS], h, 0)
        for j in range(classes):
            scale = floats[meta[pack.OUT_SCALE] + j] if meta[pack.SCALED] else np.float32(1)
            out[(first_row + i) * classes + j] = h[j] * scale + floats[meta[pack.OUT_BIAS] + j]
        # An input that is not a number decides for nothing, which must not look like a result.
        if asked and np.isnan(logits[i * all_bits + groups - 1]):
            out[(first_row + i) * classes : (first_row + i + 1) * classes] = np.nan


@compiled
def _panels(x, x_row, n, weights, w_row, rows_at, size, spans, masks, all_bits, listed, h, h_row):  # type: ignore[no-untyped-def]
    """Sums of a layer's groups, each for the examples whose mask asks for it, over everything below."""
    groups, group = len(spans), 0
    while group < groups:
        h_at, w_at, columns = spans[group, pack.H_AT], spans[group, pack.FIRST] * w_row, spans[group, pack.SIZE]
        count = _wanted(masks[group:], all_bits, n, listed)
        group += 1
        # Neighbours that all examples ask for are one panel, where their numbers lie side by side.
        while (count == n and group < groups and spans[group, pack.H_AT] == h_at + columns
               and _wanted(masks[group:], all_bits, n, listed) == n):  # fmt: skip
            columns += spans[group, pack.SIZE]
            group += 1
        if count == n:
            for i in range(n):
                listed[i] = i
        for t in range(count):
            start = listed[t] * h_row + h_at
            h[start : start + columns] = 0
        dot(x, x_row, listed, 0, count, weights, w_row, rows_at + w_at, columns, size, h, h_row, h_at)


@compiled
def _lists(n, index, value, starts, entries, weights, spans, below, masks, all_bits, listed, h, h_row):  # type: ignore[no-untyped-def]
    """The same over what is listed as evaluated and not zero below; `below` the spans of the layer below."""
    groups = len(spans)
    for group in range(groups):
        h_at, w_at = spans[group, pack.H_AT], spans[group, pack.W_AT]
        w_row = (spans[group, pack.SIZE] + LANES - 1) // LANES * LANES
        count = _wanted(masks[group:], all_bits, n, listed)
        for t in range(count):
            h[listed[t] * h_row + h_at : listed[t] * h_row + h_at + w_row] = 0
        # Several examples go through the groups below together, so many at a time that the rows stay in the L1 cache.
        # Narrower groups are read whole: their tiles take several entries of the list at once.
        first, some = 0, SOME // w_row if count > 3 and 6 * LANES < w_row <= 8 * LANES else pack.MOST
        while first < groups:
            last, rows = first + 1, below[first, pack.SIZE]
            while last < groups and rows + below[last, pack.SIZE] <= some:
                rows, last = rows + below[last, pack.SIZE], last + 1
            for t in range(count):
                i = listed[t]
                begin, end = starts[i * (groups + 1) + first], starts[i * (groups + 1) + last]
                spread(index, value, i * entries + begin, end - begin, weights, w_row, w_at, h, i * h_row + h_at)
            first = last


@compiled
def _unlisted(n, index, value, counts, entries, dense, row):  # type: ignore[no-untyped-def]
    """The lists written out, zeros and all, in rows of `row` numbers."""
    dense[: n * row] = 0
    for i in range(n):
        for t in range(i * entries, i * entries + counts[i]):
            dense[i * row + index[t]] = value[t]


@compiled
def _wanted(mask, row, n, listed):  # type: ignore[no-untyped-def]
    """List the examples whose bit, the first of each row of the mask, is set; their number is returned."""
    count = 0
    for i in range(n):
        listed[count] = i
        count += mask[i * row]
    return count


@compiled
def _padded(x, first_row, n, width, to, row):  # type: ignore[no-untyped-def]
    """The examples from `first_row` on in rows of `row` numbers, zeros behind them."""
    for i in range(n):
        own, given = to[i * row : (i + 1) * row], x[(first_row + i) * width : (first_row + i + 1) * width]
        for j in range(width):
            own[j] = given[j]
        for j in range(width, row):
            own[j] = 0


@compiled
def _logits(gate, n, read, read_row, listed, index, value, counts, entries, floats, meta, gate_meta, logits):  # type: ignore[no-untyped-def]
    """Logits of one gate for all examples: of the (pooled) input by the first, of the layer below by the others."""
    groups = meta[pack.GROUPS]
    all_bits, w_at, b_at = groups * meta[pack.GATES], gate_meta[gate, 0], gate_meta[gate, 1]
    for i in range(n):
        own = i * all_bits + gate * groups
        logits[own : own + groups] = floats[b_at : b_at + groups]
    if gate == 0:
        for i in range(n):
            listed[i] = i
        size = (meta[pack.GATE_INPUTS] + LANES - 1) // LANES * LANES
        dot(read, read_row, listed, 0, n, floats, meta[pack.GATE_ROW], w_at, groups, size, logits, all_bits, 0)
    else:
        for i in range(n):
            own = i * all_bits + gate * groups
            spread(
                index, value, i * entries, counts[i], floats, (groups + LANES - 1) // LANES * LANES, w_at, logits, own
            )
    if meta[pack.ALWAYS_ON]:
        for i in range(n):
            own = i * all_bits + gate * groups
            for group in range(groups):
                logits[own + group] = min(logits[own + group], np.float32(ALWAYS - 1)) if group else np.float32(ALWAYS)


@compiled
def _averaged(logits, n, row, at, groups):  # type: ignore[no-untyped-def]
    """Every example's logits of one gate replaced by their mean over the examples (`policies.Shared`)."""
    for group in range(groups):
        total = 0.0
        for i in range(n):
            total += logits[i * row + at + group]
        for i in range(n):
            logits[i * row + at + group] = total / n


@compiled
def _activated(h, bias, scale, tanh, scaled):  # type: ignore[no-untyped-def]
    """One group's sums made activations in place."""
    if scaled:
        for j in range(len(h)):
            h[j] *= scale[j]
    if tanh:
        for j in range(len(h)):
            h[j] = math.tanh(h[j] + bias[j])
    else:
        for j in range(len(h)):
            h[j] = max(h[j] + bias[j], np.float32(0))


@compiled
def _collect(h, bits, spans, floats, layer_meta, meta, index, value, starts):  # type: ignore[no-untyped-def]
    """List one example's evaluated neurons that are not zero, group by group from `starts` on; their number is
    returned, and zeros pad to whole vectors."""
    count, evaluated, groups = 0, 0, len(bits)
    bias, scale, neurons = layer_meta[pack.BIAS], layer_meta[pack.SCALE], layer_meta[pack.NEURONS]
    tanh, scaled, filled = meta[pack.TANH], meta[pack.SCALED], meta[pack.FILLED]
    factor = np.float32(1)
    if meta[pack.RESCALED]:
        for group in range(groups):
            evaluated += spans[group, pack.SIZE] * bits[group]
        factor = np.float32(neurons / max(evaluated, 1))
    for group in range(groups):
        starts[group] = count
        if bits[group]:
            first, size, start = spans[group, pack.FIRST], spans[group, pack.SIZE], spans[group, pack.H_AT]
            own, at = h[start : start + size], bias + start
            _activated(own, floats[at : at + size], floats[scale + start : scale + start + size], tanh, scaled)
            for j in range(size):
                index[count], value[count] = first + j, own[j] * factor
                count += own[j] != 0
    if filled:
        for group in range(groups):
            index[count], value[count] = neurons + group, 1
            count += bits[group]
    starts[groups] = count
    for j in range(count, (count + LANES - 1) // LANES * LANES):
        index[j], value[j] = 0, 0
    return count


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
    meta = packed.meta
    entries = int(meta[pack.WIDEST] + meta[pack.GROUPS]) + 3 * LANES
    row = int(meta[pack.WIDEST]) + 3 * entries + packed.bits + int(meta[pack.X_ROW] + meta[pack.GATE_ROW])
    return n * row + int(meta[pack.GROUPS]) + LANES, n * (2 + 2 * entries + int(meta[pack.GROUPS]) + 1)


def _cached() -> Callable[..., Any]:
    """`_run` compiled at its first call, or read from numba's cache where that can be written."""
    # numba looks only at this file to tell whether what it keeps is out of date; the name tells it of the others.
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(policies.__file__)]
    _run.__qualname__ = f"run_{sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()[:12]}"
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(_run)
    except RuntimeError as error:
        warnings.warn(f"numba's cache cannot be written ({error}): kernels are compiled anew in every process; set "
                      "NUMBA_CACHE_DIR to a folder that can be", stacklevel=2)  # fmt: skip
        return compiled(_run)


run = _cached()
