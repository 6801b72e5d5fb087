"""A layer of a packed lazy network: sums of evaluated groups over what was evaluated below, and their activations."""

import math
from typing import Any, NamedTuple

import numpy as np

from condcomp_lib.kernels import pack
from condcomp_lib.kernels.products import DEEP, compiled, dots, inlined, panels, spread
from condcomp_lib.kernels.tiles import LANES, QUAD, STEPS, row_tile

DEPTH = 128  # neurons below at a time: so many rows of weights stay in the L1 cache
ALL = -1  # in place of where bits stand: everything is wanted
LISTS, PAIRS, DOTS = range(3)  # ways to add up what lies below, see `cheapest`


_scaled, _rectified, _cleared = row_tile("scaled"), row_tile("rectified"), row_tile("cleared")
_ONE = np.float32(1)


class Room(NamedTuple):
    """What one call works in: sums `h` and `logits`; activations `x`, or lists `index` and `value` of those that are
    not zero (example i's from i x `entries` on, `lengths[i]` of them); for each group the `owners` that
    want it, `counts` of them, and the `rows` of those that want one below, too; `scratch`."""

    h: Any
    logits: Any
    x: Any
    value: Any
    scratch: Any
    index: Any
    counts: Any
    owners: Any
    lengths: Any
    rows: Any
    entries: Any


@compiled
def cheapest(n, spans, own, bits, row, neurons):  # type: ignore[no-untyped-def]
    """How the layer above should add up the activations of one with the groups `spans`, by nanoseconds that were
    measured on one machine, if it evaluates as much:

    LISTS  example by example, the weights of what is listed as not zero (taken to be half of what is evaluated);
    PAIRS  group below by group above, for the examples that want both;
    DOTS   group above by group above over all below, where skipped neurons are zeros: dense where little is skipped.
    """
    evaluated = 0
    for i in range(n):
        for group in range(len(spans) - 1):
            evaluated += bits[own + i * row + group] != 0
    groups, share = len(spans) - 1, evaluated / max(n * (len(spans) - 1), 1)
    products = n * share * neurons * neurons
    either, both = 1 - (1 - share) ** n, 1 - (1 - share * share) ** n  # of groups, and of pairs, some example wants
    lists = 1.6 * n * share * share * groups * neurons
    pairs = 70 * both * groups * groups + max(0.014 * share * products, 0.05 * both * neurons * neurons)
    dots = max(0.011 * products, 0.054 * either * neurons * neurons) + 20 * n * share * groups
    return LISTS if lists <= min(pairs, dots) else PAIRS if pairs <= dots else DOTS


@compiled
def dense_product(n, x, x_row, length, weights, spans, own, bits, row, room, h, h_row):  # type: ignore[no-untyped-def]
    """h = sums of the groups `spans` over all that lies below, rows of `length` numbers, whole vectors, in `x` every
    `x_row`; only for the examples whose bits, in rows of `row` from `own` on (or ALL), want them."""
    _owners(n, spans, own, bits, row, room, h, h_row)
    depth, start = length if n == 1 else DEEP, _following(room.counts, spans, 0)
    for k in range(0, length if start < len(spans) else 0, depth):  # this part of all rows stays in the L2 cache
        group = start
        while group < len(spans):
            following = _following(room.counts, spans, group + 1)
            soon, deep = (following, k) if following < len(spans) else (start, k + depth)
            size, w_row = spans[group, pack.SIZE], spans[group, pack.D_ROW]
            dots(x, x_row, k, room.owners, group * n, room.counts[group], weights, w_row, spans[group, pack.D_AT] + k,
                 min(depth, length - k), (size + QUAD - 1) // QUAD * QUAD, h, h_row, spans[group, pack.H_AT],
                 spans[soon, pack.D_AT] + deep)  # fmt: skip
            group = following


@inlined
def _following(wanted, spans, group):  # type: ignore[no-untyped-def]
    """The first group from `group` on that is not empty and that some example wants; their number where none is."""
    while group < len(spans) and not (wanted[group] and spans[group, pack.SIZE]):
        group += 1
    return group


@compiled
def product(n, way, x_row, sources, below, weights, spans, own, bits, row, room, h, h_row):  # type: ignore[no-untyped-def]
    """h = sums of the groups `spans` of a layer over the groups `sources` below, whose activations stand in the room in
    the way that `activate` has left them (`x_row`: numbers from one example to the next for DOTS); each only for the
    examples whose bits, in rows of `row` from `own` (or ALL) and `below` on, want both."""
    if way == DOTS:
        last = len(sources) - 1
        length = (sources[last, pack.FIRST] + sources[last, pack.SIZE] + LANES - 1) // LANES * LANES
        dense_product(n, room.x, x_row, length, weights, spans, own, bits, row, room, h, h_row)
        return
    _owners(n, spans, own, bits, row, room, h, h_row)
    if way == LISTS:
        _lists(n, weights, spans, room, h, h_row)
        return
    for group in range(len(spans)):
        columns, w_row = spans[group, pack.SIZE], spans[group, pack.W_ROW]
        for source in range(len(sources) if columns and room.counts[group] else 0):
            size = (sources[source, pack.SIZE] + STEPS - 1) // STEPS * STEPS  # zeros behind the last
            # The bits that stand for groups where skipped neurons are filled in are of every example.
            asked = ALL if source == len(sources) - 1 else below + source
            count = _both(room.owners, group * n, room.counts[group], asked, bits, row, room.rows) if size else 0
            x_row, x_from = sources[source, pack.X_ROW], sources[source, pack.X_AT] * n
            w_from = spans[group, pack.W_AT] + sources[source, pack.FIRST] * w_row
            for k in range(0, size if count else 0, DEPTH):
                panels(room.x, x_row, x_from + k, room.rows, 0, count, weights, w_row, w_from + k * w_row, columns,
                       min(DEPTH, size - k), h, h_row, spans[group, pack.H_AT])  # fmt: skip


