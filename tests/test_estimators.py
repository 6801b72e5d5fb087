"""REINFORCE and its baselines against exact gradients: all masks enumerated, then samples tested jointly."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from torch import Tensor

from condcomp_lib.errors import UsageError
from condcomp_lib.estimators import BASELINES, MOMENTUM, Reinforce, log_probability
from condcomp_lib.policies import Sample

SHRINKS = {"mean": lambda examples: 1 - 1 / examples}  # all other baselines leave the gradient as it is


@dataclass(frozen=True)
class Task:
    """Inputs (examples x features), a policy's weights (bits x features), a cost of each example under each mask."""

    x: Tensor
    weights: Tensor
    costs: Tensor

    @property
    def masks(self):
        return torch.tensor(list(itertools.product([False, True], repeat=len(self.weights))))

    def probabilities(self, weights):
        """The probability of each example's every mask (examples x masks)."""
        sigma = (self.x @ weights.T).sigmoid()[:, None]
        return torch.where(self.masks, sigma, 1 - sigma).prod(2)

    def gradient(self):
        weights = self.weights.clone().requires_grad_()
        (self.probabilities(weights) * self.costs).sum(1).mean().backward()
        return weights.grad.flatten()


def task(examples, bits, features=2, costs_mean=0.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(examples, features), (bits, features), (examples, 2**bits)]
    x, weights, costs = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Task(x, weights, costs + costs_mean)


def estimates(task, baseline, chosen, earlier=1.7):
    """The estimate (weights, flat) from each minibatch of `chosen` (minibatches x examples), numbers of masks."""
    weights = task.weights.expand(len(chosen), -1, -1).clone().requires_grad_()
    logits = torch.einsum("ef,mbf->meb", task.x, weights)
    losses = []
    for minibatch, numbers in zip(logits, chosen, strict=True):
        estimator = Reinforce(baseline)
        if baseline == "moving":
            estimator.loss(torch.full((3,), earlier), torch.zeros(3))
        costs = task.costs.gather(1, numbers[:, None])[:, 0]
        losses.append(estimator.loss(costs, log_probability(minibatch, task.masks[numbers])))
    torch.stack(losses).sum().backward()
    return weights.grad.flatten(1)


def mean_and_variance(task, baseline):
    """The exact mean (weights, flat) and summed variance of the estimates, over all joint choices of masks."""
    examples, masks = task.costs.shape
    chosen = torch.tensor(list(itertools.product(range(masks), repeat=examples)))
    probabilities = task.probabilities(task.weights)[torch.arange(examples), chosen].prod(1)[:, None]
    found = estimates(task, baseline, chosen)
    mean = (probabilities * found).sum(0)
    return mean, (probabilities * (found - mean) ** 2).sum()


def sampled(task, baseline, minibatches=1500):
    logits = (task.x @ task.weights.T).expand(minibatches, -1, -1)
    masks = Sample(torch.Generator().manual_seed(1))(logits, 0)
    places = 2 ** torch.arange(masks.shape[2] - 1, -1, -1)
    return estimates(task, baseline, (masks * places).sum(2))


def hotelling(samples, expected):
    """The p-value of one joint test that the mean of `samples` (samples x numbers) is `expected`."""
    count, numbers = samples.shape
    distance = (samples.mean(0) - expected).numpy()
    squared = count * distance @ np.linalg.solve(np.cov(samples.numpy().T), distance)
    return stats.f.sf(squared * (count - numbers) / (numbers * (count - 1)), numbers, count - numbers)


shapes = arrays.array_shapes(min_dims=2, max_dims=2, max_side=6)


@given(shapes.flatmap(lambda s: arrays.arrays(np.float64, s, elements=st.floats(-15, 15))), st.data())
def test_the_log_probability_is_the_sum_over_the_bits(logits, draw):
    mask = draw.draw(arrays.arrays(np.bool_, logits.shape))
    sigma = 1 / (1 + np.exp(-logits))
    expected = [
        sum(np.log(s if bit else 1 - s) for s, bit in zip(*rows, strict=True))
        for rows in zip(sigma.tolist(), mask.tolist(), strict=True)
    ]
    found = log_probability(torch.from_numpy(logits), torch.from_numpy(mask))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_the_probabilities_of_all_masks_add_up_to_one():
    logits = torch.linspace(-3, 3, 5).expand(32, 5)
    masks = torch.tensor(list(itertools.product([False, True], repeat=5)))
    assert log_probability(logits, masks).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_the_log_probability_of_a_sure_policy_is_finite():
    logits, mask = torch.tensor([[200.0, -200.0], [200.0, -200.0]]), torch.tensor([[True, False], [False, True]])
    torch.testing.assert_close(log_probability(logits, mask), torch.tensor([0.0, -400.0]))


