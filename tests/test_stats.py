import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from condcomp_lib import stats
from condcomp_lib.stats import (
    Interval,
    StatsError,
    binomial_standard_error,
    interquartile_mean,
    interval,
    paired_difference,
    ratio_interval,
)

RUNS = np.random.default_rng(0).normal(0.87, 0.01, 20)
lists = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=1, max_size=15)
quick = settings(max_examples=40, deadline=None)


def cut_by_hand(values):
    ordered = sorted(values)
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept)


def close(a, b):
    return np.allclose([a.estimate, a.low, a.high], [b.estimate, b.low, b.high], rtol=1e-9, atol=1e-7, equal_nan=True)


def clustered(count, size, between, within, seed=0):
    rng = np.random.default_rng(seed)
    values = between * rng.normal(size=(count, 1)) + within * rng.normal(size=(count, size))
    return values.ravel(), np.repeat(np.arange(count), size)


# The interquartile mean


@given(lists)
def test_iqm_is_the_mean_of_the_sorted_middle(values):
    assert interquartile_mean(values) == pytest.approx(cut_by_hand(values), abs=1e-9)


def test_iqm_cuts_nothing_up_to_three_values_and_one_a_side_from_four():
    assert interquartile_mean([0.0, 0.0, 9.0]) == pytest.approx(3.0)
    assert interquartile_mean([0.0, 1.0, 2.0, 9.0]) == pytest.approx(1.5)
    assert interquartile_mean([0.0, 1.0, 2.0, 3.0, 9.0]) == pytest.approx(2.0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_iqm_works_along_an_axis(axis):
    table = np.random.default_rng(1).normal(size=(5, 8))
    by_hand = [cut_by_hand(line) for line in np.moveaxis(table, axis, -1)]
    assert np.allclose(interquartile_mean(table, axis=axis), by_hand)


# The interval


def test_the_estimate_is_the_statistic_and_lies_inside():
    found = interval(RUNS)
    assert found.estimate == pytest.approx(cut_by_hand(RUNS))
    assert found.low < found.estimate < found.high
    assert (found.n, found.level) == (20, 0.95)


def test_equal_runs_give_an_interval_without_width():
    found = interval([0.5] * 6)
    assert (found.estimate, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    assert interval(RUNS, seed=3) == interval(RUNS, seed=3)
    assert interval(RUNS, seed=3) != interval(RUNS, seed=4)


@given(values=lists, data=st.data())
@quick
def test_the_order_of_the_runs_does_not_matter(values, data):
    labels = data.draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=len(values), max_size=len(values)))
    order = data.draw(st.permutations(range(len(values))))
    shuffled, moved = [values[i] for i in order], [labels[i] for i in order]
    assert close(interval(values, resamples=50), interval(shuffled, resamples=50))
    for kind in ("clusters", "strata"):
        one, other = (interval(v, resamples=50, **{kind: by}) for v, by in ((values, labels), (shuffled, moved)))
        assert close(one, other)


@given(values=lists, shift=st.floats(-50, 50), scale=st.floats(0.1, 10))
@quick
def test_shifting_and_scaling_the_runs_shifts_and_scales_the_interval(values, shift, scale):
    before = interval(values, resamples=50)
    after = interval([shift + scale * value for value in values], resamples=50)
    expected = [shift + scale * x for x in (before.estimate, before.low, before.high)]
    assert close(after, Interval(*expected, n=before.n, level=before.level))


@pytest.mark.parametrize(("statistic", "n"), [(np.mean, 5), (np.mean, 20), (interquartile_mean, 12)])
def test_without_labels_it_agrees_with_scipy(statistic, n):
    values = RUNS[:n]
    ours = interval(values, statistic=statistic, level=0.9, resamples=20_000)
    options = {"n_resamples": 20_000, "method": "percentile", "confidence_level": 0.9, "rng": np.random.default_rng(9)}
    theirs = reference.bootstrap((values,), statistic, **options).confidence_interval
    noise = 0.03 * (theirs.high - theirs.low)
    assert ours.low == pytest.approx(theirs.low, abs=noise)
    assert ours.high == pytest.approx(theirs.high, abs=noise)