@compiled
def _owners(n, spans, own, bits, row, room, h, h_row):  # type: ignore[no-untyped-def]
    """List for every group the examples that want it, and clear their sums."""
    for group in range(len(spans)):
        room.counts[group] = _wanted(n, ALL if own == ALL else own + group, bits, row, room.owners, group * n)
        for t in range(group * n, group * n + room.counts[group] if spans[group, pack.SIZE] else 0):
            _cleared(h, room.owners[t] * h_row + spans[group, pack.H_AT], h, 0, h, 0, _ONE, spans[group, pack.SIZE])


@inlined
def _wanted(n, asked, bits, row, to, at):  # type: ignore[no-untyped-def]
    """List the examples that want a group, whose bits stand from `asked` on, from `at` on; return their number."""
    count = 0
    for i in range(n):
        to[at + count] = i
        count += asked == ALL or bits[asked + i * row] != 0
    return count


@inlined
def _both(owners, at, count, asked, bits, row, to):  # type: ignore[no-untyped-def]
    """List those of the `count` examples listed from `at` on that want a group below, too; return their number."""
    found = 0
    for t in range(at, at + count):
        to[found] = owners[t]
        found += asked == ALL or bits[asked + owners[t] * row] != 0
    return found


@compiled
def _lists(n, weights, spans, room, h, h_row):  # type: ignore[no-untyped-def]
    """The same over what is listed as evaluated and not zero below."""
    for group in range(len(spans)):
        h_at, w_at, w_row = spans[group, pack.H_AT], spans[group, pack.W_AT], spans[group, pack.W_ROW]
        for t in range(group * n, group * n + room.counts[group]):
            i = room.owners[t]
            at = i * room.entries
            spread(room.index, at, room.value, at, room.lengths[i], weights, w_row, w_at, spans[group, pack.SIZE], h,
                   i * h_row + h_at)  # fmt: skip


@compiled
def activate(n, way, spans, own, bits, row, floats, layer_meta, meta, room, h_row):  # type: ignore[no-untyped-def]
    """Make the sums of a layer's evaluated groups activations, as the way that they will be read asks for: LISTS of
    those that are not zero; rows for each group (PAIRS); rows of all, zeros where groups are skipped (DOTS)."""
    groups, bias, whole_row = len(spans) - 1, layer_meta[pack.BIAS], layer_meta[pack.WHOLE_ROW]
    for i in range(n):
        mask, factor, start = own + i * row, _ONE, i * h_row
        if meta[pack.RESCALED]:
            factor = _factor(bits, mask, spans, layer_meta[pack.NEURONS])
        for group in range(groups):
            size, at = spans[group, pack.SIZE], spans[group, pack.H_AT]
            to, to_from = room.h, start + at
            if way == PAIRS:
                to, to_from = room.x, spans[group, pack.X_AT] * n + i * spans[group, pack.X_ROW]
            elif way == DOTS:  # whole vectors are written, so the groups one after the other
                to, to_from = room.x, i * whole_row + spans[group, pack.FIRST]
            if bits[mask + group] and size:
                if meta[pack.SCALED]:
                    for j in range(at, at + size):
                        room.h[start + j] *= floats[layer_meta[pack.SCALE] + j]
                if meta[pack.TANH]:
                    for j in range(at, at + size):
                        room.h[start + j] = math.tanh(room.h[start + j] + floats[bias + j])
                    _scaled(to, to_from, room.h, start + at, floats, 0, factor, size)
                else:
                    _rectified(to, to_from, room.h, start + at, floats, bias + at, factor, size)
            elif way == DOTS and size:
                _cleared(to, to_from, to, 0, to, 0, _ONE, size)
        if way == LISTS:
            room.lengths[i] = _list(start, i * room.entries, bits, mask, spans, room)
        else:
            at, end = i * whole_row + spans[groups, pack.FIRST], (i + 1) * whole_row
            if way == PAIRS:
                at = spans[groups, pack.X_AT] * n + i * spans[groups, pack.X_ROW]
                end = at + spans[groups, pack.X_ROW]
            for group in range(spans[groups, pack.SIZE]):
                room.x[at + group] = bits[mask + group]
            for j in range(at + spans[groups, pack.SIZE], end):
                room.x[j] = 0


@inlined
def _factor(bits, mask, spans, neurons):  # type: ignore[no-untyped-def]
    """What activations of one example are multiplied with where they are rescaled: neurons by evaluated ones."""
    evaluated = 0
    for group in range(len(spans) - 1):
        evaluated += spans[group, pack.SIZE] * bits[mask + group]
    return np.float32(neurons / max(evaluated, 1))


@inlined
def _list(h_from, at, bits, mask, spans, room):  # type: ignore[no-untyped-def]
    """List one example's evaluated neurons that are not zero and the bits that stand for groups, padded with zeros to
    whole vectors; returns how many there are."""
    index, value, count, groups = room.index, room.value, 0, len(spans) - 1
    for group in range(groups):
        if bits[mask + group]:
            first, start = spans[group, pack.FIRST], h_from + spans[group, pack.H_AT]
            for j in range(spans[group, pack.SIZE]):
                index[at + count], value[at + count] = first + j, room.h[start + j]
                count += room.h[start + j] != 0
    for group in range(spans[groups, pack.SIZE]):
        index[at + count], value[at + count] = spans[groups, pack.FIRST] + group, 1
        count += bits[mask + group]
    for j in range(at + count, at + (count + LANES - 1) // LANES * LANES):
        index[j], value[j] = 0, 0
    return count