@pytest.mark.parametrize("examples", [2, 3, 4])
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_expected_estimate_over_all_joint_masks_is_the_gradient(baseline, examples):
    given = task(examples, bits=2)
    factor = SHRINKS.get(baseline, lambda _: 1)(examples)
    torch.testing.assert_close(mean_and_variance(given, baseline)[0], factor * given.gradient(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", ["none", "moving"])
def test_without_others_in_the_minibatch_the_expected_estimate_is_the_gradient(baseline):
    given = task(examples=1, bits=5)
    torch.testing.assert_close(mean_and_variance(given, baseline)[0], given.gradient(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", BASELINES)
def test_sampled_estimates_are_scattered_about_the_gradient(baseline):
    given = task(examples=3, bits=5, features=3)
    factor = SHRINKS.get(baseline, lambda _: 1)(3)
    assert hotelling(sampled(given, baseline), factor * given.gradient()) > 0.001


def test_sampled_estimates_tell_a_gradient_that_is_a_third_too_large():
    given = task(examples=3, bits=5, features=3)
    assert hotelling(sampled(given, "mean"), given.gradient()) < 1e-6
    assert hotelling(sampled(given, "none"), 2 / 3 * given.gradient()) < 1e-6


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_a_baseline_from_the_minibatch_lowers_the_variance_of_large_costs(baseline):
    given = task(examples=3, bits=2, costs_mean=10)
    assert mean_and_variance(given, baseline)[1] < 0.2 * mean_and_variance(given, "none")[1]


def test_a_baseline_near_the_mean_cost_lowers_the_variance_and_a_far_one_raises_it():
    given = task(examples=2, bits=2, costs_mean=1.7)
    near, none = (mean_and_variance(given, baseline)[1] for baseline in ("moving", "none"))
    far = mean_and_variance(task(examples=2, bits=2, costs_mean=-1.7), "moving")[1]
    assert near < none < far


@pytest.mark.parametrize("baseline", BASELINES)
def test_adding_a_constant_to_the_costs_changes_only_estimates_without_the_minibatchs_baseline(baseline):
    costs = torch.tensor([1.0, 4.0, 1.0])
    plain, shifted = (advantages(Reinforce(baseline), given) for given in (costs, costs + 8))
    assert torch.equal(plain, shifted) == (baseline in ("mean", "leave-one-out"))


def advantages(estimator, costs):
    """What each example's log probability is multiplied with, read from the gradient."""
    log_probabilities = torch.zeros(len(costs), requires_grad=True)
    estimator.loss(costs, log_probabilities).backward()
    return log_probabilities.grad * len(costs)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=6))
def test_leave_one_out_subtracts_the_mean_of_the_others(costs):
    others = [(sum(costs) - cost) / (len(costs) - 1) for cost in costs]
    found = advantages(Reinforce("leave-one-out"), torch.tensor(costs))
    np.testing.assert_allclose(found.numpy(), np.subtract(costs, others), rtol=1e-5, atol=1e-5)


def test_the_moving_baseline_is_an_average_of_earlier_minibatches_only():
    estimator, before = Reinforce("moving"), 0.0
    for number, costs in enumerate(torch.randn(5, 4, generator=torch.Generator().manual_seed(0))):
        torch.testing.assert_close(advantages(estimator, costs), costs - before)
        mean = costs.mean().item()
        before = MOMENTUM * before + (1 - MOMENTUM) * mean if number else mean


@pytest.mark.parametrize("baseline", BASELINES)
def test_costs_are_constants(baseline):
    costs = torch.tensor([1.0, 2.0], requires_grad=True)
    log_probabilities = torch.tensor([-0.5, -0.25], requires_grad=True)
    estimator = Reinforce(baseline)
    for _ in range(2):
        estimator.loss(costs, log_probabilities).backward()
    assert costs.grad is None
    assert log_probabilities.grad is not None


def test_an_unknown_baseline_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"^unknown baseline 'median'; known: leave-one-out, mean, moving, none$"):
        Reinforce("median")


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_a_baseline_from_the_minibatch_needs_two_examples(baseline):
    said = f"^baseline '{baseline}' needs a minibatch of at least two examples, not one$"
    with pytest.raises(UsageError, match=said):
        Reinforce(baseline).loss(torch.ones(1), torch.zeros(1))


@pytest.mark.parametrize("baseline", ["none", "moving"])
def test_other_baselines_accept_a_single_example(baseline):
    assert Reinforce(baseline).loss(torch.tensor([3.0]), torch.tensor([-0.5])).item() == -1.5
