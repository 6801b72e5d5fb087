"""Target networks and their training: costs by brute force, seeds, the artefact cache."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condcomp_lib import datasets
from condcomp_lib.datasets import Split
from condcomp_lib.errors import UsageError
from condcomp_lib.fitting import SCHEDULES, TrainingError
from condcomp_lib.runs import RunStore
from condcomp_lib.targets import MLP, hidden_widths, multiply_adds
from condcomp_lib.training import accuracy, obtain_target, predict, target_spec


@pytest.fixture(scope="module")
def data():
    return datasets.load("digits")


def small(**settings):
    return target_spec("digits", "12", **{"target_seed": 0, "epochs": 2, "batch": 64, **settings})


@given(st.lists(st.integers(1, 6), min_size=3, max_size=5), st.data())
def test_multiply_adds_equal_a_brute_force_count(widths, draw):
    kept = [draw.draw(st.integers(0, width)) for width in widths[1:-1]]
    sides = [widths[0], *kept, widths[-1]]
    counted = [sum(1 for _ in range(a) for _ in range(b)) for a, b in itertools.pairwise(sides)]
    shares = [k / width for k, width in zip(kept, widths[1:-1], strict=True)]
    assert multiply_adds(widths, shares) == pytest.approx(counted)


def test_a_share_for_each_hidden_layer_is_needed():
    with pytest.raises(UsageError, match="2 hidden layers need as many shares, not 1"):
        multiply_adds([4, 3, 3, 2], [0.5])


@pytest.mark.parametrize("name", ["", "3x", "x3", "0x5", "3x800x2", "-3", "1-0", "relu", "3 x 800"])
def test_a_name_that_is_no_architecture_is_refused(name):
    with pytest.raises(UsageError, match="unknown architecture"):
        hidden_widths(name)


def test_an_unknown_schedule_lists_the_known_ones():
    with pytest.raises(UsageError, match="unknown schedule 'linear'; known: constant, cosine"):
        small(schedule="linear")


def test_the_cosine_schedule_falls_from_one_to_zero():
    factor = SCHEDULES["cosine"](100)
    assert factor(0) == 1
    assert factor(50) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0)
    assert all(factor(step) > factor(step + 1) for step in range(100))


def test_bad_networks_are_refused():
    with pytest.raises(UsageError, match="every width must be at least 1"):
        MLP(4, (3, 0), 2)
    with pytest.raises(UsageError, match="unknown activation 'gelu'; known: relu, tanh"):
        MLP(4, (3,), 2, "gelu")


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_network_equals_a_loop_over_its_layers(activation):
    net = MLP(5, (4, 3), 2, activation)
    x = torch.randn(7, 5)
    expected = x.numpy()
    for layer in net.linears[:-1]:
        expected = expected @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        expected = np.maximum(expected, 0) if activation == "relu" else np.tanh(expected)
    expected = expected @ net.linears[-1].weight.detach().numpy().T + net.linears[-1].bias.detach().numpy()
    np.testing.assert_allclose(net(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_training_is_a_function_of_the_seed_and_leaves_the_global_generator_alone(data, tmp_path):
    before = torch.get_rng_state()
    outcomes = [obtain_target(small(), data, RunStore(tmp_path / name))[1] for name in "ab"]
    assert torch.equal(torch.get_rng_state(), before)
    assert outcomes[0].result == outcomes[1].result
    for name, array in outcomes[0].arrays().items():
        np.testing.assert_array_equal(array, outcomes[1].arrays()[name])
    other = obtain_target(small(target_seed=1), data, RunStore(tmp_path / "a"))[1]
    assert other.result["learning_curve"] != outcomes[0].result["learning_curve"]


def test_a_trained_target_comes_from_the_cache_and_predicts_as_recorded(data, tmp_path, monkeypatch):
    store = RunStore(tmp_path / "artefacts")
    _, record = obtain_target(small(), data, store)
    monkeypatch.setattr("condcomp_lib.training.train_target", lambda *given: pytest.fail("trained again"))
    model, again = obtain_target(small(), data, store)
    assert again == record
    assert not model.training
    assert accuracy(model, data.valid) == record.result["valid_accuracy"]
    assert accuracy(model, data.test) == record.result["test_accuracy"]
    assert torch.equal(
        predict(model, torch.from_numpy(data.test.x), batch=7), predict(model, torch.from_numpy(data.test.x))
    )


def test_early_stopping_keeps_the_best_epoch(data, tmp_path):
    spec = small(epochs=30, patience=2, learning_rate=0.03)
    result = obtain_target(spec, data, RunStore(tmp_path))[1].result
    curve = result["learning_curve"]
    assert result["epochs"] == len(curve)
    assert result["valid_accuracy"] == max(curve) == curve[result["best_epoch"] - 1]
    assert len(curve) == 30 or len(curve) - result["best_epoch"] == 2


def test_a_loss_that_is_no_number_stops_training_and_stores_nothing(data, tmp_path):
    broken = dataclasses.replace(data, train=Split(np.full_like(data.train.x, np.nan), data.train.y))
    store = RunStore(tmp_path)
    said = r"nan at epoch 1, step 0; the weights after epoch 0 are kept; lower the learning rate \(0.001\)"
    with pytest.raises(TrainingError, match=said):
        obtain_target(small(), broken, store)
    assert store.get(small()) is None
