"""Estimators of a policy's gradient against the exact one, and what each promises, by loops and on small networks."""

import copy
import functools
import itertools
import math
import re
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from condcomp_lib.errors import UsageError
from condcomp_lib.estimators import Dense, Minibatch, Reinforce, entropy
from condcomp_lib.estimators.disarm import DisARM
from condcomp_lib.estimators.dpg import DPG, READS, Replay
from condcomp_lib.estimators.exact import compare, exact_cost, gradient, measure_bias
from condcomp_lib.estimators.pathwise import GaussianNoise, GumbelSigmoid, Pathwise, StraightThrough, ThresholdThrough
from condcomp_lib.estimators.supervised import KINDS, Supervised
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.oracle import Oracle
from condcomp_lib.partitions import SCOPES, make_partition
from condcomp_lib.policies import Budget, Policy, Sample
from condcomp_lib.targets import MLP

either_scope = pytest.mark.parametrize("scope", SCOPES)
SAMPLES, TELLING = 800, 300  # estimates that must not, and that must, be told from the exact gradient
EXAMPLES = 4
DRAWING = {
    "none": lambda lazy: Reinforce("none"),
    "mean": lambda lazy: Reinforce("mean"),
    "leave-one-out": lambda lazy: Reinforce("leave-one-out"),
    "moving": lambda lazy: Reinforce("moving"),
    "normalised": lambda lazy: Reinforce(normalise=True, entropy_weight=0.1),
    "disarm": lambda lazy: DisARM(),
    "straight-through": lambda lazy: Pathwise(StraightThrough),
    "gumbel-sigmoid": lambda lazy: Pathwise(GumbelSigmoid),
    "gaussian": lambda lazy: Pathwise(GaussianNoise),
    "dpg": lambda lazy: DPG(batch=4),
    "dpg-bits": lambda lazy: DPG(batch=4, reads="bits"),
}
SURE = {
    "threshold-through": lambda lazy: Pathwise(ThresholdThrough),
    "regression": lambda lazy: Supervised(Oracle(lazy.target, lazy.partition), 0.5, "regression"),
    "cross-entropy": lambda lazy: Supervised(Oracle(lazy.target, lazy.partition), 0.5, "cross-entropy"),
    "dense": lambda lazy: Dense(),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def minibatch(scope, groups=2, hidden=(4, 4), inputs=2, examples=EXAMPLES, cost=None):
    """Examples whose labels are what a frozen, untrained target says; a cost is their negative log likelihood."""
    draws = seeded()
    target = MLP(inputs, hidden, 3, "tanh", draws).requires_grad_(False)
    for weight in target.parameters():
        weight.mul_(2)  # masks then matter more than they do at torch's small first weights
    partition = make_partition("contiguous", hidden, groups, draws, scope)
    lazy = LazyNetwork(target, partition, Policy(partition, inputs, None, draws), Sample(draws))
    x = torch.randn(examples, inputs, generator=draws)
    y = target(x).argmax(1)
    return Minibatch(lazy, x, cost or (lambda found: cross_entropy(found.scores, y, reduction="none")))


def costs_by_loops(given):
    """The expected cost: for every example and mask the probability, gate by gate, times the cost."""
    lazy, total = given.lazy, 0.0
    y = lazy.target(given.x).argmax(1)
    for bits in itertools.product([0, 1], repeat=lazy.partition.bits):
        for x, label in zip(given.x, y, strict=True):
            probability, below = 1.0, x[None]
            for gate in range(len(lazy.policy.gates)):
                own = bits[gate * lazy.partition.groups :][: lazy.partition.groups]
                for bit, logit in zip(own, lazy.policy.logits(gate, below)[0], strict=True):
                    probability = probability * (logit.sigmoid() if bit else 1 - logit.sigmoid())
                members = lazy.partition.membership[gate]
                below = lazy.target.activation(lazy.target.linears[gate](below)) * torch.tensor(own)[members]
            scores = lazy.masked_scores(x[None], torch.tensor([bits], dtype=torch.bool))
            total = total - probability * scores[0].log_softmax(0)[label] / len(given.x)
    return total


@either_scope
def test_the_exact_cost_and_its_gradient_equal_a_loop_over_all_masks(scope):
    given = minibatch(scope, groups=3 if scope == "network" else 2)
    found, expected = exact_cost(given), costs_by_loops(given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient(found, given), gradient(expected, given), rtol=1e-4, atol=1e-6)


@functools.cache  # two tests look at the same numbers
def measured(name, scope):
    estimator, given = DRAWING[name](None), minibatch(scope)
    if name == "moving":
        estimator.loss(torch.full((3,), 1.5), torch.zeros(3))
    return measure_bias(estimator, given, SAMPLES, seeded(1))


@either_scope
@pytest.mark.parametrize("name", ["none", "leave-one-out", "moving", "disarm"])
def test_unbiased_estimators_are_not_told_from_the_exact_gradient(name, scope):
    assert measured(name, scope).p_value > 1e-3


@either_scope
def test_antithetic_pairs_vary_less_than_score_functions(scope):
    assert measured("disarm", scope).deviation < 0.5 * measured("none", scope).deviation


@either_scope
@pytest.mark.parametrize("name", ["straight-through", "gaussian"])
def test_biased_estimators_are_told_from_the_exact_gradient(name, scope):
    assert measure_bias(DRAWING[name](None), minibatch(scope), TELLING, seeded(1)).p_value < 1e-6


@either_scope
def test_the_minibatchs_mean_as_a_baseline_shrinks_the_gradient_and_is_told(scope):
    given, draws = minibatch(scope), seeded(1)
    exact = gradient(exact_cost(given), given)
    found = np.stack([gradient(Reinforce("mean")(given, draws).loss, given) for _ in range(TELLING)])
    assert compare(found, exact).p_value < 1e-6
    assert compare(found, (1 - 1 / EXAMPLES) * exact).p_value > 1e-3


def test_a_known_bias_is_recovered():
    exact, error, deviations = np.array([3.0, -4.0, 0.0]), np.array([0.0, 0.3, 0.4]), np.array([1.0, 2.0, 0.5])
    noise = np.random.default_rng(0).normal(size=(4000, 3)) * deviations
    none, some = compare(exact + noise, exact), compare(exact + error + noise, exact)
    assert none.p_value > 1e-3
    assert some.p_value < 1e-6
    assert some.bias == pytest.approx(np.linalg.norm(error) / 5, abs=3 * some.noise)
    assert some.deviation == pytest.approx(np.linalg.norm(deviations) / 5, rel=0.05)
    assert some.noise == pytest.approx(some.deviation / 4000**0.5)
    away = (exact + error + noise).mean(0)
    assert some.cosine == pytest.approx(away @ exact / np.linalg.norm(away) / 5)
    assert some.statistic == pytest.approx((away - exact) @ np.linalg.solve(np.cov(noise.T) / 4000, away - exact))


def test_right_estimates_are_told_from_the_truth_as_seldom_as_the_p_value_says():
    draws = np.random.default_rng(0)
    chances = [compare(draws.normal(size=(12, 4)) + 1, np.ones(4)).p_value for _ in range(800)]
    assert np.mean(np.array(chances) < 0.1) == pytest.approx(0.1, abs=0.04)


def test_an_error_in_a_direction_that_does_not_vary_is_a_bias_for_certain():
    found = np.random.default_rng(0).normal(size=(500, 3)) * [1, 1, 0] + [1, 2, 3]
    assert compare(found, np.array([1, 2, 3.01])).p_value == 0
    right = compare(found, np.array([1, 2, 3 + 1e-6]))  # rounding
    assert right.p_value > 1e-3
    assert right.freedom == 2


logit_rows = st.lists(st.lists(st.floats(-6, 6, width=32), min_size=3, max_size=3), min_size=1, max_size=4)


def slopes(decision, logits):
    """The decided numbers, their gradient in `logits` and that of sigma."""
    logits = torch.tensor(logits, requires_grad=True)
    sigma = logits.sigmoid()
    numbers = decision(logits, 0)
    return numbers.detach(), *(torch.autograd.grad(part.sum(), logits)[0] for part in (numbers, sigma))


@given(logit_rows, st.integers(0, 2**32))
def test_bits_let_the_gradient_of_sigma_through(logits, seed):
    drawn, found, expected = slopes(StraightThrough(seeded(seed)), logits)
    assert torch.equal(drawn, Sample(seeded(seed))(torch.tensor(logits), 0).float())
    torch.testing.assert_close(found, expected)
    cut, found, expected = slopes(ThresholdThrough(seeded(seed)), logits)
    assert torch.equal(cut, (torch.tensor(logits) > 0).float())
    torch.testing.assert_close(found, expected)


@given(logit_rows, st.floats(0, 2), st.integers(0, 2**32))
def test_noisy_probabilities_stay_probabilities_and_keep_the_gradient_where_they_are_cut(logits, deviation, seed):
    noisy, found, expected = slopes(GaussianNoise(seeded(seed), deviation), logits)
    by_hand = torch.tensor(logits).sigmoid() + deviation * torch.randn(noisy.shape, generator=seeded(seed))
    assert ((noisy >= 0) & (noisy <= 1)).all()
    torch.testing.assert_close(noisy, by_hand.clamp(0, 1))
    assert torch.equal(GaussianNoise(seeded(seed), 0.0)(torch.tensor(logits), 0), torch.tensor(logits).sigmoid())
    torch.testing.assert_close(found, expected)


def test_concrete_numbers_become_bits_as_the_temperature_falls():
    logits = torch.linspace(-4, 4, 300)[None].requires_grad_()
    soft, hard = (GumbelSigmoid(seeded(), temperature)(logits, 0) for temperature in (0.5, 1e-6))
    bits = 1 - torch.rand(logits.shape, generator=seeded()) < logits.sigmoid()
    assert ((soft > 0) & (soft < 1)).all()
    assert torch.equal(soft > 0.5, bits)
    torch.testing.assert_close(hard.detach(), bits.float())
    steeper = (soft * (1 - soft) / 0.5).detach()
    torch.testing.assert_close(torch.autograd.grad(soft.sum(), logits)[0], steeper)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=6))
