"""The regularisers of faster-models against plain loops, where they vanish and which way they push."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from condcomp_lib.errors import UsageError
from condcomp_lib.sparsity import batch_loss, check_tau, example_loss, sparsity_loss, variance_loss

taus = st.floats(0.01, 1)


def probabilities(least_examples=1):
    shapes = st.tuples(st.integers(least_examples, 7), st.integers(1, 7))
    return shapes.flatmap(lambda s: arrays.arrays(np.float32, s, elements=st.floats(0, 1, width=32)))


def by_loops(sigma, tau):
    """L_b, L_e and L_v, number by number."""
    examples, groups = sigma.shape
    columns = [sum(float(sigma[i, j]) for i in range(examples)) / examples for j in range(groups)]
    rows = [sum(float(sigma[i, j]) for j in range(groups)) / groups for i in range(examples)]
    varying = [sum((float(sigma[i, j]) - columns[j]) ** 2 for i in range(examples)) / examples for j in range(groups)]
    l_b = sum(abs(mean - tau) for mean in columns)
    l_e = sum(abs(mean - tau) for mean in rows) / examples
    return l_b, l_e, -sum(varying)


@given(probabilities(), taus)
def test_the_losses_of_activity_equal_plain_loops(sigma, tau):
    l_b, l_e, _ = by_loops(sigma, tau)
    assert batch_loss(torch.from_numpy(sigma), tau).item() == pytest.approx(l_b, rel=1e-5, abs=1e-5)
    assert example_loss(torch.from_numpy(sigma), tau).item() == pytest.approx(l_e, rel=1e-5, abs=1e-5)


@given(probabilities(least_examples=2))
def test_the_loss_of_variance_equals_plain_loops(sigma):
    assert variance_loss(torch.from_numpy(sigma)).item() == pytest.approx(by_loops(sigma, 1)[2], rel=1e-5, abs=1e-5)


@given(probabilities(least_examples=2), taus, st.floats(0, 10), st.floats(0, 10))
def test_the_sum_weighs_the_losses(sigma, tau, lambda_s, lambda_v):
    l_b, l_e, l_v = by_loops(sigma, tau)
    expected = lambda_s * (l_b + l_e) + lambda_v * l_v
    found = sparsity_loss(torch.from_numpy(sigma), tau, lambda_s, lambda_v).item()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("tau", [0.125, 0.25, 0.5, 1.0])
def test_probabilities_at_tau_cost_nothing_and_others_something(tau):
    sigma = torch.full((5, 3), tau)
    assert batch_loss(sigma, tau) == example_loss(sigma, tau) == 0
    sigma[2, 1] -= 0.1
    assert batch_loss(sigma, tau) > 0
    assert example_loss(sigma, tau) > 0


def test_one_loss_looks_at_groups_and_the_other_at_examples():
    examples_differ = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert (batch_loss(examples_differ, 0.5), example_loss(examples_differ, 0.5)) == (0.0, 0.5)
    assert (batch_loss(examples_differ.T, 0.5), example_loss(examples_differ.T, 0.5)) == (1.0, 0.0)


@pytest.mark.parametrize("loss", [batch_loss, example_loss])
@pytest.mark.parametrize(("level", "sign"), [(0.6, 1), (0.2, -1)])
def test_descent_moves_activity_towards_tau(loss, level, sign):
    sigma = (level + 0.1 * torch.rand(6, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss(sigma, 0.4).backward()
    assert (sign * sigma.grad > 0).all()


def test_descent_on_the_loss_of_variance_moves_probabilities_away_from_their_groups_mean():
    sigma = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    variance_loss(sigma).backward()
    away = sigma.detach() - sigma.detach().mean(0)
    assert torch.equal(sigma.grad.sign(), -away.sign())


@pytest.mark.parametrize("tau", [0, -0.1, 1.1, float("nan"), float("inf")])
def test_a_tau_that_is_no_share_is_refused_everywhere(tau):
    sigma = torch.full((2, 2), 0.5)
    said = rf"^the sparsity target tau must be in \(0, 1\], not {tau}$"
    for refuse in (
        lambda: check_tau(tau),
        lambda: batch_loss(sigma, tau),
        lambda: example_loss(sigma, tau),
        lambda: sparsity_loss(sigma, tau, 1.0),
    ):
        with pytest.raises(UsageError, match=said):
            refuse()


def test_only_the_loss_of_variance_needs_two_examples():
    single = torch.tensor([[0.5, 0.25]])
    said = "^L_v needs a minibatch of at least two examples, not one$"
    with pytest.raises(UsageError, match=said):
        variance_loss(single)
    with pytest.raises(UsageError, match=said):
        sparsity_loss(single, 0.5, 1.0, 0.1)
    assert sparsity_loss(single, 0.5, 2.0).item() == 2 * (0.25 + 0.125)
