"""Products of listed examples with panels and lists, put together from the register tiles."""

from collections.abc import Callable
from typing import Any

import numba

from condcomp_lib.kernels.tiles import LANES, dot_tile, spread_tile

BLOCK = 1024  # numbers of a row at a time where several rows share them: four rows of them stay in the L1 cache
COLUMNS = 60  # neurons at a time: a block of their rows stays in the L2 cache, and 3 and 4 divide it

compiled: Callable[..., Any] = numba.njit(nogil=True, error_model="numpy", boundscheck=False)

_dot_4_3, _dot_4_2, _dot_4_1 = dot_tile(4, 3), dot_tile(4, 2), dot_tile(4, 1)
_dot_3_3, _dot_3_1, _dot_2_4, _dot_2_1 = dot_tile(3, 3), dot_tile(3, 1), dot_tile(2, 4), dot_tile(2, 1)
_dot_1_4, _dot_1_1 = dot_tile(1, 4), dot_tile(1, 1)
# Few vectors leave registers for several rows of w at once, whose sums do not wait for one another.
_spread_8, _spread_7, _spread_6, _spread_5 = spread_tile(8, 1), spread_tile(7, 1), spread_tile(6, 2), spread_tile(5, 2)
_spread_4, _spread_3, _spread_2, _spread_1 = spread_tile(4, 2), spread_tile(3, 4), spread_tile(2, 4), spread_tile(1, 8)


@compiled
def _dot_4(x, x_row, k, listed, at, w, w_row, start, size, h, h_row, to, columns):  # type: ignore[no-untyped-def]
    j = 0
    while j + 3 <= columns:
        _dot_4_3(x, x_row, k, listed, at, w, w_row, start + j * w_row, size, h, h_row, to + j)
        j += 3
    if j + 2 == columns:
        _dot_4_2(x, x_row, k, listed, at, w, w_row, start + j * w_row, size, h, h_row, to + j)
    elif j < columns:
        _dot_4_1(x, x_row, k, listed, at, w, w_row, start + j * w_row, size, h, h_row, to + j)


@compiled
def _dot_3(x, x_row, k, listed, at, w, w_row, start, size, h, h_row, to, columns):  # type: ignore[no-untyped-def]
    j = 0
    while j + 3 <= columns:
        _dot_3_3(x, x_row, k, listed, at, w, w_row, start + j * w_row, size, h, h_row, to + j)
        j += 3
    for rest in range(j, columns):
        _dot_3_1(x, x_row, k, listed, at, w, w_row, start + rest * w_row, size, h, h_row, to + rest)


@compiled
def _dot_2(x, x_row, k, listed, at, w, w_row, start, size, h, h_row, to, columns):  # type: ignore[no-untyped-def]
    j = 0
    while j + 4 <= columns:
        _dot_2_4(x, x_row, k, listed, at, w, w_row, start + j * w_row, size, h, h_row, to + j)
        j += 4
    for rest in range(j, columns):
        _dot_2_1(x, x_row, k, listed, at, w, w_row, start + rest * w_row, size, h, h_row, to + rest)


@compiled
def _dot_1(x, x_row, k, listed, at, w, w_row, start, size, h, h_row, to, columns):  # type: ignore[no-untyped-def]
    j = 0
    while j + 4 <= columns:
        _dot_1_4(x, x_row, k, listed, at, w, w_row, start + j * w_row, size, h, h_row, to + j)
        j += 4
    for rest in range(j, columns):
        _dot_1_1(x, x_row, k, listed, at, w, w_row, start + rest * w_row, size, h, h_row, to + rest)


@compiled
def dot(x, x_row, listed, at, count, w, w_row, w_from, columns, size, h, h_row, h_from):  # type: ignore[no-untyped-def]
    """h[r, j] += x[r] . w[j] for the `count` rows r listed from `at` on and `columns` rows of w."""
    if count == 1:
        _dot_1(x, x_row, 0, listed, at, w, w_row, w_from, size, h, h_row, h_from, columns)
        return
    for first in range(0, columns, COLUMNS):
        some, to = min(COLUMNS, columns - first), h_from + first
        for k in range(0, size, BLOCK):
            part, row, start = min(BLOCK, size - k), at, w_from + first * w_row + k
            while row + 4 <= at + count:
                _dot_4(x, x_row, k, listed, row, w, w_row, start, part, h, h_row, to, some)
                row += 4
            if row + 3 == at + count:
                _dot_3(x, x_row, k, listed, row, w, w_row, start, part, h, h_row, to, some)
            elif row + 2 == at + count:
                _dot_2(x, x_row, k, listed, row, w, w_row, start, part, h, h_row, to, some)
            elif row < at + count:
                _dot_1(x, x_row, k, listed, row, w, w_row, start, part, h, h_row, to, some)


@compiled
def spread(index, value, first, count, w, w_row, w_from, h, h_from):  # type: ignore[no-untyped-def]
    """h[j] += sum of value x w[index, j] over `count` entries of the list, which zeros pad to whole vectors."""
    if not count:
        return
    last, padded, vectors = first + count, first + (count + LANES - 1) // LANES * LANES, w_row // LANES
    while vectors > 7:
        _spread_8(index, value, first, last, w, w_row, w_from, h, h_from)
        vectors, w_from, h_from = vectors - 8, w_from + 8 * LANES, h_from + 8 * LANES
    if vectors == 7:
        _spread_7(index, value, first, last, w, w_row, w_from, h, h_from)
    elif vectors == 6:
        _spread_6(index, value, first, padded, w, w_row, w_from, h, h_from)
    elif vectors == 5:
        _spread_5(index, value, first, padded, w, w_row, w_from, h, h_from)
    elif vectors == 4:
        _spread_4(index, value, first, padded, w, w_row, w_from, h, h_from)
    elif vectors == 3:
        _spread_3(index, value, first, padded, w, w_row, w_from, h, h_from)
    elif vectors == 2:
        _spread_2(index, value, first, padded, w, w_row, w_from, h, h_from)
    elif vectors == 1:
        _spread_1(index, value, first, padded, w, w_row, w_from, h, h_from)