def test_normalised_advantages_have_a_deviation_of_one(costs):
    log_probabilities = torch.zeros(len(costs), requires_grad=True)
    Reinforce(normalise=True).loss(torch.tensor(costs), log_probabilities).backward()
    found, deviation = log_probabilities.grad * len(costs), np.std(costs)
    assert found.isfinite().all()
    if deviation > 1e-2:  # else rounding
        assert found.std(correction=0).item() == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(found, (costs - np.mean(costs)) / deviation, rtol=1e-3, atol=1e-3)


@given(logit_rows)
def test_the_entropy_is_the_sum_over_the_bits(logits):
    expected = []
    for row in logits:
        sigma = [1 / (1 + math.exp(-logit)) for logit in row]
        expected.append(-sum(s * math.log(s) + (1 - s) * math.log(1 - s) for s in sigma))
    found = entropy(torch.tensor(logits))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    theirs = torch.distributions.Bernoulli(logits=torch.tensor(logits)).entropy().sum(1)
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


def test_the_weight_of_the_entropy_makes_a_policy_less_sure():
    given = minibatch("layer", cost=lambda found: torch.zeros(len(found.scores)))
    optimiser = torch.optim.SGD(given.lazy.policy.parameters(), lr=0.1)
    before = entropy(given.under(Sample(seeded()))[1].logits).mean()
    Reinforce(entropy_weight=1.0)(given, seeded()).loss.backward()
    optimiser.step()
    assert entropy(given.under(Sample(seeded()))[1].logits).mean() > before


