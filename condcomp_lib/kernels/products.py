"""What evaluations are put together from: products of listed examples with panels and lists, made of the register
tiles, and the decision of a mask."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba

from condcomp_lib import policies
from condcomp_lib.files import cached, inlined
from condcomp_lib.kernels.tiles import LANES, QUAD, dot_tile, panel_tile, spread_tile

# Nothing is allocated, so numba need not count references to arrays, which it does by locked instructions.
UNCOUNTED: Any = {"_nrt": False}
compiled: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy", boundscheck=False, **UNCOUNTED)

# Vectors and rows of sums that fill the registers: 16 of eight lanes, or 32 of sixteen.
WIDE, TALL = (4, 6) if LANES == 16 else (3, 4)
_wide_6, _wide_5, _wide_4, _wide_3, _wide_2, _wide_1 = (
    panel_tile(rows, WIDE) for rows in (TALL, min(TALL, 5), 4, 3, 2, 1)
)
HIGH = 8 if LANES == 16 else 6
_two_8, _two_4, _two_2, _two_1 = (panel_tile(rows, 2) for rows in (HIGH, 4, 2, 1))
_one_8, _one_4, _one_1 = (panel_tile(rows, 1) for rows in (8, 4, 1))
# Few vectors leave registers for several rows of w at once, whose sums do not wait for one another.
_spread_8, _spread_7, _spread_6, _spread_5 = spread_tile(8, 1), spread_tile(7, 1), spread_tile(6, 2), spread_tile(5, 2)
_spread_4, _spread_3, _spread_2, _spread_1 = spread_tile(4, 2), spread_tile(3, 4), spread_tile(2, 4), spread_tile(1, 8)
ACROSS = 4 if LANES == 16 else 2  # neurons of a tile of several rows
DEEP = 1024  # numbers of a row at a time: those of a tile's rows stay in the L1 cache
LONG = 8  # vectors of a single row at a time, whose neurons come one after the other as they lie in memory
_dot_6, _dot_5, _dot_4, _dot_3, _dot_2 = (dot_tile(rows, ACROSS, 1) for rows in (6, 5, 4, 3, 2))
_dot_1, _dot_rest = dot_tile(1, 1, LONG), dot_tile(1, QUAD, 1)


@inlined
def dots(x, x_row, x_from, listed, at, count, w, w_row, w_from, size, neurons, h, h_row, h_from, ahead):  # type: ignore[no-untyped-def]
    """h[r, j] += sum over k of x[r, k] w[j, k] for the `count` rows r listed from `at` on and `neurons` rows j of w, a
    multiple of QUAD; `size` is a multiple of LANES, not zero, and at most DEEP for several rows to be fast. The first
    rows' tiles call as much of the weights from `ahead` on into the L2 cache, a row of them in ACROSS each."""
    turn, end = 0, at + count
    if count == 1:
        whole = size // (LONG * LANES) * LONG * LANES
        for j in range(neurons if whole else 0):
            _dot_1(x, x_row, x_from, listed, at, w, w_row, w_from + j * w_row, whole, h, h_row, h_from + j, 0)
        for j in range(0, neurons if whole < size else 0, QUAD):
            own = w_from + j * w_row + whole
            _dot_rest(x, x_row, x_from + whole, listed, at, w, w_row, own, size - whole, h, h_row, h_from + j, 0)
        at = end
    while at < end:
        tiles = (end - at + 5) // 6
        rows = (end - at + tiles - 1) // tiles  # as even as can be
        for j in range(0, neurons, ACROSS):
            own, to = w_from + j * w_row, h_from + j
            soon = ahead + (j + turn) * w_row if turn < ACROSS else own
            if rows == 6:
                _dot_6(x, x_row, x_from, listed, at, w, w_row, own, size, h, h_row, to, soon)
            elif rows == 5:
                _dot_5(x, x_row, x_from, listed, at, w, w_row, own, size, h, h_row, to, soon)
            elif rows == 4:
                _dot_4(x, x_row, x_from, listed, at, w, w_row, own, size, h, h_row, to, soon)
            elif rows == 3:
                _dot_3(x, x_row, x_from, listed, at, w, w_row, own, size, h, h_row, to, soon)
            else:
                _dot_2(x, x_row, x_from, listed, at, w, w_row, own, size, h, h_row, to, soon)
        at, turn = at + rows, turn + 1


@inlined
def panels(x, x_row, x_from, listed, at, count, w, w_row, w_from, columns, size, h, h_row, h_from):  # type: ignore[no-untyped-def]
    """h[r, j] += sum over k of x[r, k] w[k, j] for the `count` rows r listed from `at` on and `columns` neurons, in
    whole vectors. `size` is a multiple of STEPS."""
    j, end = 0, at + count
    while j < columns:
        left, own, to, t = columns - j, w_from + j, h_from + j, at
        if left > (WIDE + 1) * LANES or (WIDE - 1) * LANES < left <= WIDE * LANES:
            j += WIDE * LANES
            while t < end:
                tiles = (end - t + TALL - 1) // TALL
                rows = (end - t + tiles - 1) // tiles
                if rows == TALL:
                    _wide_6(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                elif rows == 5:
                    _wide_5(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                elif rows == 4:
                    _wide_4(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                elif rows == 3:
                    _wide_3(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                elif rows == 2:
                    _wide_2(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                else:
                    _wide_1(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                t += rows
        elif left > LANES:
            j += 2 * LANES
            while t < end:
                if end - t >= HIGH:
                    _two_8(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                    t += HIGH
                elif end - t >= 4:
                    _two_4(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                    t += 4
                elif end - t >= 2:
                    _two_2(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                    t += 2
                else:
                    _two_1(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                    t += 1
        else:
            j += LANES
            while t < end:
                if end - t >= 8:
                    _one_8(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                    t += 8
                elif end - t >= 4:
                    _one_4(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                    t += 4
                else:
                    _one_1(x, x_row, x_from, listed, t, w, w_row, own, size, h, h_row, to)
                    t += 1


@inlined
def spread(index, index_from, value, value_from, count, w, w_row, w_from, columns, h, h_from):  # type: ignore[no-untyped-def]
    """h[j] += sum of value x w[index, j] over `count` entries of the list, which zeros pad to whole vectors, and whole
    vectors of neurons that hold `columns`."""
    vectors, padded = (columns + LANES - 1) // LANES if count else 0, (count + LANES - 1) // LANES * LANES
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
    for group in range(len(logits)):
        scratch[group] = logits[group]
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
    # numba looks only at the function's file to tell whether what it keeps is out of date; the name tells it of others,
    # and of the width of vectors, which it does not tell apart where it compiles for a generic processor.
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(policies.__file__)]
    function.__qualname__ = f"{name}_{LANES}_{sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()[:12]}"
    return cached(function, **UNCOUNTED)
