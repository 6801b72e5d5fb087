"""The studies of joint training: run tables, one computed run of each, what is made of records."""

import numpy as np
import pytest
import torch

from condcomp_lib import published, studies
from condcomp_lib.joint_training import build_jointly
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import joint, joint_results, joint_search, joint_switches, joint_time
from condcomp_lib.studies.joint_results import DENSE, OURS, PAPER

FAMILY = ("joint", "joint-search", "joint-switches", "joint-first", "joint-time")


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "artefacts")


def test_the_family_is_run_by_one_command():
    assert studies.family("joint") == list(FAMILY)


def test_every_published_network_is_in_the_table_with_three_seeds():
    seeds = {}
    for spec in joint.specs("paper"):
        settings = spec.settings
        key = (settings["dataset"], settings["architecture"], settings["method"])
        seeds.setdefault(key, set()).add(settings["target_seed"])
    assert all(seeds[key] == {0, 1, 2} for key in joint_results.IDS)
    rows = [id for id in published.load() if id.startswith(("Ff", "Fs42.0", "Ds4.01", "Ds4.02"))]
    assert sorted([*joint_results.IDS.values(), "Fs42.04"]) == sorted(rows)  # the last one by `joint_time`


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_every_block_network_is_also_trained_by_todays_means_with_a_control(profile):
    found = {spec.settings["architecture"]: spec.settings for spec in joint.specs(profile)
             if spec.settings["method"] == OURS}  # fmt: skip
    assert {architecture for _, architecture in joint.BLOCKS[profile]} <= set(found)
    assert all(settings["control"] for settings in found.values())


def test_weights_of_sums_are_those_of_means_over_the_papers_minibatches():
    assert 128 * joint.TEXT["lambda_s"] == 128 * joint.TEXT["lambda_v"] == 200
    assert joint.TEXT["network_rate"] / 128 == pytest.approx(1e-3)
    assert joint.TEXT["learning_rate"] / 128 == pytest.approx(5e-5)
    assert joint.UNITS["network_rate"] / 128 == pytest.approx(0.01 / 20)
    for spec in joint.specs("paper"):
        settings = spec.settings
        if settings["method"] == PAPER and settings["block"] > 1:
            known = joint.TEXT if settings["dataset"] == "mnist" else joint.ADAM
            assert all(settings["training"][name] == value for name, value in known.items())


def run(name, wanted, store):
    study = studies.get(name)
    spec = next(spec for spec in study.specs("quick") if wanted(spec.settings))
    brief = {**spec.settings, "repeats": 2}
    if "training" in brief:
        brief["training"] = {**brief["training"], "epochs": 2}
    return study.compute(RunSpec(spec.study, spec.recipe, brief), store)


def test_a_network_has_its_control_of_equal_compute_and_its_pictures(store):
    found = run("joint", lambda s: s["method"] == OURS and s["architecture"] == "48-32", store)
    result = found.result
    assert 0 < result["activity"] < 1
    width = result["control_width"]
    adds = 64 * width + width * width + width * 10
    step = 64 + 2 * width + 10  # what one more neuron in both layers costs
    assert abs(adds - result["multiply_adds"]) <= step
    assert found.arrays["sigma"].shape == found.arrays["set"].shape == (10, 12)  # two gates of six bits
    assert found.arrays["gate"].shape == (6, 1, 8, 8)
    assert len(result["curve"]["accuracy"]) == 2


def test_a_dense_net_is_tested_in_full(store):
    found = run("joint", lambda s: s["method"] == DENSE, store)
    assert found.result["activity"] == found.result["compute"] == 1
    assert found.arrays is None


def test_a_control_learns_as_long_from_pictures_moved_as_much():
    kind, way = {"dataset": "digits", "architecture": "48-32", "block": 8}, {**joint.MOVED, "tau": 0.25, "epochs": 7}
    settings = joint.spec_of(kind, OURS, way, 3).settings
    lazy = build_jointly(joint.network_spec(settings), studies.dataset("digits"), torch.Generator())
    control = joint.control_spec(settings, lazy, 1000).settings
    assert (control["max_epochs"], control["augment"], control["seed"]) == (7, 2, 3)
    assert control["estimator"] == "dense"