def test_clusters_and_strata_agree_with_plain_loops():
    values = np.array([1.0, 2.0, 4.0, 8.0, 3.0, 5.0, 9.0, 11.0, 12.0, 10.0])
    clusters = [0, 0, 0, 1, 1, 2, 0, 0, 1, 1]
    strata = ["svhn"] * 6 + ["mnist"] * 4
    rng = np.random.default_rng(5)
    means = []
    for _ in range(4000):
        drawn = []
        for name in ("svhn", "mnist"):
            members = [i for i in range(10) if strata[i] == name]
            for label in sorted({clusters[i] for i in members}):
                stood = sum(clusters[i] == label for i in members)
                picked = clusters[rng.choice(members)]  # in proportion to size
                drawn += [values[rng.choice([i for i in members if clusters[i] == picked])] for _ in range(stood)]
        means.append(np.mean(drawn))
    low, high = np.quantile(means, [0.1, 0.9])
    found = interval(values, clusters=clusters, strata=strata, statistic=np.mean, level=0.8, resamples=8000)
    assert found.low == pytest.approx(low, abs=0.2)
    assert found.high == pytest.approx(high, abs=0.2)


def test_identical_runs_inside_clusters_do_not_narrow_the_interval():
    values, clusters = clustered(6, 10, between=1.0, within=0.0)
    with_clusters, ignored = interval(values, clusters=clusters), interval(values)
    assert with_clusters.high - with_clusters.low > 2 * (ignored.high - ignored.low)
    alone = interval(values[::10], statistic=np.mean)
    grouped = interval(values, clusters=clusters, statistic=np.mean)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_unequal_clusters_do_not_shift_the_resamples():
    values, clusters = [0.0] * 12 + [1.0, 1.0, 2.0], [0] * 12 + [1, 2, 3]
    draws = []

    def kept(array, axis=-1):
        draws.append(np.mean(array, axis=axis))
        return draws[-1]

    interval(values, clusters=clusters, statistic=kept)
    assert np.mean(draws[0]) == pytest.approx(np.mean(values), abs=0.05)


def test_strata_take_the_difference_between_data_sets_out_of_the_interval():
    values, sets = [*RUNS[:10], *(RUNS[10:] - 0.5)], ["svhn"] * 10 + ["cifar10"] * 10
    with_strata, ignored = interval(values, strata=sets, statistic=np.mean), interval(values, statistic=np.mean)
    assert with_strata.high - with_strata.low < 0.1 * (ignored.high - ignored.low)
    assert with_strata.estimate == ignored.estimate