@given(st.integers(1, 6), st.lists(st.integers(1, 9), max_size=8), st.integers(0, 2**32))
def test_a_replay_buffer_holds_and_draws_only_the_newest_experiences(capacity, sizes, seed):
    replay, kept, number = Replay(capacity, 2), deque(maxlen=capacity), 0
    for size in sizes:
        rows = torch.arange(number, number + size)[:, None].float().expand(-1, 2)
        replay.add(rows)
        kept.extend(rows[:, 0].tolist())
        number += size
        assert len(replay) == len(kept)
        drawn = replay.sample(60, seeded(seed))
        assert torch.equal(drawn[:, 0], drawn[:, 1])
        assert set(drawn[:, 0].tolist()) <= set(kept)
    if sizes:
        assert set(replay.sample(400, seeded(seed))[:, 0].tolist()) == set(kept)


def test_the_policy_stands_still_until_the_critic_has_a_batch():
    given, dpg = minibatch("layer"), DPG(batch=2 * EXAMPLES + 1)
    moves = [gradient(dpg(given, seeded(call)).loss, given).any() for call in range(3)]
    assert moves == [False, False, True]


@pytest.mark.parametrize("reads", READS)
def test_the_critic_learns_what_each_bit_costs_and_the_policy_follows(reads):
    costs, draws = torch.tensor([1.0, -2.0, 0.5]), seeded(2)
    given = minibatch("network", groups=3, examples=4000, cost=lambda found: found.mask.float() @ costs + 1)
    dpg = DPG(noise=0.4, rate=1e-2, reads=reads)
    dpg(given, draws)
    errors = [dpg.learn(draws) for _ in range(300)]
    estimate = dpg(given, draws)
    action = estimate.found.logits.detach().sigmoid().requires_grad_()
    value = dpg.value(given.x, action)
    slope = torch.autograd.grad(value.sum(), action)[0]
    assert np.mean(errors[-50:]) < 0.8 * np.mean(errors[:5])
    assert (value - action @ costs - 1).abs().mean() < 0.15
    torch.testing.assert_close(slope.mean(0), costs, rtol=0, atol=0.3)
    by_hand = (slope * action * (1 - action)).mean(0).detach()
    found = torch.autograd.grad(estimate.loss, given.lazy.policy.gates[0].bias)[0]
    torch.testing.assert_close(found, by_hand)


