"""What evaluations are put together from: products of listed examples with panels and lists, made of the register
tiles, and the decision of a mask."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba

from condcomp_lib import policies
from condcomp_lib.files import cached, inlined
from condcomp_lib.kernels.tiles import LANES, LINE, STEPS, panel_tile, spread_tile

compiled: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy", boundscheck=False)

# Lines of weights that a tile calls for in STEPS: tiles of few rows are done soon. One row takes them as they come.
CALLS, PAIR_CALLS, ONE_CALLS = 3, 4, 2
_panel_4_3, _panel_2_3, _panel_1_3 = panel_tile(4, 3, CALLS), panel_tile(2, 3, PAIR_CALLS), panel_tile(1, 3, 0)
_panel_6_2, _panel_2_2, _panel_1_2 = panel_tile(6, 2, CALLS), panel_tile(2, 2, PAIR_CALLS), panel_tile(1, 2, 0)
_panel_8_1, _panel_1_1 = panel_tile(8, 1, ONE_CALLS), panel_tile(1, 1, 0)
# Few vectors leave registers for several rows of w at once, whose sums do not wait for one another.
_spread_8, _spread_7, _spread_6, _spread_5 = spread_tile(8, 1), spread_tile(7, 1), spread_tile(6, 2), spread_tile(5, 2)
_spread_4, _spread_3, _spread_2, _spread_1 = spread_tile(4, 2), spread_tile(3, 4), spread_tile(2, 4), spread_tile(1, 8)


@inlined
def panels(x, x_row, x_from, listed, at, count, every, w, w_row, w_from, columns, size, h, h_row, h_from, ahead, last):  # type: ignore[no-untyped-def]
    """h[r, j] += sum over k of x[r, k] w[k, j] for the `count` rows r listed from `at` on and `columns` neurons, in
    whole vectors. `size` is a multiple of STEPS; `every` lists 0, 1, 2, ... What lies from `ahead` up to `last` is
    called into the cache, see `panel_tile`."""
    line, j, end = size // STEPS * (LINE // w.itemsize), 0, at + count
    if columns > 3 * LANES:
        end -= count % 2
    while at < end and j < columns:
        left, own, to = columns - j, w_from + j, h_from + j
        if left > 4 * LANES or 2 * LANES < left <= 3 * LANES:
            ahead = _three(x, x_row, x_from, listed, at, end, w, w_row, own, size, h, h_row, to, ahead, last, line)
            j += 3 * LANES
        elif left > LANES:
            ahead = _two(x, x_row, x_from, listed, at, end, w, w_row, own, size, h, h_row, to, ahead, last, line)
            j += 2 * LANES
        else:
            ahead = _one(x, x_row, x_from, listed, at, end, w, w_row, own, size, h, h_row, to, ahead, last, line)
            j += LANES
    if end < at + count:  # one row of many vectors reads the weights through
        row = listed[end]
        spread(every, 0, x, x_from + row * x_row, size, w, w_row, w_from, columns, h, h_from + row * h_row)


@inlined
def _three(x, x_row, x_from, listed, at, end, w, w_row, w_from, size, h, h_row, h_from, ahead, last, line):  # type: ignore[no-untyped-def]
    """Three vectors of neurons for the rows listed from `at` up to `end`; returns what to call for next."""
    while at < end:
        soon = ahead if ahead < last else w_from
        if end - at >= 4:
            _panel_4_3(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, soon)
            at, ahead = at + 4, ahead + CALLS * line
        elif end - at >= 2:
            _panel_2_3(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, soon)
            at, ahead = at + 2, ahead + PAIR_CALLS * line
        else:
            _panel_1_3(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, soon)
            at += 1
    return ahead


@inlined
def _two(x, x_row, x_from, listed, at, end, w, w_row, w_from, size, h, h_row, h_from, ahead, last, line):  # type: ignore[no-untyped-def]
    """The same for two vectors."""
    while at < end:
        soon = ahead if ahead < last else w_from
        if end - at >= 6:
            _panel_6_2(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, soon)
            at, ahead = at + 6, ahead + CALLS * line
        elif end - at >= 2:
            _panel_2_2(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, soon)
            at, ahead = at + 2, ahead + PAIR_CALLS * line
        else:
            _panel_1_2(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, soon)
            at += 1
    return ahead


@inlined
def _one(x, x_row, x_from, listed, at, end, w, w_row, w_from, size, h, h_row, h_from, ahead, last, line):  # type: ignore[no-untyped-def]
    """The same for one vector."""
    while at < end:
        soon = ahead if ahead < last else w_from
        if end - at >= 8:
            _panel_8_1(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, soon)
            at, ahead = at + 8, ahead + ONE_CALLS * line
        else:
            _panel_1_1(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, soon)
            at += 1
    return ahead


@compiled
def spread(index, index_from, value, value_from, count, w, w_row, w_from, columns, h, h_from):  # type: ignore[no-untyped-def]
    """h[j] += sum of value x w[index, j] over `count` entries of the list, which zeros pad to whole vectors, and whole
    vectors of neurons that hold `columns`."""
    if not count:
        return
    vectors, padded = (columns + LANES - 1) // LANES, (count + LANES - 1) // LANES * LANES
    while vectors > 7:
        _spread_8(index, index_from, value, value_from, count, w, w_row, w_from, h, h_from)
        vectors, w_from, h_from = vectors - 8, w_from + 8 * LANES, h_from + 8 * LANES
    if vectors == 7:
        _spread_7(index, index_from, value, value_from, count, w, w_row, w_from, h, h_from)
    elif vectors == 6:
        _spread_6(index, index_from, value, value_from, padded, w, w_row, w_from, h, h_from)
    elif vectors == 5:
        _spread_5(index, index_from, value, value_from, padded, w, w_row, w_from, h, h_from)
    elif vectors == 4:
        _spread_4(index, index_from, value, value_from, padded, w, w_row, w_from, h, h_from)
    elif vectors == 3:
        _spread_3(index, index_from, value, value_from, padded, w, w_row, w_from, h, h_from)
    elif vectors == 2:
        _spread_2(index, index_from, value, value_from, padded, w, w_row, w_from, h, h_from)
    elif vectors == 1:
        _spread_1(index, index_from, value, value_from, padded, w, w_row, w_from, h, h_from)


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
def decide(logits, bits, level, count, budgeted, always_on, scratch):  # type: ignore[no-untyped-def]
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


def kept(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A whole evaluation compiled at its first call, or read from numba's cache where that can be written."""
    # numba looks only at the function's file to tell whether what it keeps is out of date; the name tells it of others.
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(policies.__file__)]
    function.__qualname__ = f"{name}_{sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()[:12]}"
    return cached(function)
