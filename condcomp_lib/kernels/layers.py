"""A layer of a packed lazy network: sums of evaluated groups over what was evaluated below, and their activations."""

import math
from typing import Any, NamedTuple

import numpy as np

from condcomp_lib.kernels import pack
from condcomp_lib.kernels.products import compiled, inlined, panels, spread
from condcomp_lib.kernels.tiles import LANES, STEPS, row_tile

NARROW = 64  # examples up to which a group's weights are read to the end before the next one's
DEPTH = 128  # neurons below at a time (half for a narrow minibatch): so many rows of weights stay in the L1 cache
ALONE = 4096  # the same for one example, which reads its weights once
SOME = 4096  # weights of a group above that lists read together, 16 KiB: half of the L1 cache
ALL = -1  # in place of where bits stand: everything is wanted


_scaled, _rectified, _cleared = row_tile("scaled"), row_tile("rectified"), row_tile("cleared")
_ONE = np.float32(1)


class Room(NamedTuple):
    """What one call works in: sums `h` and `logits`, activations `x` (or lists `index` and `value` of those that are
    not zero: example i's from i x `entries` on, each group's from `starts[i]` on); for each group the `owners` that
    want it, `counts` of them, and the `rows` of those that want one below, too, `wanted` of them; `part` of long rows
    of activations; `every` 0, 1, 2, ...; `scratch`."""

    h: Any
    logits: Any
    x: Any
    value: Any
    part: Any
    scratch: Any
    index: Any
    counts: Any
    owners: Any
    starts: Any
    rows: Any
    wanted: Any
    every: Any
    entries: Any


@compiled
def product(n, listed, x, sources, below, weights, spans, own, bits, row, room, h, h_row):  # type: ignore[no-untyped-def]
    """h = sums of the groups `spans` of a layer over the groups `sources` below, whose activations are `x`, or are
    listed; each only for the examples whose bits, in rows of `row` from `own` and `below` on (or ALL), want both."""
    for group in range(len(spans)):
        size, at = spans[group, pack.SIZE], spans[group, pack.H_AT]
        for i in range(n):
            if size and (own == ALL or bits[own + i * row + group]):
                _cleared(h, i * h_row + at, h, 0, h, 0, _ONE, size)
    if listed:
        _lists(n, sources, weights, spans, own, bits, row, room, h, h_row)
        return
    for group in range(len(spans)):
        room.counts[group] = _wanted(n, ALL if own == ALL else own + group, bits, row, room.owners, group * n)
    for source in range(len(sources)):
        if sources[source, pack.SIZE]:
            # The bits that stand for groups where skipped neurons are filled in are of every example.
            asked = ALL if below == ALL or source == len(sources) - 1 else below + source
            for group in range(len(spans)):
                room.wanted[group] = _both(room.owners, room.counts[group], asked, bits, row, room.rows, group * n)
            _blocks(n, x, sources[source], weights, spans, room, h, h_row)


@inlined
def _wanted(n, asked, bits, row, to, at):  # type: ignore[no-untyped-def]
    """List the examples that want a group, whose bits stand from `asked` on, from `at` on; return their number."""
    count = 0
    for i in range(n):
        to[at + count] = i
        count += asked == ALL or bits[asked + i * row] != 0
    return count


@inlined
def _both(owners, count, asked, bits, row, to, at):  # type: ignore[no-untyped-def]
    """List those of the `count` examples listed from `at` on that want a group below, too; return their number."""
    found = 0
    for t in range(at, at + count):
        to[at + found] = owners[t]
        found += asked == ALL or bits[asked + owners[t] * row] != 0
    return found


@compiled
def _blocks(n, x, source, weights, spans, room, h, h_row):  # type: ignore[no-untyped-def]
    """Add one group below to the sums of the groups above it, for the examples that want both."""
    wanted, rows, every, part = room.wanted, room.rows, room.every, room.part
    size = (source[pack.SIZE] + STEPS - 1) // STEPS * STEPS  # zeros behind the last
    block, first = DEPTH if n > NARROW else size, _following(wanted, spans, 0)
    depth = ALONE if n == 1 else DEPTH if n > NARROW else DEPTH // 2
    for start in range(0, size, block):
        group, end = first, min(start + block, size)
        read, read_row, read_from = x, source[pack.X_ROW], source[pack.X_AT] * n + start
        if size > block and len(spans) > 1:  # many groups read the same part of long rows: let it be together
            for i in range(n):
                _scaled(part, i * block, x, read_from + i * read_row, x, 0, _ONE, end - start)
            read, read_row, read_from = part, block, 0
        while group < len(spans):
            following = _following(wanted, spans, group + 1)
            w_row, w_from = spans[group, pack.W_ROW], spans[group, pack.W_AT]
            for k in range(start, end, depth):
                soon, deep = (group, k + depth) if k + depth < end else (following, start)
                if soon == len(spans):
                    soon, deep = first, end % size
                far = spans[soon, pack.W_ROW]
                ahead = spans[soon, pack.W_AT] + (source[pack.FIRST] + deep) * far
                w_at, columns = w_from + (source[pack.FIRST] + k) * w_row, spans[group, pack.SIZE]
                panels(read, read_row, read_from + k - start, rows, group * n, wanted[group], every, weights, w_row,
                       w_at, columns, min(depth, end - k), h, h_row, spans[group, pack.H_AT], ahead,
                       ahead + depth * far)  # fmt: skip
            group = following


