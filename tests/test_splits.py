"""The studies `partitioning-splits` and `partitioning-ladder`: what their runs hold, and how they are summarised."""

import numpy as np
import pytest
import torch

from condcomp_lib import datasets, studies
from condcomp_lib.partitions import Partition
from condcomp_lib.runs import Record, RunStore
from condcomp_lib.studies import partition_search, partitioning_ladder, partitioning_splits, split_results, targets
from condcomp_lib.targets import multiply_adds
from condcomp_lib.training import obtain_target

TRIED = ("random", "ucb1", "contextual", "gumbel", "always-on", "local search")


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    return RunStore(tmp_path_factory.mktemp("artefacts"))


@pytest.fixture(scope="module")
def records(artefacts):
    specs = [spec for spec in partitioning_splits.specs("quick") if spec.settings["partitioner"] in TRIED]
    found = []
    for spec in specs:
        outcome = partitioning_splits.compute(spec, artefacts)
        found.append(Record(spec, outcome.result, {"uses": outcome.uses}))
    return found


@pytest.fixture(scope="module")
def ladder(artefacts):
    return [
        Record(spec, partitioning_ladder.compute(spec, artefacts).result, {})
        for spec in partitioning_ladder.specs("quick")
    ]


def test_a_family_is_a_study_and_those_named_after_it():
    assert studies.family("partitioning") == ["partitioning", "partitioning-splits", "partitioning-ladder"]
    assert studies.family("targets") == ["targets"]
    assert studies.family("all") == list(studies.NAMES)


def test_the_run_table_holds_every_partitioner_on_the_target_of_section_5_2():
    settings = [spec.settings for spec in partitioning_splits.specs("paper")]
    own = [s for s in settings if (s["pretraining"], s["rescale"]) == ("dropout-uniform", "activity")]
    runs = {name: set() for name in partitioning_splits.PARTITIONERS}
    for s in own:
        runs[s["partitioner"]].add((s["target_seed"], s["policy_seed"]))
    for name, seeds in runs.items():
        assert len(seeds) == (3 if name in partitioning_splits.ONCE else 6), name


def test_all_ways_of_a_partitioner_share_its_partition_and_differ_in_the_policy(records):
    for name in TRIED[1:]:
        own = {split_results.way_of(r): r for r in records if r.spec.settings["partitioner"] == name}
        assert len({r.provenance["uses"]["partition"]["name"] for r in own.values()}) == 1
        sizes = [r.result["group_sizes"] for r in own.values()]
        assert sizes[0] == sizes[1] == sizes[2]
        policies = {way: r.provenance["uses"]["policy"]["name"] for way, r in own.items()}
        assert policies["as published"] == policies["held to 25%"] != policies["led to 25%"]


def test_a_search_is_a_function_of_its_seeds(artefacts):
    data = datasets.load("digits")
    for name in ("contextual", "gumbel", "local search", "spectral"):
        spec = next(s for s in partitioning_splits.specs("quick") if s.settings["partitioner"] == name)
        target, _ = obtain_target(targets.target_of(spec.settings), data, artefacts)
        one, other = (partition_search.searched(spec.settings, target, data) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one[0].membership, other[0].membership, strict=True))
        assert one[1] == other[1]


def test_trials_are_recorded_as_section_5_2_does(records):
    for name in ("ucb1", "contextual"):
        record = next(r for r in records if r.spec.settings["partitioner"] == name and "trials" in r.result)
        rows = record.result["trials"]
        assert len(rows) == record.spec.settings["search"]["trials"]
        for row in rows:
            assert 0 < row["worth"] <= 1
            assert 0 < row["activity"] <= 1
            assert row["mean_size"] == pytest.approx(128 / 16)
            assert row["largest_share"] * 128 == pytest.approx(round(row["largest_share"] * 128))
        tracked = split_results.trajectories(records, partitioning_splits.DIGITS)[name]
        assert tracked["worth"].shape == tracked["ratio"].shape == (1, len(rows))
        assert split_results.tracked_at([record], 1, "worth")(record.result) == rows[1]["worth"]
        assert split_results.tracked_at([record], len(rows), "worth") is None