def test_a_cluster_label_counts_within_its_stratum():
    sets = ["svhn"] * 10 + ["mnist"] * 10
    shared, distinct = [i % 5 for i in range(20)], [i % 5 + 10 * (i // 10) for i in range(20)]
    assert close(interval(RUNS, clusters=shared, strata=sets), interval(RUNS, clusters=distinct, strata=sets))


def test_labels_may_be_arrays_strings_or_tuples():
    seeds = np.repeat([2, 10, 30, 40], 5)
    named = [("target", f"{seed:02d}") for seed in seeds]
    assert close(interval(RUNS, clusters=list(seeds)), interval(RUNS, clusters=seeds))
    assert interval(RUNS, clusters=named).n == 20


def test_many_runs_are_resampled_in_blocks(monkeypatch):
    monkeypatch.setattr(stats, "_BLOCK", 50)
    shapes = []

    def counted(array, axis=-1):
        shapes.append(array.shape)
        return np.mean(array, axis=axis)

    interval(RUNS, statistic=counted, resamples=5)
    assert shapes[:3] == [(2, 20), (2, 20), (1, 20)]


@pytest.mark.parametrize(
    ("clusters", "strata"), [([1, 1, 1], None), (None, ["a", "b", "c"]), ([1, 1, 1], ["a", "b", "b"])]
)
def test_without_a_repetition_there_are_no_ends(clusters, strata):
    found = interval([0.1, 0.2, 0.3], clusters=clusters, strata=strata)
    assert found.estimate == pytest.approx(0.2)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert str(found) == "0.200 (one cluster)"


def test_one_run_says_so_and_contains_nothing():
    found = interval([0.871])
    assert str(found) == "0.871 (one run)"
    assert not found.contains(0.871)
    assert json.loads(json.dumps(found.to_dict())) == {
        "estimate": 0.871, "low": None, "high": None, "n": 1, "level": 0.95,
    }  # fmt: skip


def test_interval_formats_contains_and_turns_into_a_dictionary():
    found = Interval(0.8712, 0.8659, 0.8751, 10, 0.95)
    assert str(found) == "0.871 [0.866, 0.875]"
    assert found.format(1) == "0.9 [0.9, 0.9]"
    assert [found.contains(x) for x in (0.8658, 0.8659, 0.87, 0.8751, 0.8752)] == [False, True, True, True, False]
    assert Interval(**found.to_dict()) == found


@pytest.mark.parametrize(("n", "documented"), [(3, 0.76), (5, 0.89)])
def test_documented_coverage(n, documented):
    samples = np.random.default_rng(1).normal(size=(300, n))
    covered = np.mean([interval(sample, resamples=400).contains(0) for sample in samples])
    assert covered == pytest.approx(documented, abs=0.075)  # three standard errors of 300 samples


# Pairs


def p_by_hand(differences, statistic):
    observed = statistic(differences)
    patterns = list(itertools.product((-1, 1), repeat=len(differences)))
    flipped = [statistic([s * d for s, d in zip(signs, differences, strict=True)]) for signs in patterns]
    above = sum(value >= observed - 1e-12 for value in flipped) / len(patterns)
    below = sum(value <= observed + 1e-12 for value in flipped) / len(patterns)
    return min(1.0, 2 * min(above, below))


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=8))
@quick
def test_p_value_counts_every_sign_pattern(differences):
    zeros = [0] * len(differences)
    assert paired_difference(differences, zeros, resamples=10).p_value == pytest.approx(
        p_by_hand(differences, cut_by_hand)
    )
    by_mean = paired_difference(differences, zeros, statistic=np.mean, resamples=10).p_value
    assert by_mean == pytest.approx(p_by_hand(differences, np.mean))


@pytest.mark.parametrize(("n", "by_mean", "by_iqm"), [(3, 0.25, 0.25), (5, 0.0625, 0.125), (7, 2 / 128, 4 / 128)])
def test_the_least_p_value_few_runs_can_reach(n, by_mean, by_iqm):
    sure = np.arange(n) + 10.0
    assert paired_difference(sure, np.zeros(n), statistic=np.mean, resamples=10).p_value == pytest.approx(by_mean)
    assert paired_difference(sure, np.zeros(n), resamples=10).p_value == pytest.approx(by_iqm)


def test_a_difference_from_itself_is_nothing():
    found = paired_difference(RUNS, RUNS)
    assert (found.interval.estimate, found.interval.low, found.interval.high) == (0, 0, 0)
    assert found.p_value == 1


def test_swapping_the_sides_turns_the_sign_only():
    ours, theirs = RUNS[:9], RUNS[9:18]
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert back.interval.estimate == pytest.approx(-there.interval.estimate)
    assert back.p_value == pytest.approx(there.p_value)


def test_the_paired_interval_is_that_of_the_differences():
    found = paired_difference(RUNS[:10], RUNS[10:], level=0.9, seed=2)
    assert found.interval == interval(RUNS[:10] - RUNS[10:], level=0.9, seed=2)
    assert str(found) == f"{found.interval}, p = {found.p_value:.2g}"


def test_clusters_flip_as_a_whole():
    differences = np.array([1.0, 3.0, 2.0, 4.0, 5.0, 7.0])
    found = paired_difference(differences, np.zeros(6), clusters=[0, 0, 1, 1, 2, 2])
    assert found.p_value == pytest.approx(p_by_hand([2.0, 3.0, 6.0], cut_by_hand)) == 0.25
    by_set = paired_difference(differences, np.zeros(6), clusters=[0, 0, 1, 1, 0, 0], strata=[0, 0, 0, 0, 1, 1])
    assert by_set.p_value == 0.25


