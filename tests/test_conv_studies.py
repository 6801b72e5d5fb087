"""The studies of convolutional policies: run tables, one computed run of each, what is made of records."""

from types import SimpleNamespace

import numpy as np
import pytest

from condcomp_lib import published, studies
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.partitions import cut_into_blocks
from condcomp_lib.policies import Policy, Threshold
from condcomp_lib.runs import RunSpec, RunStore
from condcomp_lib.studies import conv, conv_results, conv_time
from condcomp_lib.studies.conv_results import DENSE, LONGER, LONGEST, OURS, PAPER
from condcomp_lib.targets import build_target


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "artefacts")


def run(name, wanted, store):
    study = studies.get(name)
    spec = next(spec for spec in study.specs("quick") if wanted(spec.settings))
    settings = {**spec.settings, "training": {**spec.settings["training"], "epochs": 2}}
    return study.compute(RunSpec(spec.study, spec.recipe, settings), store)


def test_every_row_of_the_slides_is_in_the_table_with_two_seeds_trained_both_ways():
    seeds = {}
    for spec in conv.specs("paper"):
        key = tuple(spec.settings[name] for name in ("dataset", "architecture", "tau", "method"))
        seeds.setdefault(key, set()).add(spec.settings["target_seed"])
    assert all(found == {0, 1} for found in seeds.values())
    for method in (PAPER, OURS):
        rows = {conv_results.id_of(key) for key in seeds if key[0] == "cifar10" and key[3] in (method, DENSE)}
        assert rows >= {id for id in published.load() if id.startswith("Sconv")}


def test_a_conditional_net_from_a_trained_one_starts_from_the_dense_row_of_the_table():
    specs = [spec.settings for spec in conv.specs("paper")]
    dense = {(s["dataset"], s["architecture"]): s["training"] for s in specs if s["method"] == DENSE}
    for settings in specs:
        if "trained" in settings["network"]:
            assert settings["network"]["trained"] == dense[settings["dataset"], settings["architecture"]]
    assert {s["method"] for s in specs if "trained" in s["network"]} >= {OURS, LONGER}


def test_dense_nets_learn_at_least_as_long_as_those_that_they_are_compared_with():
    epochs = {}
    for spec in conv.specs("paper"):
        s = spec.settings
        if s["method"] in (DENSE, LONGER, LONGEST, OURS):
            whole = s["training"]["epochs"] + s["network"].get("trained", {}).get("epochs", 0)
            kind = "ours" if s["method"] == OURS else "dense"
            key = (s["dataset"], s["architecture"], kind)
            epochs[key] = max(epochs.get(key, 0), whole)
    for (dataset, architecture, kind), longest in epochs.items():
        if kind == "ours":
            assert epochs[dataset, architecture, "dense"] >= longest


def test_a_conditional_net_is_tested_and_pictured(store):
    found = run("conv", lambda s: s["method"] == OURS, store)
    filters = sum(conv_results.hidden_widths(conv.NETS["quick"]["digits"][0][0]))
    assert found.arrays["set"].shape == (10, filters)
    assert np.mean(found.arrays["set"]) == pytest.approx(found.result["activity"], abs=0.05)
    assert 0 < found.result["compute"] < 1
    narrow = found.result["control_filters"]
    assert all(0 < own < full for own, full in zip(narrow, conv_results.hidden_widths("conv 16-32/2"), strict=True))
    assert 0 < found.result["control_error"] < 1


