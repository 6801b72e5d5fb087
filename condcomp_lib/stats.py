"""Honest summaries of repeated runs: interquartile means, bootstrap intervals, paired comparisons.

Every function takes flat sequences with one number per run, and labels of the same length where runs hang together:
`clusters` for runs that share something random (a target seed), `strata` for a fixed grouping (the data set).

Percentile intervals of few runs are too narrow. Measured on 2000 normal samples each, "95%" covers the truth in

    n runs                                          3     5     10    20
    interquartile mean                              76%   89%   94%   93%
    mean                                            76%   83%   90%   92%
    n clusters of 4, half of the variance between   85%   92%   95%   96%
    the same with the clusters ignored              74%   77%   80%   78%
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from condcomp_lib.errors import CondcompError

Statistic = Callable[..., Any]  # a location such as `interquartile_mean` or `numpy.mean`: statistic(array, axis=-1)
Labels = Sequence[Hashable] | np.ndarray | None  # one per run

_FLIPS = 2**14  # sign flips of one test: every one of them up to 14 units, a random sample above
_BLOCK = 1_000_000  # numbers resampled at a time, which bounds the memory


class StatsError(CondcompError):
    """The numbers given cannot be summarised."""


@dataclass(frozen=True)
class Interval:
    """An estimate from `n` runs with the ends of its confidence interval, NaN where nothing was repeated."""

    estimate: float
    low: float
    high: float
    n: int
    level: float

    def format(self, digits: int = 3) -> str:
        """The estimate and its interval with `digits` decimals; `str` takes three.

        >>> Interval(0.8712, 0.8659, 0.8751, 10, 0.95).format()
        '0.871 [0.866, 0.875]'
        >>> Interval(0.8712, float("nan"), float("nan"), 1, 0.95).format(2)
        '0.87 (one run)'
        """
        if np.isnan(self.low):
            return f"{self.estimate:.{digits}f} ({'one run' if self.n == 1 else 'one cluster'})"
        return f"{self.estimate:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def __str__(self) -> str:
        return self.format()

    def contains(self, x: float) -> bool:
        """Whether `x` lies in the interval, ends included. An interval without ends contains nothing."""
        return bool(self.low <= x <= self.high)

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name for JSON, with None for an end that is NaN."""
        return {name: None if np.isnan(value) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class PairedDifference:
    """The interval of the differences and the two-sided p value of "there is none"."""

    interval: Interval
    p_value: float

    def __str__(self) -> str:
        return f"{self.interval}, p = {self.p_value:.2g}"


def interquartile_mean(values: npt.ArrayLike, axis: int = -1) -> Any:
    """Mean of the middle half along `axis`.

    Of n sorted values, floor(n / 4) are cut from each side: none up to n = 3 (the plain mean), one a side from n = 4,
    two from n = 8. So it is exactly the middle half where n is a multiple of 4, and slightly more of it elsewhere.

    >>> float(interquartile_mean([0.0, 1.0, 2.0, 90.0]))
    1.5
    """
    return stats.trim_mean(_numbers("values", values, axis), 0.25, axis=axis)


def interval(
    values: npt.ArrayLike,
    *,
    clusters: Labels = None,
    strata: Labels = None,
    statistic: Statistic = interquartile_mean,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The statistic over runs with its percentile bootstrap interval; the order of the runs does not matter.

    `clusters`: whole clusters are drawn with replacement, then runs inside each drawn cluster, so that runs sharing a
    target are not mistaken for independent ones. A drawn cluster fills the place of another with as many runs as stood
    there; larger clusters are drawn in proportion to their size, so unequal ones do not shift the interval.
    `strata`: each is resampled by itself and keeps its number of runs. A cluster label counts within its stratum.
    One run, or one cluster in every stratum, says nothing about the spread: both ends are NaN.

    With few runs the interval is too narrow: see the measured coverage at the head of this module.

    >>> interval([0.86, 0.87, 0.88], level=0.9).format(2)
    '0.87 [0.86, 0.88]'
    """
    numbers = _flat("values", values)
    if not 0 < level < 1:
        raise StatsError(f"level {level} is no confidence level: give one between 0 and 1, such as 0.95")
    if resamples < 1:
        raise StatsError(f"resamples is {resamples}: give at least 1, such as 2000")
    stratum = _codes("strata", strata, np.zeros(len(numbers)))
    cluster = _codes("clusters", clusters, stats.rankdata(numbers, method="ordinal"))
    # Sorted by stratum, cluster and value, so that the same runs in another order meet the same draws.
    order = np.lexsort((numbers, cluster, stratum))
    numbers, stratum, cluster = numbers[order], stratum[order], cluster[order]
    draws = _resampled(numbers, stratum, cluster, statistic, resamples, np.random.default_rng(seed))
    low, high = (np.nan, np.nan) if draws is None else np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(numbers, axis=-1)), float(low), float(high), len(numbers), level)


def paired_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    clusters: Labels = None,
    strata: Labels = None,
    statistic: Statistic = interquartile_mean,
    seed: int = 0,
    **options: Any,
) -> PairedDifference:
    """The differences a - b of runs paired by position: their `interval` (which takes the options), and a p value.

    If neither side is better, each difference could as well have had the other sign; the p value is the share of sign
    patterns whose statistic is at least as far out (two-sided). It tests the same statistic as the interval shows,
    which Wilcoxon's ranks do not, and is exact with few runs, ties and zeros: up to 14 runs every pattern is counted,
    above that 16,384 random ones. With `clusters` whole clusters flip, by their mean.

    Few runs (or clusters) cannot give a small p value, however clear the difference: the least is 2 / 2**k for the mean
    of k (0.063 with 5, 0.031 with 6), doubled for every difference that the interquartile mean cuts from one side
    (0.25 with 3, 0.125 with 5, 0.031 with 7, 0.008 with 10).

    >>> paired_difference([3, 5, 4], [1, 2, 3]).p_value
    0.25
    """
    gap = _paired("a", a, "b", b, np.subtract)
    result = interval(gap, clusters=clusters, strata=strata, statistic=statistic, seed=seed, **options)
    labels = [_codes("strata", strata, np.zeros(len(gap))), _codes("clusters", clusters, np.arange(len(gap)))]
    unit = np.unique(labels, axis=1, return_inverse=True)[1]
    means = np.bincount(unit, gap) / np.bincount(unit)
    if len(means) == 1:
        return PairedDifference(result, 1.0)  # both signs of a single difference are equally far out
    flips = {"n_resamples": _FLIPS, "batch": max(1, _BLOCK // len(means)), "rng": np.random.default_rng(seed)}
    test = stats.permutation_test((means,), statistic, permutation_type="samples", vectorized=True, **flips)
    return PairedDifference(result, float(test.pvalue))


def ratio_interval(numerator: npt.ArrayLike, denominator: npt.ArrayLike, **options: Any) -> Interval:
    """The `interval` (which takes the options) over the ratios of runs paired by position.

    For a lazy network's accuracy by that of its own target, repeat the target's accuracy for each of its lazy networks
    and give the target seeds as `clusters`.

    >>> ratio_interval([0.4, 0.9], [0.8, 0.9]).estimate
    0.75
    """
    below = _flat("denominator", denominator)
    if not below.all():
        raise StatsError(f"denominator holds 0 at position {np.argmin(below != 0)}: a ratio needs others than 0")
    return interval(_paired("numerator", numerator, "denominator", below, np.divide), **options)


def binomial_standard_error(accuracy: float, examples: int) -> float:
    """Standard error of an accuracy (a share from 0 to 1) measured on that many examples; 0 at the very ends.

    >>> round(binomial_standard_error(0.85, 26032), 4)
    0.0022
    """
    if not 0 <= accuracy <= 1:
        raise StatsError(f"accuracy {accuracy} is not a share: give one from 0 to 1, not a percentage")
    if not examples >= 1:
        raise StatsError(f"examples is {examples}: an accuracy needs at least 1")
    return float(np.sqrt(accuracy * (1 - accuracy) / examples))


def _resampled(
    values: np.ndarray, stratum: np.ndarray, cluster: np.ndarray, statistic: Statistic, count: int, rng: Any
) -> np.ndarray | None:
    """The statistic of `count` resamples, or None where no stratum has two clusters. Runs are sorted by both labels."""
    n = len(values)
    first = np.flatnonzero((np.diff(stratum, prepend=-1) != 0) | (np.diff(cluster, prepend=-1) != 0))
    size = np.diff(first, append=n)
    place = np.repeat(np.arange(len(first)), size)  # run -> its cluster
    home_start, home_size = np.unique(stratum, return_index=True, return_counts=True)[1:]
    if len(first) == len(home_start):
        return None
    home = np.searchsorted(home_start, first, side="right") - 1  # cluster -> its stratum
    results = []
    for done in range(0, count, max(1, _BLOCK // n)):
        rows = min(max(1, _BLOCK // n), count - done)
        # A random run of the stratum names the cluster that fills a place: clusters in proportion to their size.
        run = home_start[home] + rng.integers(home_size[home], size=(rows, len(first)))
        drawn = place[run][:, place]
        results.append(statistic(values[first[drawn] + rng.integers(size[drawn])], axis=-1))
    return np.concatenate(results)


def _numbers(name: str, values: npt.ArrayLike, axis: int = -1) -> np.ndarray:
    try:
        array = np.atleast_1d(np.asarray(values, dtype=float))
    except (TypeError, ValueError):
        shown = " ".join(str(values).split())[:60]
        raise StatsError(f"{name} are not all numbers: {shown}; give one number per run") from None
    if array.shape[axis] == 0:
        raise StatsError(f"{name} are empty: give at least one run")
    if not np.isfinite(array).all():
        where = int(np.argmin(np.isfinite(array)))
        raise StatsError(
            f"{name} hold {array.flat[where]} at position {where}: give finite numbers, without failed runs"
        )
    return array


def _flat(name: str, values: npt.ArrayLike) -> np.ndarray:
    array = _numbers(name, values)
    if array.ndim != 1:
        raise StatsError(f"{name} have shape {array.shape}: give a flat sequence, one number per run")
    return array


def _paired(name: str, values: npt.ArrayLike, other: str, others: npt.ArrayLike, combine: np.ufunc) -> np.ndarray:
    first, second = _flat(name, values), _flat(other, others)
    _same_length(name, first, other, len(second))
    return combine(first, second)


def _same_length(name: str, found: Sequence[Any] | np.ndarray, other: str, wanted: int) -> None:
    if len(found) != wanted:
        raise StatsError(f"{name} has {len(found)} entries and {other} {wanted}: give as many, one per run")


def _codes(name: str, labels: Labels, default: np.ndarray) -> np.ndarray:
    """The labels as integers, in an order that depends on the labels alone; `default` where there are none."""
    if labels is None:
        return default
    listed = list(labels)
    _same_length(name, listed, "values", len(default))
    if any(label != label for label in listed):
        raise StatsError(f"{name} hold NaN: give every run a label")
    code = {label: i for i, label in enumerate(sorted(set(listed), key=repr))}
    return np.asarray([code[label] for label in listed])
