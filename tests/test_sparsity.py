"""The regularisers of a policy's activity against plain loops, where they vanish and which way they push."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from condcomp_lib.errors import UsageError
from condcomp_lib.sparsity import (
    FORMS,
    LEAST,
    batch_loss,
    check_tau,
    code_variance_loss,
    example_loss,
    gated_loss,
    kl_loss,
    rate_loss,
    sparsity_loss,
    squared_loss,
    variance_loss,
)

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


def squared_by_loops(sigma, tau):
    """What the authors' code adds up: squares, over examples without a mean."""
    examples, groups = sigma.shape
    columns = [sum(float(sigma[i, j]) for i in range(examples)) / examples for j in range(groups)]
    rows = [sum(float(sigma[i, j]) for j in range(groups)) / groups for i in range(examples)]
    return sum((mean - tau) ** 2 for mean in columns) + 0.001 * sum((mean - tau) ** 2 for mean in rows)


def code_variance_by_loops(sigma):
    examples, groups = sigma.shape
    rows = [sum(float(sigma[i, j]) for j in range(groups)) / groups for i in range(examples)]
    across = sum((float(sigma[i, j]) - rows[i]) ** 2 / groups for i in range(examples) for j in range(groups))
    return by_loops(sigma, 1)[2] - 0.1 * across


def rate_by_loops(sigma, tau):
    examples, groups = sigma.shape
    mean = sum(float(sigma[i, j]) for i in range(examples) for j in range(groups)) / (examples * groups)
    return groups * (mean - tau) ** 2


def kl_by_loops(sigma, tau):
    examples, groups = sigma.shape
    q, total = min(tau, 1 - LEAST), 0.0
    for i in range(examples):
        for j in range(groups):
            p = min(max(float(sigma[i, j]), LEAST), 1 - LEAST)
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total / examples


BY_LOOPS = {
    "text": lambda sigma, tau: sum(by_loops(sigma, tau)[:2]),
    "code": squared_by_loops,
    "rate": rate_by_loops,
    "kl": kl_by_loops,
}
VARIANCE_BY_LOOPS = {name: lambda sigma: by_loops(sigma, 1)[2] for name in BY_LOOPS} | {"code": code_variance_by_loops}


@pytest.mark.parametrize(
    ("loss", "name"), [(squared_loss, "code"), (rate_loss, "rate"), (kl_loss, "kl")], ids=["squared", "rate", "kl"]
)
@given(probabilities(), taus)
def test_the_other_losses_of_activity_equal_plain_loops(loss, name, sigma, tau):
    found = loss(torch.from_numpy(sigma), tau).item()
    assert found == pytest.approx(BY_LOOPS[name](sigma, tau), rel=1e-4, abs=1e-4)


@given(probabilities(least_examples=2))
def test_the_codes_loss_of_variance_equals_plain_loops(sigma):
    found = code_variance_loss(torch.from_numpy(sigma)).item()
    assert found == pytest.approx(code_variance_by_loops(sigma), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("tau", [0.125, 0.25, 0.5])
def test_the_divergence_is_nothing_where_all_probabilities_are_tau_and_something_elsewhere(tau):
    sigma = torch.full((5, 3), tau)
    assert kl_loss(sigma, tau) == 0
    for off in (-0.1, 0.1):
        elsewhere = sigma.clone()
        elsewhere[2, 1] += off
        assert kl_loss(elsewhere, tau) > 2 * 0.1**2 / 5  # Pinsker's bound, in the mean over five examples


@given(taus, st.floats(0, 1, width=32))
def test_the_divergence_is_finite_and_smallest_at_tau(tau, level):
    at, elsewhere = (kl_loss(torch.full((2, 3), value), tau).item() for value in (tau, level))
    assert at == pytest.approx(0, abs=1e-6)
    assert -1e-6 <= elsewhere < 3 * math.log(1 / LEAST) + 1e-3


def test_the_rate_alone_leaves_open_which_groups_and_examples_are_active():
    sigma = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert rate_loss(sigma, 0.5) == rate_loss(sigma.T, 0.5) == rate_loss(torch.full((2, 2), 0.5), 0.5) == 0
    for other in (squared_loss, kl_loss):
        assert other(sigma, 0.5) > 0


@pytest.mark.parametrize("loss", [squared_loss, rate_loss, kl_loss])
@pytest.mark.parametrize(("level", "sign"), [(0.6, 1), (0.2, -1)])
def test_descent_on_the_other_losses_moves_activity_towards_tau(loss, level, sign):
    sigma = (level + 0.1 * torch.rand(6, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss(sigma, 0.4).backward()
    assert (sign * sigma.grad > 0).all()


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(
    gates=st.lists(st.tuples(probabilities(least_examples=2), taus), min_size=1, max_size=3),
    lambda_s=st.floats(0, 10),
    lambda_v=st.sampled_from([0, 0.3, 7]),
)
def test_each_form_is_the_sum_of_its_losses_over_the_gates(form, gates, lambda_s, lambda_v):
    expected = sum(
        lambda_s * BY_LOOPS[form](sigma, tau) + lambda_v * VARIANCE_BY_LOOPS[form](sigma) for sigma, tau in gates
    )
    sigma, asked = [torch.from_numpy(sigma) for sigma, _ in gates], [tau for _, tau in gates]
    found = gated_loss(sigma, asked, form, lambda_s, lambda_v).item()
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_with_one_gate_the_form_of_the_text_is_the_loss_over_all_bits():
    sigma = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    assert gated_loss([sigma], [0.3], "text", 2.0, 0.5) == sparsity_loss(sigma, 0.3, 2.0, 0.5)


@pytest.mark.parametrize("asked", [(), (0.5,), (0.5, 0.5, 0.5)])
def test_every_gate_needs_a_sparsity_target_of_its_own(asked):
    with pytest.raises(UsageError, match=f"^2 gates need as many sparsity targets, not {len(asked)}$"):
        gated_loss([torch.full((2, 2), 0.5)] * 2, asked, "text", 1.0)


def test_an_unknown_form_lists_the_known_ones():
    said = "^unknown form of the sparsity loss 'l2'; known: code, kl, rate, text$"
    with pytest.raises(UsageError, match=said):
        gated_loss([torch.full((2, 2), 0.5)], [0.5], "l2", 1.0)


@pytest.mark.parametrize("tau", [0, -0.1, 1.1, float("nan"), float("inf")])
def test_a_tau_that_is_no_share_is_refused_by_the_other_losses_and_for_any_gate(tau):
    sigma = torch.full((2, 2), 0.5)
    refused = [lambda loss=loss: loss(sigma, tau) for loss in (squared_loss, rate_loss, kl_loss)]
    refused += [lambda form=form: gated_loss([sigma, sigma], [0.5, tau], form, 1.0) for form in FORMS]
    for refuse in refused:
        with pytest.raises(UsageError, match=rf"^the sparsity target tau must be in \(0, 1\], not {tau}$"):
            refuse()


@pytest.mark.parametrize("form", FORMS)
def test_every_forms_loss_of_variance_needs_two_examples(form):
    single, said = [torch.tensor([[0.5, 0.25]])], "^L_v needs a minibatch of at least two examples, not one$"
    with pytest.raises(UsageError, match=said):
        gated_loss(single, [0.5], form, 1.0, 0.1)
    assert gated_loss(single, [0.5], form, 1.0).isfinite()