def test_the_control_spends_as_many_multiply_adds_over_as_many_epochs():
    settings = next(spec.settings for spec in conv.specs("paper") if spec.settings["method"] == OURS)
    data = SimpleNamespace(shape=(3, 32, 32), classes=10)
    spec = conv.control_spec(settings, 3e6, data).settings
    control = build_target(spec["architecture"], (3, 32, 32), 10)
    adds = LazyNetwork(control, cut_into_blocks(control.hidden, 1), Policy(cut_into_blocks(control.hidden, 1), 3),
                       Threshold((0.0,) * 4)).target_cost().total_multiply_adds  # fmt: skip
    assert adds == pytest.approx(3e6, rel=0.05)
    assert (control.strides, spec["estimator"]) == (build_target(conv.DEEP, (3, 32, 32), 10).strides, "dense")
    assert spec["max_epochs"] == conv.DENSE_EPOCHS["cifar10"] + conv.MORE["cifar10"]
    assert spec["joint"]["network_rate"] == conv.ALONE["network_rate"]


def test_a_pass_is_timed_beside_dense_engines_at_both_batches(store):
    found = run("conv-time", lambda s: s["method"] == PAPER, store).result
    for batch in conv_time.BATCHES:
        estimate, low, high = found[batch]["over_dense"]
        assert 0 < low <= estimate <= high
        assert set(found[batch]["us"]) >= {"lazy", "masked", "eager"}


class Known:
    """A record of one conv net, with what its results are made from."""

    def __init__(self, method, tau, error, seed=0, dataset="cifar10", architecture=conv.DEEP, over=(2.0, 1.9, 2.1)):
        settings = {"dataset": dataset, "architecture": architecture, "tau": tau, "method": method, "repeats": 5,
                    "target_seed": seed, "policy_seed": seed}  # fmt: skip
        self.spec = RunSpec("conv", 1, settings)
        self.result = {"error": error, "activity": tau, "activity_by_layer": [tau] * 4, "compute": tau**2,
                       "control_error": error + 0.01,
                       **{batch: {"over_dense": list(over)} for batch in conv_time.BATCHES}}  # fmt: skip


ERRORS = {
    (DENSE, 1.0): (0.20, 0.21),
    (LONGER, 1.0): (0.19, 0.20),
    (LONGEST, 1.0): (0.195, 0.2),  # longer is not always better
    (OURS, 0.5): (0.192, 0.203),
    (PAPER, 0.5): (0.30, 0.31),
}
KNOWN = [Known(*key, error, seed) for key, errors in ERRORS.items() for seed, error in enumerate(errors)]


def test_a_conditional_net_is_compared_with_the_better_dense_net_seed_by_seed():
    row = next(row for row in conv_results.table(KNOWN, KNOWN[6:8]) if row["trained"] == OURS)
    assert row["more than dense, points"].startswith("0.2 ")  # to a tenth: 0.2 and 0.3 points
    claim = next(claim for claim in conv_results.claims(KNOWN) if claim.id.endswith(".error"))
    assert claim.interval.estimate == pytest.approx(0.25)
    assert claim.verdict == "holds"


def test_times_are_judged_by_the_slower_seed():
    slow = Known(OURS, 0.5, 0.2, 1, over=(1.2, 1.1, 1.3))
    found = {claim.id: claim for claim in conv_time.claims([KNOWN[6], slow])}
    assert len(found) == 2
    assert all(claim.interval.estimate == pytest.approx(1 / 1.2) for claim in found.values())
    assert {claim.verdict for claim in found.values()} == {"refuted"}


def test_answers_are_those_trained_as_published():
    found = {answer.id: answer for answer in conv_results.answers(KNOWN)}
    assert found["Sconv.01"].ours.estimate == pytest.approx(0.305)
    assert "by today's means 19.8" in found["Sconv.01"].note
    assert found["Sconv.05"].ours.estimate == pytest.approx(0.205)


def test_points_of_the_figure_are_those_of_the_runs_and_of_the_slides():
    found = conv_results.traded(KNOWN, KNOWN[6:8], "cifar10", "one")
    np.testing.assert_allclose(found[OURS], [[0.5, 19.2], [0.5, 20.3]])
    np.testing.assert_allclose(found[DENSE], [[1, 19], [1, 20]])
    assert found["published"].shape == (5, 2)