def test_asking_the_critic_leaves_it_as_it_is():
    given, dpg = minibatch("network"), DPG()
    dpg(given, seeded())
    before, action = copy.deepcopy(dpg.critic.state_dict()), torch.full((EXAMPLES, 2), 0.5, requires_grad=True)
    dpg.value(given.x, action).sum().backward()
    assert action.grad.any()
    assert all(weight.grad is None and weight.requires_grad for weight in dpg.critic.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in dpg.critic.state_dict().items())


def contributions(oracle, x, found):
    """For each gate the groups' shares of every example (lists), in scope "network" a mean over the full layers."""
    hidden, h = found.hidden, x
    if oracle.scope == "network":
        hidden = [h := oracle.target.activation(layer(h)) for layer in oracle.target.linears[:-1]]
    shares = [oracle.shares(layer, activations.detach()).tolist() for layer, activations in enumerate(hidden)]
    if oracle.scope == "layer":
        return shares
    return [[[sum(values) / len(shares) for values in zip(*rows, strict=True)] for rows in zip(*shares, strict=True)]]


@pytest.mark.parametrize("kind", KINDS)
@either_scope
def test_routers_are_told_the_oracles_groups_or_shares(scope, kind):
    given = minibatch(scope, groups=4, hidden=(9, 8), examples=6)
    oracle = Oracle(given.lazy.target, given.lazy.partition)
    counts = (1, 3)[: len(oracle.gates)]
    estimate, expected = Supervised.of(oracle, counts, kind)(given, seeded()), 0.0
    assert torch.equal(estimate.found.mask, given.under(Budget(counts))[1].mask)
    for gate, shares in enumerate(contributions(oracle, given.x, estimate.found)):
        for example, row in enumerate(shares):
            best = sorted(range(4), key=lambda group: row[group])[-counts[gate] :]
            for group in range(4):
                logit = estimate.found.logits[example, 4 * gate + group].item()
                label_likelihood = 1 / (1 + math.exp(-logit if group in best else logit))
                wrong = (logit - 4 * row[group]) ** 2 if kind == "regression" else -math.log(label_likelihood)
                expected += wrong / (6 * 4)
    assert estimate.loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@either_scope
def test_routers_come_to_choose_the_oracles_groups(scope, kind):
    given = minibatch(scope, groups=4, hidden=(12, 12), inputs=3, examples=60)
    oracle = Oracle(given.lazy.target, given.lazy.partition)
    router, agreement = Supervised(oracle, 0.5, kind), []
    optimiser = torch.optim.Adam(given.lazy.policy.parameters(), lr=0.1)
    for _ in range(80):
        estimate = router(given, seeded())
        wanted = [torch.tensor(rows).topk(2, dim=1).indices for rows in contributions(oracle, given.x, estimate.found)]
        chosen = [bits.gather(1, best) for bits, best in zip(estimate.found.mask.split(4, 1), wanted, strict=True)]
        agreement.append(torch.cat(chosen).float().mean().item())
        optimiser.zero_grad()
        estimate.loss.backward()
        optimiser.step()
    assert agreement[-1] > agreement[0] + 0.2
    assert agreement[-1] > 0.7