def test_one_pair_or_one_cluster_shows_nothing():
    assert paired_difference([3.0], [1.0]).p_value == 1
    assert paired_difference([3.0, 4.0], [1.0, 1.0], clusters=[7, 7]).p_value == 1


def test_many_pairs_are_tested_by_random_flips():
    rng = np.random.default_rng(2)
    base = rng.normal(size=40)
    better = base + rng.normal(0.5, 1, 40)
    found = paired_difference(better, base, statistic=np.mean)
    assert found == paired_difference(better, base, statistic=np.mean)
    assert found.p_value == pytest.approx(reference.ttest_rel(better, base).pvalue, abs=0.01)


def test_ratios_are_taken_by_pair():
    lazy, target = np.array([0.8, 0.7, 0.9, 0.6]), np.array([0.9, 0.8, 1.0, 0.75])
    assert ratio_interval(lazy, target, seed=1) == interval([a / b for a, b in zip(lazy, target, strict=True)], seed=1)
    assert ratio_interval(target, target).high == 1
    assert close(ratio_interval(lazy, target, clusters=[0, 0, 1, 1]), interval(lazy / target, clusters=[0, 0, 1, 1]))


def test_binomial_standard_error_is_that_of_counted_answers():
    assert binomial_standard_error(0.3, 50) == pytest.approx(reference.binom(50, 0.3).std() / 50)
    assert binomial_standard_error(1.0, 50) == 0


# Bad input


@pytest.mark.parametrize("function", [interquartile_mean, interval])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "values are empty"),
        ([0.1, float("nan")], "values hold nan at position 1"),
        ([float("inf"), 0.1], "values hold inf at position 0"),
        (["much"], r"values are not all numbers: \['much'\]"),
        ([[1.0], [1.0, 2.0]], "values are not all numbers"),
    ],
)
def test_bad_values(function, values, message):
    with pytest.raises(StatsError, match=message):
        function(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0}, "level 0 is no confidence level"),
        ({"level": 95}, "level 95 .* between 0 and 1"),
        ({"level": float("nan")}, "level nan"),
        ({"resamples": 0}, "resamples is 0: give at least 1"),
        ({"clusters": [1, 2]}, "clusters has 2 entries and values 3"),
        ({"strata": ["a"] * 4}, "strata has 4 entries and values 3"),
        ({"clusters": [1.0, 2.0, float("nan")]}, "clusters hold NaN"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(StatsError, match=message):
        interval([1, 2, 3], **options)
    with pytest.raises(StatsError, match=message):
        paired_difference([1, 2, 3], [0, 0, 0], **options)


def test_a_table_is_no_flat_sequence():
    with pytest.raises(StatsError, match=r"values have shape \(2, 2\): give a flat sequence"):
        interval([[1, 2], [3, 4]])


def test_bad_pairs():
    with pytest.raises(StatsError, match="a has 2 entries and b 1"):
        paired_difference([1, 2], [1])
    with pytest.raises(StatsError, match="numerator has 1 entries and denominator 2"):
        ratio_interval([1], [1, 2])
    with pytest.raises(StatsError, match="denominator holds 0 at position 1"):
        ratio_interval([1, 2], [1, 0])
    with pytest.raises(StatsError, match="b hold nan"):
        paired_difference([1, 2], [1, float("nan")])


def test_bad_accuracies():
    with pytest.raises(StatsError, match=r"accuracy 87.1 is not a share: give one from 0 to 1, not a percentage"):
        binomial_standard_error(87.1, 100)
    with pytest.raises(StatsError, match="accuracy nan"):
        binomial_standard_error(float("nan"), 100)
    with pytest.raises(StatsError, match="examples is 0"):
        binomial_standard_error(0.5, 0)


def test_every_message_is_one_line():
    for call in (lambda: interval(np.full((50, 50), "x")), lambda: ratio_interval(np.ones(400), np.zeros(400))):
        with pytest.raises(StatsError) as caught:
            call()
        assert "\n" not in str(caught.value)