@pytest.mark.parametrize("dense", [True, False])
def test_a_run_of_the_search_is_tested_and_timed(store, dense):
    found = run("joint-search", lambda s: (s["method"] == DENSE) == dense, store)
    assert found.result["us"] > 0
    assert 0 < found.result["error"] < 1


def test_the_search_draws_from_the_declared_space():
    space = joint_search.SPACE["svhn"]
    rows = joint_search.drawn("paper")
    conditional = [row for row in rows if row[1] != DENSE]
    assert len(conditional) == joint_search.SEARCHED["paper"] >= 12
    for kind, _, training in conditional:
        first, second = map(int, kind["architecture"].split("-"))
        assert (first, second, kind["block"]) in {(a, b, c) for a in space["first"] for b in space["second"]
                                                  for c in space["block"]}  # fmt: skip
        assert {training["network_rate"], training["learning_rate"]} <= set(space["rate"])
        assert all(training[name] in space[name] for name in ("tau", "lambda_s", "lambda_v"))


def test_every_switch_differs_from_its_base_in_what_it_says():
    ways = joint_switches.ways()
    for name, own in joint_switches.SWITCHES.items():
        base = ways[joint_switches.base_of(name)]
        changed = {key for key in {*ways[name], *base} if ways[name].get(key) != base.get(key)}
        assert changed <= set(own)
        assert changed


def test_a_switch_is_trained_and_tested(store):
    found = run("joint-switches", lambda s: s["method"] == joint_switches.SGD, store)
    assert 0 < found.result["error"] < 1


@pytest.mark.parametrize("method", [PAPER, OURS])
def test_a_pass_has_both_batches_and_its_ratios(store, method):
    found = run("joint-time", lambda s: s["part"] == joint_time.PASS and s["method"] == method, store)
    for batch in ("one", "per-example"):
        assert set(found.result[batch]["us"]) == {"lazy", "masked", *joint_time.ENGINES}
        low, high = found.result[batch]["over_masked"][1:]
        assert 0 < low <= high


def test_sampled_masks_are_the_ones_that_are_timed(store):
    settings = next(s.settings for s in joint.specs("quick") if s.settings["method"] == PAPER)
    data = studies.dataset("digits")
    lazy = build_jointly(joint.network_spec(settings), data, torch.Generator().manual_seed(0))
    found = lazy.evaluate(torch.from_numpy(data.test.x))
    call = joint_time.fast_pass(lazy, found.mask, data.test.x, "per-example", 50)
    scores, mask = call(1)
    np.testing.assert_array_equal(mask, found.mask[50:100].numpy())
    np.testing.assert_allclose(scores, found.scores[50:100].detach().numpy(), atol=1e-4)


def test_steps_of_both_nets_are_timed(store):
    found = run("joint-time", lambda s: s["part"] == joint_time.STEP, store)
    assert found.result["conditional_ms"] > 0
    assert found.result["over_dense"][0] > 0


def test_the_product_takes_less_memory_than_the_jacobian_and_says_the_same():
    found = joint_time.gradient_memory(64, 32, 40)
    assert found["difference"] < 1e-5
    assert found["jacobian_mb"] > 4 * 40 * 64 * 32 / 1e6 > found["product_mb"]


@pytest.fixture
def made(tmp_path):
    """Records of the paper's run table with made-up results: seed s of a network gets 10 + s (its control 13 + 2s)
    percent wrong."""
    store, found = RunStore(tmp_path / "made"), []
    for spec in joint.specs("paper"):
        settings, seed = spec.settings, spec.settings["target_seed"]
        layers = settings["architecture"].count("-") + 1
        curve = {"accuracy": [0.5, 0.6], "activity": [[0.1] * layers, [0.1 * (2 + seed - i) for i in range(layers)]],
                 "entropy": [[0.5] * layers, [0.25] * layers], "epoch": 2}  # fmt: skip
        result = {"error": (10 + seed) / 100, "activity": 0.2, "activity_by_layer": [0.2] * layers, "compute": 0.3,
                  "multiply_adds": 1e5, "unanswered": 0.0, "curve": curve}  # fmt: skip
        if settings["control"]:
            result |= {"control_error": (13 + 2 * seed) / 100, "control_width": 30}
        found.append(store.obtain(spec, lambda _, result=result: Outcome(result, None, {})))
    return found