@either_scope
def test_dense_evaluates_every_group_and_asks_nothing_of_the_policy(scope):
    given = minibatch(scope)
    estimate = Dense()(given, seeded())
    assert estimate.found.mask.all()
    assert torch.equal(estimate.found.scores, given.lazy.target(given.x))
    assert estimate.loss.item() == estimate.costs.mean().item()
    assert not gradient(estimate.loss, given).any()


def learned(make, scope, seed):
    """Three estimates of a new estimator: gradients and masks; the target must come out as it was."""
    given, draws = minibatch(scope), seeded(seed)
    estimator, before = make(given.lazy), copy.deepcopy(given.lazy.target.state_dict())
    seen = []
    for _ in range(3):
        estimate = estimator(given, draws)
        given.lazy.policy.zero_grad()
        estimate.loss.backward()
        seen += [weight.grad.flatten() for weight in given.lazy.policy.parameters()]
        seen.append(estimate.found.mask.detach().float().flatten())
        assert estimate.costs.shape == (EXAMPLES,)
    assert all(torch.equal(weight, before[name]) for name, weight in given.lazy.target.state_dict().items())
    assert all(weight.grad is None for weight in given.lazy.target.parameters())
    return torch.cat(seen)


@either_scope
@pytest.mark.parametrize("name", [*DRAWING, *SURE])
def test_estimators_depend_on_their_generator_only_and_leave_a_frozen_target_alone(name, scope):
    make = (DRAWING | SURE)[name]
    once, again, otherwise = (learned(make, scope, seed) for seed in (1, 1, 2))
    assert once.isfinite().all()
    assert torch.equal(once, again)
    assert torch.equal(once, otherwise) == (name in SURE)


def rescaled_by_sigma():
    given = minibatch("network")
    lazy = given.lazy
    network = LazyNetwork(lazy.target, lazy.partition, lazy.policy, lazy.decision, "sigma")
    return Minibatch(network, given.x, given.cost)


def router(asked=(1, 1), kind="cross-entropy"):
    lazy = minibatch("layer").lazy
    return Supervised.of(Oracle(lazy.target, lazy.partition), asked, kind)


REFUSED = {
    "every mask of 14 bits cannot be tried; at most 12 bits": lambda: exact_cost(minibatch("layer", 7, (7, 7))),
    "a joint test of 6 weights needs more samples than that, not 6": lambda: measure_bias(
        Reinforce(), minibatch("network"), 6, seeded()
    ),
    "a replay buffer must hold at least one batch: 7 rows are fewer than the 8 of a batch": lambda: DPG(
        capacity=7, batch=8
    ),
    "batch and hidden neurons of the critic must be at least 1, not 0 and 64": lambda: DPG(batch=0),
    "the exact gradient is zero: there is nothing to measure a bias against": lambda: compare(
        np.ones((9, 2)), np.zeros(2)
    ),
    "the exact cost is that of plainly drawn bits: no always-on group, and no rescaling by sigma": lambda: exact_cost(
        rescaled_by_sigma()
    ),
    "unknown what the critic reads 'mask'; known: bits, sigma": lambda: DPG(reads="mask"),
    "the critic has not seen a minibatch yet": lambda: DPG().value(torch.ones(1, 2), torch.ones(1, 2)),
    "unknown kind of router 'ranking'; known: cross-entropy, regression": lambda: router(kind="ranking"),
    "the oracle and the lazy network must have the same target and partition": lambda: router()(
        minibatch("layer"), seeded()
    ),
    **{
        f"each of 2 gates must be asked for 1 to 2 groups, not for {asked}": functools.partial(router, asked)
        for asked in ([3, 1], [0, 1], [1], [1, 1, 1])
    },
    "the temperature must be a number above 0, not 0": lambda: GumbelSigmoid(seeded(), 0),
}
NUMBERS = {
    "temperature must be a number above 0": lambda value: GumbelSigmoid(seeded(), value),
    "noise's standard deviation must be a number of at least 0": lambda value: GaussianNoise(seeded(), value),
    "entropy's weight must be a number of at least 0": lambda value: Reinforce(entropy_weight=value),
    "noise must be a number of at least 0": lambda value: DPG(noise=value),
    "critic's learning rate must be a number of at least 0": lambda value: DPG(rate=value),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(said):
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        REFUSED[said]()


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("said", NUMBERS)
def test_settings_that_are_no_numbers_of_their_kind_are_refused(said, value):
    with pytest.raises(UsageError, match=f"^the {said}, not {value}$"):
        NUMBERS[said](value)
