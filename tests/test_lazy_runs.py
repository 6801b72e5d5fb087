"""What every study records of a lazy network: its equal-compute control between two dense nets, and its measures."""

import itertools

import pytest
import torch

from condcomp_lib import datasets
from condcomp_lib.lazy import LazyNetwork, evaluate
from condcomp_lib.partitions import make_partition
from condcomp_lib.policies import Policy, Sample, Threshold
from condcomp_lib.runs import RunStore
from condcomp_lib.studies import targets
from condcomp_lib.studies.lazy_runs import CONTROL_STEP, control_of, deciding, measure
from condcomp_lib.training import control_width, obtain_control, obtain_target, target_spec

STEP = CONTROL_STEP["digits"]
TINY = {"batch": 64, "epochs": 3, "learning_rate": 0.005}
SETTINGS = {"decision_draws": 1, "policy_seed": 0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return RunStore(tmp_path_factory.mktemp("artefacts"))


@pytest.fixture(scope="module")
def obtained(data, store):
    return obtain_target(target_spec("digits", "2x24", target_seed=0, **TINY), data, store)


@pytest.fixture
def control(obtained, data, store, monkeypatch):
    """`control_of` for a number of multiply-adds, with few epochs of training."""
    monkeypatch.setitem(targets.TRAINING, "digits", TINY)
    return lambda wanted, seed=0: control_of(*obtained, wanted, data, store, seed)


@pytest.fixture
def on_the_grid(obtained, data, store):
    """The record of the control that is this wide."""

    def found(width, seed=0):
        model, record = obtain_control(*obtained, dense(width), data, store, seed=seed, **TINY)
        assert model.hidden == (width, width)
        return record

    return found


def dense(width):
    """Multiply-adds of a net with two hidden layers of this width."""
    return sum(a * b for a, b in itertools.pairwise([64, width, width, 10]))


def cited(uses):
    return [uses["control_below"]["name"], uses["control_above"]["name"]]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_accuracy_is_interpolated_between_the_two_controls_next_to_the_wanted_cost(
    share, seed, control, on_the_grid, obtained
):
    below, above = on_the_grid(STEP, seed), on_the_grid(2 * STEP, seed)
    low, high = below.result["test_accuracy"], above.result["test_accuracy"]
    assert low != high
    wanted = dense(STEP) + share * (dense(2 * STEP) - dense(STEP))
    result, uses = control(wanted, seed)
    assert result["control_accuracy"] == pytest.approx(low + share * (high - low))
    assert result["control_ratio"] == pytest.approx(result["control_accuracy"] / obtained[1].result["test_accuracy"])
    assert result["control_width"] == control_width(obtained[0], wanted)
    assert uses == {"control_below": below.cite(), "control_above": above.cite()}


@pytest.mark.parametrize("width", [STEP, 2 * STEP, 4 * STEP])
def test_at_the_cost_of_a_control_its_accuracy_is_taken_exactly(width, control, on_the_grid):
    result, uses = control(dense(width))
    assert result["control_accuracy"] == on_the_grid(width).result["test_accuracy"]
    assert result["control_width"] == width
    assert cited(uses) == [on_the_grid(width).name, on_the_grid(width + STEP).name]


@pytest.mark.parametrize("wanted", [1, dense(1), dense(STEP) - 1])
def test_below_the_narrowest_control_its_accuracy_is_taken(wanted, control, on_the_grid):
    result, uses = control(wanted)
    assert result["control_accuracy"] == on_the_grid(STEP).result["test_accuracy"]
    assert cited(uses) == [on_the_grid(STEP).name, on_the_grid(2 * STEP).name]


def test_a_lazy_network_dearer_than_its_target_is_compared_with_wider_nets(control, on_the_grid, obtained):
    result, uses = control((dense(32) + dense(40)) / 2)
    assert obtained[0].hidden == (24, 24)
    accuracies = [on_the_grid(width).result["test_accuracy"] for width in (32, 40)]
    assert result["control_accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert cited(uses) == [on_the_grid(width).name for width in (32, 40)]


def test_controls_on_the_grid_are_trained_once_for_all_lazy_networks(control, data, store):
    control(dense(STEP))
    before = set(store.folder.glob(f"{data.checksum}/controls/*.json"))
    control((dense(STEP) + dense(2 * STEP)) / 2)
    assert set(store.folder.glob(f"{data.checksum}/controls/*.json")) == before


def lazy_network(target, scope="network", decision=None):
    partition = make_partition("random", target.hidden, 6, seeded(1), scope)
    policy = Policy(partition, 64, None, seeded(2))
    return LazyNetwork(target, partition, policy, decision or Sample(seeded(3)))


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_measures_of_decisions_that_are_not_random_equal_a_plain_count(scope, obtained, data):
    target, trained = obtained
    lazy = lazy_network(target, scope, Threshold((0.0, 0.0)))
    found = measure(lazy, SETTINGS, data, trained)
    for split, prefix in ((data.test, ""), (data.valid, "valid_")):
        evaluated = evaluate(lazy, torch.from_numpy(split.x))
        hits = (evaluated.scores.argmax(1) == torch.from_numpy(split.y)).double().mean().item()
        assert found[f"{prefix}accuracy"] == pytest.approx(hits)
        activity = lazy.partition.activity(evaluated.mask).mean().item()
        assert found[f"{prefix}activity"] == pytest.approx(activity)
        assert found[f"target_{prefix}accuracy"] == trained.result[f"{prefix or 'test_'}accuracy"]
    mask = evaluate(lazy, torch.from_numpy(data.test.x)).mask
    assert found["compute"] == pytest.approx(lazy.compute(mask))
    assert found["multiply_adds"] == lazy.cost(mask).total_multiply_adds
    assert found["bytes_share"] == lazy.cost(mask).total_bytes / lazy.target_cost().total_bytes
    assert found["group_sizes"] == lazy.partition.sizes.tolist()
    assert found["group_firing"] == mask.double().mean(0).tolist()


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("scope", ["network", "layer"])
def test_measures_are_consistent_with_one_another(scope, draws, obtained, data):
    target, trained = obtained
    lazy = lazy_network(target, scope)
    found = measure(lazy, {**SETTINGS, "decision_draws": draws}, data, trained)
    assert found["accuracy_ratio"] == found["accuracy"] / found["target_accuracy"]
    assert found["blind_ratio"] == found["blind_accuracy"] / found["target_accuracy"]
    assert 0 < found["activity"] < 1
    assert found["activity"] == pytest.approx(sum(found["activity_by_layer"]) / 2)
    assert found["blind_activity"] == pytest.approx(found["valid_activity"], abs=0.05)
    assert found["compute"] == pytest.approx(found["multiply_adds"] / lazy.target_cost().total_multiply_adds)
    again = measure(lazy_network(target, scope), {**SETTINGS, "decision_draws": draws}, data, trained)
    assert again == found


def test_a_lazy_network_that_evaluates_everything_is_its_target_and_costs_more(obtained, data):
    target, trained = obtained
    found = measure(lazy_network(target, decision=Threshold((-torch.inf,))), SETTINGS, data, trained)
    assert found["accuracy"] == found["blind_accuracy"] == trained.result["test_accuracy"]
    assert found["accuracy_ratio"] == found["activity"] == found["blind_activity"] == 1
    assert found["compute"] == pytest.approx(1 + 64 * 6 / dense(24))


def test_a_run_decides_as_its_settings_ask(obtained, data):
    lazy, x = lazy_network(obtained[0]), torch.from_numpy(data.valid.x)
    calibrated = deciding(lazy, {"decision": "calibrated", "activity_asked": 0.4}, data)
    assert lazy.partition.activity(evaluate(calibrated, x).mask).mean().item() == pytest.approx(0.4, abs=0.02)
    sampled = [deciding(lazy, {"decision": "sampled", "policy_seed": seed}, data) for seed in (0, 0, 1)]
    first, again, other = (evaluate(one, x).mask for one in sampled)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