def test_every_fully_connected_number_is_answered(made):
    found = {answer.id for answer in joint_results.answers(made)}
    wanted = {id for id in published.load() if id.startswith(("Ff", "Fs42", "Ds"))}
    # by `blocks`, `joint_time` and, the dense nets on MNIST, `start`
    assert wanted - found == {"Ds4.06", "Fs42.04", "Ds4.01", "Fs42.02", "Fs42.03"}


def test_answers_have_the_unit_of_the_published_number(made):
    found = {answer.id: answer for answer in joint_results.answers(made)}
    assert found["Fs42.01"].ours.estimate == pytest.approx(11)  # percent
    assert found["Ff2.01"].ours.estimate == pytest.approx(0.11)  # a share


def test_claims_pair_networks_with_controls_and_dense_nets_of_the_same_seed(made):
    found = {claim.id: claim for claim in joint_results.claims(made)}
    control = found["joint.mnist.256.control"]
    assert control.interval.estimate == pytest.approx(4)  # 3 + seed
    assert control.verdict == "holds"
    assert found["joint.mnist.dense32.todays"].interval.estimate == pytest.approx(0)
    assert found["joint.mnist.256.error"].verdict == "refuted"
    assert found["joint.cifar10.640-640.active"].verdict == "refuted"
    rise = found["joint.units.layers"]  # both layers start at 10%; the first ends ten points above the second
    assert rise.interval.estimate == pytest.approx(10)


def test_tables_have_the_papers_number_beside_each_row(made):
    rows = {(row["network"], row["method"]): row for row in joint_results.table(made, "cifar10")}
    assert rows["10+10 blocks of 64", PAPER]["published error, %"] == "49.7"
    assert rows["10+10 blocks of 64", OURS]["published error, %"] == ""
    assert rows["dense 480-480", ""]["published error, %"] == "49.7"
    assert rows["10+10 blocks of 64", OURS]["dense of equal compute, %"].startswith("15.00")


def test_figure_data_hold_every_run(made):
    points = joint_results.errors(made, "svhn")
    assert len(points[PAPER]) == len(points[OURS]) == 9
    assert len(points["dense"]) == 18  # three nets and three controls, three seeds each
    assert len(points["published, conditional"]) == len(points["published, dense"]) == 3


def test_sweeps_are_ordered_by_weight_and_pair_seeds(tmp_path):
    store, found = RunStore(tmp_path / "made"), []
    for spec in joint_search.specs("paper"):
        training = spec.settings["training"]
        weight = training.get("lambda_s", 0.0)
        curve = {"accuracy": [0.2, 0.3], "entropy": [[0.3], [0.2 - 0.01 * training.get("lambda_v", 0.0)]]}
        result = {"error": 0.5, "activity": 1 / (1 + weight), "multiply_adds": 1e5, "us": 3.0, "curve": curve}
        found.append(store.obtain(spec, lambda _, result=result: Outcome(result, None, {})))
    weights, values = joint_search.swept(found, joint_search.SWEEP_S)
    assert weights == sorted(weights)
    assert values["active"].shape == (joint_search.SWEPT["paper"][-1], len(weights))
    judged = {claim.id: claim for claim in joint_search.claims(found)}
    assert judged["joint.sweep.lambda_s.activity"].verdict == "holds"
    assert judged["joint.sweep.lambda_v.entropy"].verdict == "holds"
    assert judged["joint.sweep.lambda_v.error"].verdict == "undecided"


def test_dense_first_is_tested_beside_its_control_of_equal_compute(store):
    study = studies.get("joint-first")
    settings = dict(study.specs("quick")[0].settings)
    settings |= {"max_epochs": 1, "target_training": {"batch": 32, "epochs": 2, "learning_rate": 1e-3}}
    result = study.compute(RunSpec("joint-first", 1, settings), store).result
    assert all(0 < result[name] < 1 for name in ("error", "target_error", "control_error", "activity", "compute"))
    width = result["control_width"]
    assert abs(64 * width + width * width + 10 * width - result["multiply_adds"]) <= 64 + 2 * width + 10
