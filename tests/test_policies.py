"""Policies and decisions: logits and pooling by plain loops, frequencies, budgets, levels by brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from condcomp_lib.errors import UsageError
from condcomp_lib.estimators import log_probability
from condcomp_lib.lazy import LazyNetwork, calibrated, evaluate
from condcomp_lib.partitions import SCOPES, make_partition
from condcomp_lib.policies import ALWAYS, Blind, Budget, Policy, Pool, Sample, Threshold, asked_by_gate, level_for
from condcomp_lib.sparsity import sparsity_loss
from condcomp_lib.targets import MLP


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network_policy(groups=5, inputs=6, pool=None):
    return Policy(make_partition("balanced", [7, 8], groups, seeded(), "network"), inputs, pool, seeded())


def layer_policy(groups=4, inputs=6, pool=None):
    return Policy(make_partition("balanced", [7, 8, 9], groups, seeded(), "layer"), inputs, pool, seeded())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def affine(gate, s):
    return s.numpy() @ gate.weight.detach().numpy().T + gate.bias.detach().numpy()


def test_logits_equal_numpy():
    policy, x = network_policy(), normal(9, 6)
    logits = policy.logits(0, x)
    np.testing.assert_allclose(logits.detach().numpy(), affine(policy.gates[0], x), rtol=1e-5, atol=1e-6)
    assert logits.dtype == torch.float32


def test_scope_network_has_one_gate_for_the_whole_network():
    policy = network_policy(groups=5)
    assert [(gate.in_features, gate.out_features) for gate in policy.gates] == [(6, 5)]
    assert (policy.bits, policy.scope) == (5, "network")


def test_in_scope_layer_each_gate_reads_the_layer_below():
    policy = layer_policy(groups=4)
    assert [(gate.in_features, gate.out_features) for gate in policy.gates] == [(6, 4), (7, 4), (8, 4)]
    assert (policy.bits, policy.scope) == (12, "layer")
    for index, gate in enumerate(policy.gates):
        s = normal(5, gate.in_features, seed=index)
        np.testing.assert_allclose(policy.logits(index, s).detach().numpy(), affine(gate, s), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [network_policy, layer_policy])
def test_only_the_first_gate_reads_pooled_input(make):
    pool = Pool((2, 4, 6), 2)
    policy, x = make(inputs=48, pool=pool), normal(5, 48)
    assert policy.gates[0].in_features == pool.outputs == 12
    np.testing.assert_allclose(
        policy.logits(0, x).detach().numpy(), affine(policy.gates[0], pool(x)), rtol=1e-5, atol=1e-6
    )
    for index, gate in list(enumerate(policy.gates))[1:]:
        s = normal(5, gate.in_features)
        np.testing.assert_allclose(policy.logits(index, s).detach().numpy(), affine(gate, s), rtol=1e-5, atol=1e-6)


def test_weights_follow_the_generator_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    policies = [Policy(make_partition("contiguous", [7], 3, seeded()), 6, None, seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (policy.gates[0].weight for policy in policies)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("shape", "size"), [((1, 4, 4), 1), ((3, 4, 6), 2), ((2, 6, 3), 3), ((1, 5, 5), 5)])
def test_pooling_equals_a_loop_of_averages(shape, size):
    channels, height, width = shape
    x = normal(4, channels * height * width)
    pool = Pool(shape, size)
    expected = []
    for image in x.numpy().reshape(-1, *shape):
        corners = itertools.product(range(channels), range(0, height, size), range(0, width, size))
        expected.append([image[c, i : i + size, j : j + size].mean() for c, i, j in corners])
    np.testing.assert_allclose(pool(x).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (pool.inputs, pool.outputs) == (x.shape[1], len(expected[0]))


@pytest.mark.parametrize("size", [0, -1, 3, 4, 8])
def test_a_pool_that_does_not_tile_the_image_is_refused(size):
    with pytest.raises(UsageError, match=f"must divide the image.s sides, 4 x 6, which {size} does not"):
        Pool((1, 4, 6), size)


def test_a_pool_for_other_images_is_refused():
    with pytest.raises(UsageError, match="the pool takes 24 features, the input has 6"):
        network_policy(inputs=6, pool=Pool((1, 4, 6), 2))


def test_sampled_frequencies_fit_the_probabilities():
    count, logits = 20000, torch.linspace(-4, 4, 12)
    probabilities = 1 / (1 + np.exp(-logits.double().numpy()))
    drawn = Sample(seeded())(logits.expand(count, 12), 0).sum(0).numpy()
    squares = (drawn - count * probabilities) ** 2 / (count * probabilities * (1 - probabilities))
    assert 0.01 < stats.chi2.sf(squares.sum(), df=12) < 0.99


def test_samples_follow_their_generator_and_leave_the_global_one_alone():
    logits, before = normal(50, 8), torch.get_rng_state()
    drawn = [Sample(seeded(seed))(logits, 0) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].dtype == torch.bool


def test_a_sure_policy_samples_what_it_is_sure_of():
    drawn = Sample(seeded())(torch.tensor([-200.0, 200.0]).expand(1000, 2), 0)
    assert drawn.any(0).tolist() == drawn.all(0).tolist() == [False, True]


def test_the_threshold_at_one_half_sets_what_is_likelier():
    policy = layer_policy()
    decide, logits = Threshold.at(0.5, policy), torch.cat([normal(50, 4), torch.zeros(1, 4)])
    assert len(decide.levels) == len(policy.gates) == 3
    for gate in range(3):
        assert torch.equal(decide(logits, gate), logits > 0)


@given(st.floats(0.01, 0.99))
def test_a_threshold_compares_probabilities(probability):
    logits = normal(50, 5).double()
    decided = Threshold.at(probability, network_policy())(logits, 0)
    sigma = logits.sigmoid()
    clear = (sigma - probability).abs() > 1e-9
    assert torch.equal(decided[clear], (sigma > probability)[clear])


def test_each_gate_has_its_own_level():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    decide = Threshold((0.5, 1.5))
    assert decide(logits, 0).tolist() == [[False, True, True]]
    assert decide(logits, 1).tolist() == [[False, False, True]]


@pytest.mark.parametrize("probability", [0, 1, -0.1, 1.5, math.nan])
def test_a_threshold_that_is_no_probability_is_refused(probability):
    with pytest.raises(UsageError, match=f"a threshold must lie between 0 and 1, not at {probability}"):
        Threshold.at(probability, network_policy())


@given(st.data(), st.integers(1, 5), st.integers(1, 8))
def test_a_budget_sets_exactly_the_highest_logits_of_every_example(data, examples, groups):
    value = st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-5, 5, width=32))
    rows = data.draw(st.lists(st.lists(value, min_size=groups, max_size=groups), min_size=examples, max_size=examples))
    count = data.draw(st.integers(1, groups))
    mask = Budget((count,))(torch.tensor(rows), 0)
    assert mask.dtype == torch.bool
    for row, bits in zip(rows, mask.tolist(), strict=True):
        kept = [value for value, bit in zip(row, bits, strict=True) if bit]
        assert sorted(kept, reverse=True) == sorted(row, reverse=True)[:count]


@given(st.integers(1, 16), st.floats(0, 1, exclude_min=True))
def test_a_budget_is_the_nearest_number_of_groups_and_at_least_one(groups, activity):
    partition = make_partition("balanced", [16, 17], groups, seeded(), "layer")
    budget = Budget.of(activity, partition, Policy(partition, 3))
    nearest = min(abs(count / groups - activity) for count in range(1, groups + 1))
    for count in budget.counts:
        assert 1 <= count <= groups
        assert abs(count / groups - activity) == pytest.approx(nearest, abs=1e-9)
    assert len(budget.counts) == 2


def test_a_budget_may_differ_between_gates():
    partition = make_partition("balanced", [16, 16], 4, seeded(), "layer")
    budget = Budget.of((0.25, 0.75), partition, Policy(partition, 3))
    assert budget.counts == (1, 3)
    assert budget(normal(9, 4), 0).sum(1).tolist() == [1] * 9
    assert budget(normal(9, 4), 1).sum(1).tolist() == [3] * 9


@pytest.mark.parametrize("count", [0, -1, 6])
def test_a_budget_of_no_group_or_more_than_there_are_is_refused(count):
    with pytest.raises(UsageError, match=f"a budget must be from 1 to 5 groups, not {count}"):
        Budget((count,))(normal(3, 5), 0)


@pytest.mark.parametrize("activity", [0, 0.0, -0.5, 1.01, math.nan, math.inf])
def test_an_activity_that_is_no_share_is_refused(activity):
    partition = make_partition("balanced", [16, 16], 4, seeded(), "layer")
    said = rf"activity must be in \(0, 1\], not {activity}"
    with pytest.raises(UsageError, match=said):
        Budget.of(activity, partition, Policy(partition, 3))
    with pytest.raises(UsageError, match=said):
        asked_by_gate((0.5, activity), 2)


@pytest.mark.parametrize("asked", [(), (0.5,), (0.5, 0.5, 0.5)])
def test_as_many_activities_as_gates_are_needed(asked):
    partition = make_partition("balanced", [16, 16], 4, seeded(), "layer")
    with pytest.raises(UsageError, match=f"one for each of the 2 gates, not {len(asked)}"):
        Budget.of(asked, partition, Policy(partition, 3))


def test_one_activity_is_for_all_gates():
    assert asked_by_gate(0.3, 3) == asked_by_gate([0.3, 0.3, 0.3], 3) == (0.3, 0.3, 0.3)
    assert asked_by_gate(1, 2) == (1, 1)


def reached(mask, sizes):
    """Activity by a plain loop over examples and groups."""
    evaluated = sum(size for row in mask.tolist() for bit, size in zip(row, sizes, strict=True) if bit)
    return evaluated / (sum(sizes) * len(mask))


def neighbours(value):
    """A float32 number with the two next to it."""
    middle = np.float32(value)
    return [float(np.nextafter(middle, np.float32(end))) for end in (-np.inf, np.inf)] + [float(middle)]


@st.composite
def calibration(draw):
    """Logits with ties and neighbouring numbers, and groups of any sizes, some of them empty."""
    groups, examples = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    close = neighbours(draw(st.floats(-10, 10, width=32)))
    value = st.one_of(st.sampled_from([-1.5, 0.0, 0.25]), st.sampled_from(close), st.floats(-1e6, 1e6, width=32))
    rows = draw(st.lists(st.lists(value, min_size=groups, max_size=groups), min_size=examples, max_size=examples))
    sizes = draw(st.lists(st.integers(0, 9), min_size=groups, max_size=groups).filter(any))
    return torch.tensor(rows), sizes


@given(calibration(), st.floats(0, 1, exclude_min=True))
def test_the_level_reaches_the_nearest_activity_of_all_cuts(case, activity):
    logits, sizes = case
    cuts = [math.inf, -math.inf, *logits.flatten().tolist()]
    nearest = min(abs(reached(logits > cut, sizes) - activity) for cut in cuts)
    chosen = Threshold((level_for(logits, torch.tensor(sizes), activity),))(logits, 0)
    assert abs(reached(chosen, sizes) - activity) == pytest.approx(nearest, abs=1e-9)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, 1 + 2**-23, 3e-39, 1e30])
def test_the_level_separates_neighbouring_numbers(value):
    lower, upper, middle = neighbours(value)
    for low, high in ((lower, middle), (middle, upper)):
        logits = torch.tensor([[low, high]])
        level = level_for(logits, torch.tensor([3, 3]), 0.5)
        assert Threshold((level,))(logits, 0).tolist() == [[False, True]]


@given(calibration())
def test_asked_for_everything_the_level_sets_all_groups(case):
    logits, sizes = case
    assert (logits > level_for(logits, torch.tensor(sizes), 1)).all()
    assert (logits > level_for(logits, torch.tensor(sizes), 1.0)).all()


def test_the_level_lies_half_way_between_the_two_logits():
    logits = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert level_for(logits, torch.tensor([4, 4]), 0.5) == 2.5


def test_equal_logits_stand_or_fall_together():
    logits, sizes = torch.full((4, 3), 0.7), torch.tensor([1, 2, 3])
    assert not (logits > level_for(logits, sizes, 0.3)).any()
    assert (logits > level_for(logits, sizes, 0.7)).all()


def test_large_groups_weigh_more():
    logits, sizes = torch.tensor([[2.0, 1.0]]), torch.tensor([1, 9])
    assert (logits > level_for(logits, sizes, 0.3)).tolist() == [[True, False]]
    assert (logits > level_for(logits, sizes, 0.6)).tolist() == [[True, True]]


def test_blind_draws_come_at_their_rates_whatever_the_input():
    rates, count = torch.tensor([0.0, 0.1, 0.5, 1.0]), 20_000
    mask = Blind((rates,), seeded())(normal(count, 4), 0)
    assert not mask[:, 0].any()
    assert mask[:, 3].all()
    hits = mask[:, 1:3].sum(0).numpy()
    expected = np.array([0.1, 0.5]) * count
    spread = np.sqrt(expected * (1 - np.array([0.1, 0.5])))
    assert (np.abs(hits - expected) < 4 * spread).all()
    assert torch.equal(mask, Blind((rates,), seeded())(torch.full((count, 4), 1e9), 0))


either_scope = pytest.mark.parametrize("scope", SCOPES)


def with_always_on(scope, pool=None):
    """A lazy network whose policy always evaluates group 0, and the same policy without that."""
    partition = make_partition("balanced", [8, 9], 4, seeded(), scope)
    policy, plain = (Policy(partition, 16, pool, seeded(1), always_on=on) for on in (True, False))
    return LazyNetwork(MLP(16, (8, 9), 3, generator=seeded()), partition, policy, Sample(seeded(2))), plain


def of_each_gate(bits):
    return bits.split(4, 1)


@pytest.mark.parametrize("pool", [None, Pool((1, 4, 4), 2)], ids=["whole", "pooled"])
@either_scope
def test_an_always_on_group_has_a_fixed_logit_and_leaves_the_others_as_they_are(scope, pool):
    lazy, plain = with_always_on(scope, pool)
    for gate, read in enumerate(lazy.policy.reads()):
        s = normal(20, read)
        logits = lazy.policy.logits(gate, s)
        assert (logits[:, 0] == ALWAYS).all()
        assert (logits[:, 0].sigmoid() == 1).all()
        assert torch.equal(logits[:, 1:], plain.logits(gate, s)[:, 1:])
    assert (lazy.policy.bits, lazy.policy.reads()) == (plain.bits, plain.reads())


@either_scope
def test_an_always_on_group_is_evaluated_however_a_mask_is_decided(scope):
    lazy, x = with_always_on(scope)[0], normal(5000, 16)
    gates = len(lazy.policy.gates)
    decisions = [lazy.decision, Threshold.at(0.5, lazy.policy), Threshold.at(0.99, lazy.policy)]
    decisions += [Budget((count,) * gates) for count in (1, 2, 4)]
    decisions += [calibrated(lazy, x, asked).decision for asked in (0.25, 0.3, 0.6, 1)]
    for decision in decisions:
        mask = evaluate(LazyNetwork(lazy.target, lazy.partition, lazy.policy, decision), x).mask
        assert all(bits[:, 0].all() for bits in of_each_gate(mask))


@either_scope
def test_an_always_on_group_adds_nothing_to_log_probabilities_and_takes_no_gradient(scope):
    lazy = with_always_on(scope)[0]
    found = lazy.evaluate(normal(50, 16))
    chances = log_probability(found.logits, found.mask)
    others = torch.ones(found.logits.shape[1], dtype=torch.bool)
    others[::4] = False
    torch.testing.assert_close(chances, log_probability(found.logits[:, others], found.mask[:, others]))
    sparsity = sparsity_loss(found.logits.sigmoid(), 0.25, 1.0, 0.5)
    assert chances.isfinite().all()
    assert sparsity.isfinite()
    (chances.sum() + sparsity).backward()
    for gate in lazy.policy.gates:
        assert not gate.weight.grad[0].any()
        assert gate.bias.grad[0] == 0
        assert gate.bias.grad[1:].all()


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_an_always_on_group_cannot_be_outranked_or_thresholded_away(scope):
    generator = torch.Generator().manual_seed(0)
    target = MLP(6, (8, 8), 3, generator=generator)
    partition = make_partition("balanced", target.hidden, 4, generator, scope)
    policy = Policy(partition, 6, generator=generator, always_on=True)
    with torch.no_grad():
        for gate in policy.gates:
            gate.weight.mul_(1e4)
    x = torch.randn(50, 6, generator=generator)
    lazy = LazyNetwork(target, partition, policy, Budget((1,) * len(policy.gates)))
    for network in (lazy, calibrated(lazy, x, 0.05), calibrated(lazy, x, 0.3)):
        mask = network.evaluate(x).mask
        assert mask[:, :: partition.groups].all()
    assert lazy.evaluate(x).mask.sum(1).eq(len(policy.gates)).all()