@inlined
def _following(wanted, spans, group):  # type: ignore[no-untyped-def]
    """The first group from `group` on that is not empty and that some example wants; their number where none is."""
    while group < len(spans) and not (wanted[group] and spans[group, pack.SIZE]):
        group += 1
    return group


@compiled
def _lists(n, sources, weights, spans, own, bits, row, room, h, h_row):  # type: ignore[no-untyped-def]
    """The same over what is listed as evaluated and not zero below."""
    below, groups = len(sources), len(spans)
    for group in range(groups):
        h_at, w_at, w_row = spans[group, pack.H_AT], spans[group, pack.W_AT], spans[group, pack.W_ROW]
        columns = spans[group, pack.SIZE]
        count = _wanted(n, ALL if own == ALL else own + group, bits, row, room.rows, 0)
        # Several examples go through the groups below together, so many at a time that the rows stay in the L1 cache.
        # Narrower groups are read whole: their tiles take several entries of the list at once.
        first, some = 0, SOME // w_row if count > 3 and 6 * LANES < columns <= 8 * LANES else pack.MOST
        while first < below:
            last, neurons = first + 1, sources[first, pack.SIZE]
            while last < below and neurons + sources[last, pack.SIZE] <= some:
                neurons, last = neurons + sources[last, pack.SIZE], last + 1
            for t in range(count):
                i = room.rows[t]
                begin, end = room.starts[i * (below + 1) + first], room.starts[i * (below + 1) + last]
                at = i * room.entries + begin
                spread(room.index, at, room.value, at, end - begin, weights, w_row, w_at, columns, h, i * h_row + h_at)
            first = last


@compiled
def activate(n, listed, spans, own, bits, row, floats, layer_meta, meta, room, h_row):  # type: ignore[no-untyped-def]
    """Make the sums of a layer's evaluated groups activations: lists of those that are not zero, or rows of all."""
    groups, bias = len(spans) - 1, layer_meta[pack.BIAS]
    for i in range(n):
        mask, factor, start = own + i * row, _ONE, i * h_row
        if meta[pack.RESCALED]:
            factor = _factor(bits, mask, spans, layer_meta[pack.NEURONS])
        for group in range(groups):
            size, at = spans[group, pack.SIZE], spans[group, pack.H_AT]
            if bits[mask + group] and size:
                to, to_from = room.h, start + at
                if not listed:
                    to, to_from = room.x, spans[group, pack.X_AT] * n + i * spans[group, pack.X_ROW]
                if meta[pack.SCALED]:
                    for j in range(at, at + size):
                        room.h[start + j] *= floats[layer_meta[pack.SCALE] + j]
                if meta[pack.TANH]:
                    for j in range(at, at + size):
                        room.h[start + j] = math.tanh(room.h[start + j] + floats[bias + j])
                    _scaled(to, to_from, room.h, start + at, floats, 0, factor, size)
                else:
                    _rectified(to, to_from, room.h, start + at, floats, bias + at, factor, size)
        if listed:
            _list(start, i * room.entries, i * (groups + 2), bits, mask, spans, room)
        else:
            at = spans[groups, pack.X_AT] * n + i * spans[groups, pack.X_ROW]
            for group in range(spans[groups, pack.SIZE]):
                room.x[at + group] = bits[mask + group]
            for group in range(spans[groups, pack.SIZE], spans[groups, pack.X_ROW]):
                room.x[at + group] = 0


@inlined
def _factor(bits, mask, spans, neurons):  # type: ignore[no-untyped-def]
    """What activations of one example are multiplied with where they are rescaled: neurons by evaluated ones."""
    evaluated = 0
    for group in range(len(spans) - 1):
        evaluated += spans[group, pack.SIZE] * bits[mask + group]
    return np.float32(neurons / max(evaluated, 1))


@inlined
def _list(h_from, at, starts, bits, mask, spans, room):  # type: ignore[no-untyped-def]
    """List one example's evaluated neurons that are not zero, group by group, and the bits that stand for groups; zeros
    pad to whole vectors."""
    index, value, count, groups = room.index, room.value, 0, len(spans) - 1
    for group in range(groups):
        room.starts[starts + group] = count
        if bits[mask + group]:
            first, start = spans[group, pack.FIRST], h_from + spans[group, pack.H_AT]
            for j in range(spans[group, pack.SIZE]):
                index[at + count], value[at + count] = first + j, room.h[start + j]
                count += room.h[start + j] != 0
    room.starts[starts + groups] = count
    for group in range(spans[groups, pack.SIZE]):
        index[at + count], value[at + count] = spans[groups, pack.FIRST] + group, 1
        count += bits[mask + group]
    room.starts[starts + groups + 1] = count
    for j in range(at + count, at + (count + LANES - 1) // LANES * LANES):
        index[j], value[j] = 0, 0
