"""Compiled passes over a layer for the class-flow penalty: what `flow` adds up, and the gradients it adds.

`sums` in all of them has a number for each input in every row: one row for each class that occurs, then those below.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from condcomp_lib.files import cached, inlined

HIGH = 16  # exponents below it are made of four squares at most
SOME = 16  # of so many rows of weights one is looked at for a size to take powers relative to
LEVEL, COLUMNS, SIZES, EXTRA = -3, -2, -1, 3  # rows behind those of the classes, see _Measured
FAR = 1e-100  # products below it, or above 1 / FAR, are taken apart


@inlined
def _raised(v, power):  # type: ignore[no-untyped-def]
    """v^power for whole exponents from 0 to below HIGH, by squares and without a branch: loops over it take a vector at
    a time."""
    one = type(v)(1)
    v2 = v * v
    v4 = v2 * v2
    low = (v if power & 1 else one) * (v2 if power & 2 else one)
    return low * ((v4 if power & 4 else one) * (v4 * v4 if power & 8 else one))


@inlined
def _highly_raised(v, power):  # type: ignore[no-untyped-def]
    """v^power for whole exponents below HIGH^3."""
    v4 = v * v * v * v
    v16 = v4 * v4 * v4 * v4
    v64 = v16 * v16 * v16 * v16
    return _raised(v, power) * _raised(v16, power >> 4) * _raised(v64 * v64 * v64 * v64, power >> 8)


@cached
def find_members(labels, counts, place, share):  # type: ignore[no-untyped-def]
    """Count the examples of each class, find of each example the `place` of its class among those that occur and its
    `share` of it; returns how many occur, and the first class that does not (0 and -1 for labels out of range)."""
    for label in labels:
        if not 0 <= label < len(counts):
            return 0, -1
        counts[label] += 1
    present, missing, places = 0, -1, np.zeros_like(counts)
    for c in range(len(counts)):
        places[c] = present
        present += counts[c] > 0
        missing = c if counts[c] == 0 and missing < 0 else missing
    for row in range(len(labels)):
        place[row] = places[labels[row]]
        share[row] = 1 / counts[labels[row]]
    return present, missing


@cached
def add_levels(sums, h, place, share, pairwise):  # type: ignore[no-untyped-def]
    """In the first rows of `sums` each class's mean of |h|, and in the row LEVEL their geometric mean, or their sum
    where `pairwise`."""
    by_class, level = sums[:-EXTRA], sums[LEVEL]
    for row in range(len(h)):
        one, out, part = h[row], by_class[place[row]], h.dtype.type(share[row])
        for k in range(len(one)):
            out[k] += part * abs(one[k])
    if pairwise:
        for one in by_class:
            for k in range(len(one)):
                level[k] += one[k]
        return
    product, logs = np.ones(len(level)), np.zeros(len(level))
    every = 4 if h.itemsize == 4 else 1  # so many single-precision numbers do not leave double precision
    for c in range(len(by_class)):
        one = by_class[c]
        for k in range(len(one)):
            product[k] *= one[k]
        if c % every == every - 1:
            for k in range(len(one)):
                if not FAR < product[k] < 1 / FAR and product[k] > 0:  # a logarithm of every mean would take longer
                    logs[k] += math.log(product[k])
                    product[k] = 1.0
    for k in range(len(level)):
        if product[k] != 0:
            level[k] = math.exp((math.log(product[k]) + logs[k]) / len(by_class))


@cached
def add_below(below, h, sums, place, share, rate, flat, pairwise, relu):  # type: ignore[no-untyped-def]
    """below += its share of the gradient in a_i^c, c its class, times sign(h), in place; where `relu` and h is 0, 0."""
    zero, by_class, level, columns, sizes = h.dtype.type(0), sums[:-EXTRA], sums[LEVEL], sums[COLUMNS], sums[SIZES]
    rates = np.zeros_like(by_class)
    if rate != 0:
        for c in range(len(by_class)):
            for k in range(len(level)):
                over = level[k] / 2 if pairwise else by_class[c, k]
                if columns[k] > 0:
                    rates[c, k] = columns[k] * rate / over + flat * sizes[k]
                else:
                    rates[c, k] = flat * sizes[k]
    for row in range(len(h)):
        one, by_input, out, part = h[row], rates[place[row]], below[row], h.dtype.type(share[row])
        for k in range(len(one)):
            change = part * by_input[k]
            if one[k] > zero:
                out[k] += change
            elif relu:
                out[k] = zero
            elif one[k] < zero:
                out[k] -= change


def sum_powers(weight: np.ndarray, level: np.ndarray, power: int, columns: np.ndarray) -> tuple[float, float]:
    """Add to `columns` (inputs) the sum over the rows of `weight` of (level |w| / top)^power; returns top, a size of
    level |w| that keeps powers inside the number format, and the sum over all."""
    return (_powers if power < HIGH else _high_powers)(weight, level, power, columns)


def _summing(raised: Callable[..., Any]) -> Callable[..., Any]:
    """`sum_powers` with exponents that `raised` can do, compiled."""

    @cached
    def powers(weight, level, power, columns):  # type: ignore[no-untyped-def]
        # For few classes the largest of some rows will do; where a row not looked at is quite another, all are.
        top, total = weight.dtype.type(0), 0.0
        for step in (SOME if power < HIGH else 1, 1):
            most = np.zeros_like(level)
            for row in range(0, len(weight), step):
                w = weight[row]
                for k in range(len(w)):
                    size = level[k] * abs(w[k])
                    most[k] = size if size > most[k] else most[k]
            top = most.max()
            if top > 0:
                scale = weight.dtype.type(1 / top)
                for row in range(len(weight)):
                    w = weight[row]
                    for k in range(len(w)):
                        columns[k] += raised(scale * level[k] * abs(w[k]), power)
                total = columns.astype(np.float64).sum()
                if 0 < total < np.inf:
                    break
                columns[:] = 0
        return top, total

    return powers


_powers, _high_powers = _summing(_raised), _summing(_highly_raised)


def add_gradient(
    gradient: np.ndarray, weight: np.ndarray, level: np.ndarray, power: int, scale: float, steep: float
) -> None:
    """gradient += steep level (scale level |w|)^(power - 1) sign(w), in place."""
    (_gradient if power < HIGH else _high_gradient)(gradient, weight, level, power, scale, steep)


def _steep(raised: Callable[..., Any]) -> Callable[..., Any]:
    """`add_gradient` with exponents that `raised` can do, compiled."""

    @cached
    def add(gradient, weight, level, power, scale, steep):  # type: ignore[no-untyped-def]
        scale, steep = weight.dtype.type(scale), weight.dtype.type(steep)
        for row in range(len(weight)):
            w, out = weight[row], gradient[row]
            for k in range(len(w)):
                v = scale * level[k] * w[k]
                out[k] += steep * level[k] * v * raised(abs(v), power - 2)

    return add


_gradient, _high_gradient = _steep(_raised), _steep(_highly_raised)


@cached
def add_sizes(sizes, weight):  # type: ignore[no-untyped-def]
    """sizes += |w|, summed over the rows of `weight`."""
    for row in range(len(weight)):
        w = weight[row]
        for k in range(len(w)):
            sizes[k] += abs(w[k])


@cached
def add_signs(gradient, weight, sums, flat):  # type: ignore[no-untyped-def]
    """gradient += flat sums sign(w), in place; `sums` by input."""
    flat, zero = weight.dtype.type(flat), weight.dtype.type(0)
    for row in range(len(weight)):
        w, out = weight[row], gradient[row]
        for k in range(len(w)):
            change = flat * sums[k]
            out[k] += change if w[k] > zero else -change if w[k] < zero else zero
