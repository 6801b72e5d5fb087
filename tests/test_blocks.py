"""The studies of time: their run tables, one timed row, what is compared, and rooflines."""

import copy
import dataclasses

import numpy as np
import pytest

from condcomp_lib import cli
from condcomp_lib.errors import CondcompError, UsageError
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import block_results, blocks, blocks_accuracy, policies

TINY = {"architecture": "24-16-16-5", "groups": 4, "scope": "network", "threads": 1, "dtype": "float32"}


def test_every_promised_row_is_measured_twice():
    repeats = {}
    for spec in blocks.specs("paper"):
        row = tuple(sorted((key, spec.settings[key]) for key in blocks.bars()[0]))
        repeats.setdefault(row, set()).add(spec.settings["repeat"])
    assert all(repeats[tuple(sorted(row.items()))] == {0, 1} for row in blocks.bars())


def test_every_bar_has_its_row():
    for _, row, _, _ in block_results.BARS:
        assert any(row.items() <= {**found}.items() for found in blocks.bars())


def test_trained_networks_are_those_of_the_study_of_policies():
    known = [spec.settings for spec in policies.specs("paper")]
    for spec in blocks_accuracy.specs("paper"):
        theirs = {key: value for key, value in spec.settings.items() if key not in blocks_accuracy.OWN}
        assert theirs in known


@pytest.mark.parametrize(
    ("batch", "mask", "activity"), [(1, "one", 0.25), (6, "per-example", 0.5), (6, "shared", 0.5), (6, "one", 1.0)]
)
def test_a_row_says_what_was_evaluated_and_how_long_it_took(batch, mask, activity):
    row = {**TINY, "batch": batch, "mask": mask, "activity_asked": activity}
    found = blocks.measure(row, 3, ("eager",))
    assert found["activity"] == pytest.approx(activity, abs=0.1)
    assert 0 < found["compute"] <= 1.3
    assert found["largest_error"] < 1e-4
    assert found["fastest"] == "eager"
    assert found["lazy_us"] > 0
    assert found["speedup_vs_fastest"][1] <= found["speedup_vs_fastest"][0] <= found["speedup_vs_fastest"][2]
    lazy = blocks.network(row)
    full = lazy.target_cost().total_multiply_adds + sum(gate.weight.numel() for gate in lazy.policy.gates)
    assert 0 < found["executed"] <= batch * full
    assert 0 < found["read"] <= blocks.lazy_bytes(lazy)


def test_what_no_machine_can_do_is_refused(monkeypatch):
    slow = blocks.timing.Machine(1.0, 1.0, 100)
    monkeypatch.setattr(blocks.timing, "machine", lambda buffer: slow)
    with pytest.raises(CondcompError, match="took less time than this machine needs at its best"):
        blocks.measure({**TINY, "batch": 1, "mask": "one", "activity_asked": 0.5}, 3, ("eager",))


def test_wrong_scores_are_no_measurement(monkeypatch):
    monkeypatch.setattr(blocks, "largest_error", lambda *_: 0.1)
    with pytest.raises(CondcompError, match=r"differ from the reference's by 1\.0e-01"):
        blocks.measure({**TINY, "batch": 1, "mask": "one", "activity_asked": 0.5}, 3, ("eager",))


def test_the_fastest_dense_engine_and_control_are_the_rivals():
    times = {"lazy": [10.0, 20, 10], "a": [40.0, 80, 44], "b": [30.0, 60, 36], "control, a": [12.0, 26, 10],
             "masked": [90.0, 180, 90], "lazy at 100%": [60.0, 60, 60]}  # fmt: skip
    found = block_results.compared({name: np.array(values) for name, values in times.items()}, ("a", "b"))
    assert found["fastest"] == "b"
    assert found["speedup_vs_fastest"][0] == 3
    assert found["speedup_vs_control"][0] == pytest.approx(1.2)
    assert found["speedup_vs_masked"][0] == 9
    assert found["full_vs_fastest"][0] == 0.6
    assert found["dense_us"] == {"a": 44, "b": 36}


def stored(tmp_path, **machine):
    """Two runs of one row on one processor, the second with another machine's figures."""
    result = {"executed": 100.0, "read": 10.0, "lazy_us": 1e6, "processor": "P", "activity": 0.25,
              "machine": {"multiply_adds": 200.0, "bandwidth": 100.0, "buffer": 8},
              "speedup_vs_fastest": [2.0, 1.9, 2.1]}  # fmt: skip
    other = copy.deepcopy(result)
    other["machine"] |= machine
    other["speedup_vs_fastest"] = [1.5, 1.4, 1.6]
    settings = {**TINY, "batch": 1, "mask": "one", "activity_asked": 0.25, "repeats": 21}
    store = RunStore(tmp_path)
    specs = [RunSpec("toy", 1, {**settings, "repeat": repeat}) for repeat in (0, 1)]
    return [store.obtain(spec, lambda _, r=r: Outcome(r)) for spec, r in zip(specs, (result, other), strict=True)]


def test_a_roofline_is_the_best_that_was_measured_of_a_processor(tmp_path):
    records = stored(tmp_path, multiply_adds=400.0)
    assert [block_results.roofline_share(record, records) for record in records] == [0.25, 0.25]
    elsewhere = dataclasses.replace(records[1], result={**records[1].result, "processor": "Q"})
    narrower = dataclasses.replace(records[1], result={**records[1].result, "lanes": 8})
    assert block_results.roofline_share(records[0], [records[0], narrower]) == 0.5
    assert block_results.roofline_share(records[0], [records[0], elsewhere]) == 0.5


def test_the_slower_run_of_a_row_is_what_is_shown(tmp_path):
    records = stored(tmp_path)
    assert block_results.speedup(records).estimate == 1.5
    assert block_results.by_sharing(records)["one example"].tolist() == [[25.0, 1.5]]
    assert block_results.surface(records)[2].tolist() == [[1.5]]


def test_dense_nets_of_equal_time_lie_between_the_measured_ones():
    settings = {"target_seed": 0}
    result = {"lazy_us": 150.0, "dense_width_us": [50.0, 100.0], "dense_ratios": [0.9, 0.95], "fastest": "a",
              "dense_us": {"a": 200.0}, "moved_width_us": [100.0], "moved_ratios": [1.0]}  # fmt: skip
    made = RunSpec("toy", 1, settings)
    record = type("Made", (), {"spec": made, "result": result})()
    widest = type("Made", (), {"spec": made, "result": {"accuracy_ratio": 1.2}})()
    assert blocks_accuracy.at_equal_time(record, "dense", []) == pytest.approx(0.975)
    assert blocks_accuracy.at_equal_time(record, "moved", [widest]) == pytest.approx(1.1)
    result["lazy_us"] = 10.0
    assert blocks_accuracy.at_equal_time(record, "dense", []) == 0.9


def test_an_unknown_grid_lists_the_known_ones(monkeypatch, capsys):
    with pytest.raises(UsageError, match=r"^unknown grid 'all'; known: bars, full$"):
        blocks.grid("all")
    monkeypatch.setattr(cli.sys, "argv", ["condcomp", "bench", "blocks", "--grid", "all"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "unknown grid 'all'" in capsys.readouterr().err
