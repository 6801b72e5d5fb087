"""Dropout at fixed and at random rates: how rates are distributed, what is dropped, and what stays."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from condcomp_lib.errors import UsageError
from condcomp_lib.pretraining import (
    LITERAL_LEAST_KEEP,
    PENALTIES,
    PRETRAINING,
    activation_penalty,
    check,
    dropped,
    keep_rates,
    scores_and_hidden,
    scores_with_dropout,
)
from condcomp_lib.targets import MLP

RANDOM = ("dropout-uniform", "dropout-uniform-literal")
FIXED = ("none", "dropout-0.5")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rates(pretraining, eps, count=2000):
    rate = keep_rates(pretraining, eps, seeded())
    return np.array([rate(1, 1)[0] for _ in range(count)])


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.7])
def test_random_rates_are_uniform_from_eps_to_one(eps):
    found = rates("dropout-uniform", eps)
    assert eps <= found.min() < found.max() <= 1
    assert stats.kstest(found, stats.uniform(eps, 1 - eps).cdf).pvalue > 0.001
    assert stats.kstest(found, stats.uniform(0, 1).cdf).pvalue < 0.001


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.7])
def test_read_literally_the_rate_of_dropping_is_uniform_and_a_least_rate_is_kept(eps):
    found = rates("dropout-uniform-literal", eps)
    assert LITERAL_LEAST_KEEP <= found.min() < found.max() <= 1 - eps
    above = found[found > LITERAL_LEAST_KEEP]
    assert stats.kstest(above, stats.uniform(LITERAL_LEAST_KEEP, 1 - eps - LITERAL_LEAST_KEEP).cdf).pvalue > 0.001
    clipped = len(found) - len(above)
    assert stats.binomtest(clipped, len(found), LITERAL_LEAST_KEEP / (1 - eps)).pvalue > 0.001


def test_both_readings_turn_the_same_draws_into_rates():
    kept, literal = (rates(pretraining, 0.1, 50) for pretraining in RANDOM)
    np.testing.assert_array_equal(literal, np.maximum(1 - kept, LITERAL_LEAST_KEEP))


def test_eps_one_leaves_a_single_rate():
    assert set(rates("dropout-uniform", 1.0, 20)) == {1.0}
    assert set(rates("dropout-uniform-literal", 1.0, 20)) == {LITERAL_LEAST_KEEP}


def test_fixed_rates_draw_nothing():
    generator = seeded()
    before = generator.get_state()
    assert keep_rates("none", None, generator) is None
    rate = keep_rates("dropout-0.5", None, generator)
    assert rate(8, 3) == [0.5] * 3
    assert torch.equal(generator.get_state(), before)


@given(st.floats(0.05, 0.99), st.integers(0, 2**32))
def test_an_entry_is_dropped_or_divided_by_the_rate(keep, seed):
    h = torch.randn(8, 9, generator=seeded(seed))
    found = dropped(h, keep, seeded(seed + 1))
    torch.testing.assert_close(found, torch.where(found == 0, 0, h / keep))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_entries_are_kept_independently_with_the_rate_and_their_mean_stays(keep):
    draws, h = 3000, torch.linspace(-2, 3, 12)
    found = dropped(h.expand(draws, 12), keep, seeded()).double().numpy()
    kept = found != 0
    assert stats.binomtest(int(kept.sum()), kept.size, keep).pvalue > 0.001
    error = h.abs().numpy() * np.sqrt((1 - keep) / keep / draws)
    z = (found.mean(0) - h.numpy()) / error
    assert stats.chi2.sf((z**2).sum(), len(z)) > 0.001
    correlations = np.corrcoef(kept.T)[np.triu_indices(12, 1)] * np.sqrt(draws)
    assert stats.chi2.sf((correlations**2).sum(), len(correlations)) > 0.001


def test_keeping_everything_returns_the_same_tensor_and_draws_nothing():
    h, generator = torch.randn(3, 4), seeded()
    before = generator.get_state()
    assert dropped(h, 1, generator) is h
    assert dropped(h, 1.0, generator) is h
    assert torch.equal(generator.get_state(), before)


def test_the_gradient_reaches_kept_entries_only():
    h = torch.ones(50, 4, requires_grad=True)
    found = dropped(h, 0.25, seeded())
    found.sum().backward()
    assert torch.equal(h.grad, found.detach())
    assert set(h.grad.unique().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, float("nan")])
def test_a_rate_of_keeping_outside_its_range_is_refused(keep):
    with pytest.raises(UsageError, match=rf"^keep probability {keep} is outside \(0, 1\]$"):
        dropped(torch.ones(2, 2), keep, seeded())


@pytest.mark.parametrize("pretraining", RANDOM)
@pytest.mark.parametrize("eps", [None, 0, -0.1, 1.1, float("nan")])
def test_random_rates_need_eps_in_its_range(pretraining, eps):
    said = rf"^{pretraining} needs eps, the least rate, in \(0, 1\], not {eps}$"
    with pytest.raises(UsageError, match=said):
        check(pretraining, eps)
    with pytest.raises(UsageError, match=said):
        keep_rates(pretraining, eps, seeded())


@pytest.mark.parametrize("pretraining", FIXED)
def test_eps_where_no_rate_is_random_is_refused(pretraining):
    said = f"^eps=0.1 goes with random dropout rates only, not with '{pretraining}'$"
    with pytest.raises(UsageError, match=said):
        check(pretraining, 0.1)
    with pytest.raises(UsageError, match=said):
        keep_rates(pretraining, 0.1, seeded())


def test_an_unknown_pretraining_lists_the_known_ones():
    with pytest.raises(UsageError, match=f"^unknown pretraining 'dropout'; known: {', '.join(sorted(PRETRAINING))}$"):
        check("dropout", None)


@pytest.mark.parametrize("hidden", [(), (5,), (6, 5)])
def test_scores_at_rate_one_are_the_targets(hidden):
    target, x = MLP(4, hidden, 3), torch.randn(7, 4)
    assert torch.equal(scores_with_dropout(target, x, 1.0, seeded()), target(x))


def test_scores_follow_the_generator():
    target, x = MLP(4, (16, 16), 3), torch.randn(7, 4)
    first, second, other = (scores_with_dropout(target, x, 0.5, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def identity(layers, width=8):
    """A network whose hidden layers and scores repeat a positive input."""
    target = MLP(width, (width,) * layers, width)
    with torch.no_grad():
        for layer in target.linears:
            layer.weight.copy_(torch.eye(width))
            layer.bias.zero_()
    return target


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_every_hidden_layer_is_dropped_and_the_input_never(layers):
    x = torch.rand(1000, 8, generator=seeded()) + 1
    scores = scores_with_dropout(identity(layers), x, 0.5, seeded(1))
    kept = scores != 0
    torch.testing.assert_close(scores, x * kept * 2**layers)
    assert stats.binomtest(int(kept.sum()), kept.numel(), 0.5**layers).pvalue > 0.001


def test_scores_equal_a_loop_over_layers_with_the_same_draws():
    target, x = MLP(4, (6, 5), 3, "tanh"), torch.randn(7, 4)
    noise, h = seeded(), x
    for layer in target.linears[:-1]:
        h = dropped(torch.tanh(layer(h)), 0.3, noise)
    torch.testing.assert_close(scores_with_dropout(target, x, 0.3, seeded()), target.linears[-1](h))


def test_a_rate_for_each_layer_or_example_is_uniform_and_independent_of_the_others():
    layers = keep_rates("dropout-uniform-layer", 0.2, seeded())
    by_layer = np.array([layers(8, 3) for _ in range(2000)])
    examples = keep_rates("dropout-uniform-example", 0.2, seeded())
    first, *others = examples(2000, 3)
    assert all(other is first for other in others)
    assert first.shape == (2000, 1)
    for found in (*by_layer.T, first[:, 0].double().numpy()):
        assert stats.kstest(found, stats.uniform(0.2, 0.8).cdf).pvalue > 0.001
    assert abs(np.corrcoef(by_layer.T)[np.triu_indices(3, 1)]).max() < 0.1


def test_one_rate_for_a_minibatch_is_shared_by_its_layers():
    rate = keep_rates("dropout-uniform", 0.2, seeded())
    assert all(len(set(rate(8, 3))) == 1 for _ in range(5))


def test_every_example_is_dropped_at_its_own_rate():
    keep = torch.tensor([[0.1], [0.5], [1.0]])
    h = torch.ones(3, 20_000)
    found = dropped(h, keep, seeded())
    for row, rate in zip(found, keep[:, 0].tolist(), strict=True):
        torch.testing.assert_close(row, (row != 0) / torch.tensor(rate))
        assert stats.binomtest(int((row != 0).sum()), len(row), min(rate, 1.0)).pvalue > 0.001


def test_every_layer_is_dropped_at_its_own_rate():
    x = torch.rand(2000, 8, generator=seeded()) + 1
    scores = scores_with_dropout(identity(2), x, [0.5, 0.25], seeded(1))
    kept = scores != 0
    torch.testing.assert_close(scores, x * kept * 8)
    assert stats.binomtest(int(kept.sum()), kept.numel(), 0.125).pvalue > 0.001


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000))
def test_the_hoyer_measure_lies_between_one_neuron_and_all_and_knows_no_scale(width, examples, seed):
    h = torch.rand(examples, width, generator=seeded(seed), dtype=torch.float64) + 1e-3
    found = activation_penalty([h], "hoyer")
    assert 1 / width - 1e-9 <= found.item() <= 1 + 1e-9
    torch.testing.assert_close(activation_penalty([7 * h], "hoyer"), found)
    torch.testing.assert_close(activation_penalty([h, h], "hoyer"), 2 * found)


def test_activation_penalties_of_known_activations():
    h = torch.tensor([[1.0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]])
    assert activation_penalty([h], "l1").item() == pytest.approx(9 / 12)
    assert activation_penalty([h], "hoyer").item() == pytest.approx((1 / 4 + 1 + 0) / 3)


def test_activation_penalties_have_finite_gradients_where_no_neuron_fires():
    h = torch.zeros(2, 3, requires_grad=True)
    activation_penalty([h], "hoyer").backward()
    assert h.grad.isfinite().all()


def test_hidden_activations_are_those_of_the_network():
    target, x = MLP(4, (6, 5), 3), torch.randn(7, 4)
    scores, hidden = scores_and_hidden(target, x)
    assert torch.equal(scores, target(x))
    assert [tuple(h.shape) for h in hidden] == [(7, 6), (7, 5)]
    assert torch.equal(hidden[0], target.activation(target.linears[0](x)))


@pytest.mark.parametrize("pretraining", PENALTIES)
@pytest.mark.parametrize("coefficient", [-0.1, float("nan"), float("inf"), "much"])
def test_a_coefficient_that_is_no_number_of_at_least_0_is_refused(pretraining, coefficient):
    said = f"^the penalty's coefficient must be a number of at least 0, not {coefficient}$"
    with pytest.raises(UsageError, match=said):
        check(pretraining, None, {"coefficient": coefficient})


def test_unknown_settings_of_a_penalty_are_refused():
    with pytest.raises(
        UsageError, match=r"^unknown setting of the penalty 'flow' 'frm'; known: coefficient, form, normalised$"
    ):
        check("flow", None, {"coefficient": 1, "frm": "root"})
    with pytest.raises(UsageError, match=r"^unknown setting of the penalty 'hoyer' 'form'; known: coefficient$"):
        check("hoyer", None, {"coefficient": 1, "form": "root"})


def test_a_penalty_goes_with_its_pretrainings_only():
    for pretraining, penalty in (("none", {"coefficient": 1.0}), *((name, None) for name in PENALTIES)):
        with pytest.raises(UsageError, match=r"^a penalty with its coefficient goes with flow, l1, hoyer"):
            check(pretraining, None, penalty)


def test_an_unknown_activation_penalty_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"^unknown activation penalty 'l0'; known: hoyer, l1$"):
        activation_penalty([torch.ones(2, 2)], "l0")