def test_held_and_led_runs_evaluate_a_quarter_and_balanced_ones_have_equal_groups(records):
    for record in records:
        if split_results.way_of(record) != "as published":
            assert record.result["valid_activity"] == pytest.approx(0.25, abs=0.02)
        if record.spec.settings["partitioner"] == "always-on":
            assert set(record.result["group_sizes"]) == {8}


def test_always_on_group_is_always_on(records):
    for record in records:
        if record.spec.settings["partitioner"] == "always-on":
            assert record.result["group_firing"][0] == 1


def test_the_table_compares_with_the_random_split_of_the_same_seeds(records):
    rows = {row["partitioner"]: row for row in split_results.summary(records, partitioning_splits.DIGITS)}
    for name in TRIED:
        lazy, random = (
            next(r for r in records if r.spec.settings["partitioner"] == n and split_results.way_of(r) == "led to 25%")
            for n in (name, "random")
        )
        gain = rows[name]["led to 25%: over random"]
        if name == "random":
            assert gain == ""
        else:
            difference = lazy.result["accuracy_ratio"] - random.result["accuracy_ratio"]
            assert gain.estimate == pytest.approx(difference)


def test_one_target_claims_nothing(records, ladder):
    assert partitioning_splits.claims(records) == []
    assert partitioning_ladder.claims(ladder) == []


def test_the_published_trajectory_stands_where_the_paper_puts_it():
    track = partitioning_splits.published_track(partitioning_splits.PAPER, "activity")
    assert track == {0: 35, 1: 54.3, 15: 46.94}
    ratio = partitioning_splits.published_track(partitioning_splits.SMALL, "ratio")
    assert ratio == pytest.approx({0: 0.273, 1: 27.96 / 93.32, 10: 48.78 / 93.32})


def test_the_even_budget_of_equal_compute_costs_what_the_uneven_one_does():
    for hidden in ((800, 800, 800), (64, 64)):
        asked = partitioning_ladder.budgets(hidden, 100, 10)
        even, uneven, same = asked.values()
        assert np.mean(even) == np.mean(uneven) == pytest.approx(0.25)
        widths = [100, *hidden, 10]
        assert sum(multiply_adds(widths, same)) == pytest.approx(sum(multiply_adds(widths, uneven)))
        assert len(set(same)) == 1


def test_rungs_hold_their_budget_in_every_layer(ladder):
    for record in ladder:
        rungs = record.result["rungs"]
        expected = ["oracle"] if record.spec.settings["partitioner"] == partitioning_ladder.NEURONS else None
        assert {row["rung"] for row in rungs} == set(expected or partitioning_ladder.RUNGS)
        for row in rungs:
            assert row["activity"] == pytest.approx(np.mean(row["activity_by_layer"]))  # layers of equal width
            if row["rung"] == "blind":
                assert row["activity_by_layer"] == pytest.approx(row["asked"], abs=0.03)
        assert record.result["ratios"] == [row["ratio"] for row in rungs]


def test_the_ladder_names_the_step_that_loses_most(ladder):
    for row in partitioning_ladder.summary(ladder):
        steps = {
            "activity": 1 - row["oracle neurons"].estimate,
            "split": row["oracle neurons"].estimate - row["oracle groups"].estimate,
            "policy": row["oracle groups"].estimate - row["learned policy"].estimate,
        }
        assert steps[row["loses most"]] == max(steps.values())


def test_single_neurons_are_a_partition_of_their_own(ladder, artefacts):
    settings = ladder[0].spec.settings
    assert settings["partitioner"] == partitioning_ladder.NEURONS
    data = datasets.load("digits")
    target, _ = obtain_target(targets.target_of(settings), data, artefacts)
    split = partitioning_ladder.split_of(settings, target, data)
    assert isinstance(split, Partition)
    assert set(split.sizes.tolist()) == {1}
