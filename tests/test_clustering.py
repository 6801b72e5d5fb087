"""Balanced clustering: capacities and assignments by brute force, planted groups found again, bad input refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condcomp_lib.coactivation import coactivation, firing_patterns
from condcomp_lib.errors import UsageError
from condcomp_lib.partitioners.clustering import (
    Fixed,
    activation_partition,
    always_on_partition,
    assigned,
    balanced_kmeans,
    capacities,
    spectral_partition,
    weight_partition,
)
from condcomp_lib.partitions import SCOPES, make_partition
from condcomp_lib.targets import MLP

BY_PATTERNS = {"activation": activation_partition, "spectral": spectral_partition, "always-on": always_on_partition}
SEEDS = range(10)
either_scope = pytest.mark.parametrize("scope", SCOPES)
every_kind = pytest.mark.parametrize("kind", ["weights", *BY_PATTERNS])
every_pattern_kind = pytest.mark.parametrize("kind", BY_PATTERNS)
seeds = st.integers(0, 2**32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_patterns(examples, neurons, seed=0):
    return torch.rand(examples, neurons, generator=seeded(seed)) < 0.4


def made(kind, widths, groups, scope, seed=0):
    """A partition of this kind of an untrained network, or of patterns that mean nothing."""
    if kind == "weights":
        return weight_partition(MLP(6, widths, 3, generator=seeded(5)), groups, seeded(seed), scope)
    return BY_PATTERNS[kind](random_patterns(40, sum(widths)), widths, groups, seeded(seed), scope)


def spread(sizes):
    return int(sizes.max() - sizes.min())


def check_even(partition):
    """Sizes differ by at most one: of the bits of a mask that compete, and within every layer."""
    for sizes in partition.sizes.split(partition.groups):
        assert spread(sizes) <= 1
    layers = [torch.bincount(groups, minlength=partition.groups) for groups in partition.membership]
    assert all(spread(sizes) <= 1 for sizes in layers)


def grouping(labels):
    """The sets of neurons that share a label, whatever its name."""
    return {frozenset(i for i, label in enumerate(labels) if label == name) for name in labels}


def planted(widths, groups, seed):
    """Even true groups of every layer, shuffled."""
    labels = [torch.arange(width) % groups for width in widths]
    generator = seeded(seed + 1000)
    return [label[torch.randperm(len(label), generator=generator)] for label in labels]


def finds(partition, truth, scope):
    """Whether the true groups were found: over all layers, or in each layer whatever the names elsewhere."""
    if scope == "network":
        return grouping(torch.cat(partition.membership).tolist()) == grouping(torch.cat(truth).tolist())
    pairs = zip(partition.membership, truth, strict=True)
    return all(grouping(found.tolist()) == grouping(label.tolist()) for found, label in pairs)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from(SCOPES), st.data())
def test_capacities_are_even_in_every_layer_and_in_scope_network_in_total(widths, scope, data):
    groups = data.draw(st.integers(1, sum(widths) if scope == "network" else min(widths)))
    found = capacities(widths, groups, scope)
    assert [int(counts.sum()) for counts in found] == widths
    assert all(counts.shape == (groups,) and counts.dtype == torch.int64 and spread(counts) <= 1 for counts in found)
    if scope == "network":
        assert spread(sum(found)) <= 1
    else:
        assert all(torch.equal(counts, capacities([n], groups)[0]) for n, counts in zip(widths, found, strict=True))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), seeds, st.data())
def test_each_layer_has_its_own_number_of_groups_evenly_filled(widths, seed, data):
    counts = [data.draw(st.integers(1, width)) for width in widths]
    patterns = torch.rand(9, sum(widths), generator=seeded(seed)) < 0.5

    def proposed(kind, groups):
        if kind == "weights":
            return weight_partition(MLP(6, widths, 3, generator=seeded(5)), groups, seeded(seed), "layer")
        return activation_partition(patterns, widths, groups, seeded(seed), "layer")

    for kind in ("activation", "weights"):
        found = proposed(kind, counts)
        assert found.scope == "layer"
        assert list(found.groups_by_layer) == counts
        for groups, width, count in zip(found.membership, widths, counts, strict=True):
            assert torch.equal(torch.bincount(groups), capacities([width], count)[0])
        if len(set(counts)) == 1:  # as with one number for all
            same = proposed(kind, counts[0])
            assert all(torch.equal(*pair) for pair in zip(found.membership, same.membership, strict=True))


@pytest.mark.parametrize("counts", [(2,), (2, 9), (0, 2)])
def test_numbers_of_groups_that_do_not_fit_the_layers_are_refused(counts):
    with pytest.raises(UsageError, match="groups"):
        activation_partition(torch.ones(3, 9) > 0, [5, 4], counts, seeded(), "layer")
    with pytest.raises(UsageError, match="groups"):
        weight_partition(MLP(6, [5, 4], 3), counts, seeded(), "layer")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(lambda sizes: 1 <= sum(sizes) <= 6), seeds)
def test_an_assignment_is_the_cheapest_of_all_that_fill_the_capacities(capacity, seed):
    cost = torch.rand(sum(capacity), len(capacity), generator=seeded(seed))
    places = [group for group, count in enumerate(capacity) for _ in range(count)]
    cheapest = min(sum(cost[i, j].item() for i, j in enumerate(tried)) for tried in itertools.permutations(places))
    groups = assigned(cost, torch.tensor(capacity))
    assert sorted(groups.tolist()) == places
    assert sum(cost[i, j].item() for i, j in enumerate(groups.tolist())) == pytest.approx(cheapest, abs=1e-6)


@pytest.mark.parametrize("capacity", [[1, 1], [2, 2], [0, 0]])
def test_capacities_for_more_or_fewer_neurons_are_refused(capacity):
    with pytest.raises(UsageError, match=f"capacities for {sum(capacity)} neurons cannot hold 3"):
        assigned(torch.zeros(3, 2), torch.tensor(capacity))


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=3), seeds)
def test_kmeans_fills_exactly_the_capacities_of_every_layer(capacity, seed):
    counts, neurons = [torch.tensor(sizes) for sizes in capacity], sum(map(sum, capacity))
    features = torch.randn(neurons + 3, 4, generator=seeded(seed))
    counts.append(torch.tensor([1, 1, 1]))  # so that there are as many neurons as groups
    found = balanced_kmeans(features, counts, seeded(seed))
    assert [torch.bincount(groups, minlength=3).tolist() for groups in found] == [sizes.tolist() for sizes in counts]


def test_kmeans_finds_separated_clusters_across_layers():
    found = []
    for seed in SEEDS:
        truth = planted([12, 20], 4, seed)
        centres = 10 * torch.eye(4, 6)
        features = centres[torch.cat(truth)] + 0.5 * torch.randn(32, 6, generator=seeded(seed))
        groups = balanced_kmeans(features, capacities([12, 20], 4), seeded(seed))
        found.append(grouping(torch.cat(groups).tolist()) == grouping(torch.cat(truth).tolist()))
    assert sum(found) >= 9


@pytest.mark.parametrize("seed", range(5))
def test_no_swap_of_two_neurons_of_a_layer_brings_them_nearer_to_their_centres(seed):
    features, widths = torch.randn(24, 3, generator=seeded(seed)).double(), [14, 10]
    groups = torch.cat(balanced_kmeans(features, capacities(widths, 4), seeded(seed))).tolist()
    members = [[i for i in range(24) if groups[i] == j] for j in range(4)]
    centres = [[sum(features[i, d].item() for i in rows) / len(rows) for d in range(3)] for rows in members]
    away = [[math.dist(row, centre) ** 2 for centre in centres] for row in features.tolist()]
    for layer in (range(14), range(14, 24)):
        for one, other in itertools.combinations(layer, 2):
            swapped = away[one][groups[other]] + away[other][groups[one]]
            assert away[one][groups[one]] + away[other][groups[other]] <= swapped + 1e-9


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
def test_equal_neurons_are_shared_out_all_the_same(value):
    found = balanced_kmeans(torch.full((11, 5), value), capacities([7, 4], 3), seeded())
    assert torch.equal(torch.bincount(torch.cat(found)), sum(capacities([7, 4], 3)))


@pytest.mark.parametrize(("widths", "groups"), [([7, 12, 5], 4), ([9, 6], 5), ([5, 5, 5], 5), ([8], 2), ([3, 31], 3)])
@either_scope
@every_kind
def test_groups_are_equal_within_one_in_total_and_in_every_layer(kind, scope, widths, groups):
    partition = made(kind, widths, groups, scope)
    assert (partition.widths, partition.groups, partition.scope) == (tuple(widths), groups, scope)
    check_even(partition)


@every_pattern_kind
def test_in_scope_network_there_may_be_more_groups_than_a_layer_has_neurons(kind):
    check_even(made(kind, [7, 12, 2], 9, "network"))
    check_even(made(kind, [2, 1, 3], 6, "network"))


@either_scope
@every_kind
def test_a_partition_follows_its_generator_and_leaves_the_global_one_alone(kind, scope):
    before = torch.get_rng_state()
    first, again, other = (torch.cat(made(kind, [20, 15], 4, scope, seed).membership) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def planted_network(truth, seed):
    """Neurons of a group point the same way; in the second layer they add up their group's of the first, and take away
    another's."""
    generator = seeded(seed)
    target = MLP(10, [len(labels) for labels in truth], 3, generator=generator)
    ahead = (truth[0] - truth[1][:, None]) % 4
    joined = (ahead == 0).float() - 2 * (ahead == 1).float()
    weights = (torch.randn(4, 10, generator=generator)[truth[0]], joined)
    with torch.no_grad():
        for layer, weight in zip(target.linears, weights, strict=False):
            lengths = 0.3 + 3 * torch.rand(len(weight), 1, generator=generator)
            layer.weight.copy_(lengths * (weight + 0.1 * torch.randn(weight.shape, generator=generator)))
    return target


@either_scope
def test_planted_weights_are_found(scope):
    found = []
    for seed in SEEDS:
        truth = planted([16, 12], 4, seed)
        found.append(finds(weight_partition(planted_network(truth, seed), 4, seeded(seed), scope), truth, scope))
    assert sum(found) >= 9


def planted_patterns(truth, seed, scope, always=False):
    """Each true group fires on its own subset of 400 examples, some neurons more often than others; the subsets are of
    all layers together, or each layer's own. Group 0 fires `always`."""
    generator, parts = seeded(seed), []
    kinds = torch.randint(4, (len(truth), 400, 1), generator=generator)
    for layer, labels in enumerate(truth):
        rates = 0.6 + 0.4 * torch.rand(len(labels), generator=generator)
        subset = kinds[layer if scope == "layer" else 0] == labels
        fired = subset & (torch.rand(subset.shape, generator=generator) < rates)
        parts.append(fired | (labels == 0) if always else fired)
    return torch.cat(parts, 1)


@either_scope
@every_pattern_kind
def test_planted_groups_of_patterns_are_found(kind, scope):
    found = []
    for seed in SEEDS:
        truth = planted([12, 20], 4, seed)
        patterns = planted_patterns(truth, seed, scope, always=kind == "always-on")
        found.append(finds(BY_PATTERNS[kind](patterns, [12, 20], 4, seeded(seed), scope), truth, scope))
    assert sum(found) >= 9


@every_pattern_kind
def test_in_scope_layer_a_layer_is_split_as_if_it_were_alone(kind):
    patterns = random_patterns(40, 25)
    together = BY_PATTERNS[kind](patterns, [15, 10], 4, seeded(), "layer")
    alone = BY_PATTERNS[kind](patterns[:, :15], [15], 4, seeded(), "layer")
    assert torch.equal(together.membership[0], alone.membership[0])


@pytest.mark.parametrize("alive", [0, 1, 2, 9])
@either_scope
@every_pattern_kind
def test_neurons_that_never_fire_or_always_fill_the_places_that_are_left(kind, scope, alive):
    patterns, order = random_patterns(30, 17), torch.randperm(17, generator=seeded())
    for fires in (False, True):
        patterns[:, order[alive:]] = fires
        check_even(BY_PATTERNS[kind](patterns, [10, 7], 4, seeded(), scope))


@pytest.mark.parametrize("dead", ["some", "all"])
@either_scope
def test_weights_of_zero_give_an_even_partition(scope, dead):
    target = MLP(6, [10, 7], 3, generator=seeded())
    with torch.no_grad():
        for layer in target.linears:
            layer.weight[: None if dead == "all" else 4] = 0
    check_even(weight_partition(target, 4, seeded(), scope))


@either_scope
def test_the_always_on_group_holds_the_most_active_neurons_of_each_layer(scope):
    widths, patterns = [7, 12, 5], torch.rand(100, 24, generator=seeded()) < torch.linspace(0.1, 0.9, 24)
    partition = always_on_partition(patterns, widths, 4, seeded(), scope)
    for groups, fired in zip(partition.membership, patterns.split(widths, 1), strict=True):
        counts = fired.sum(0)
        assert counts[groups == 0].min() >= counts[groups != 0].max()


def test_clusters_of_weights_must_fit_into_the_smallest_layer():
    target = MLP(6, [9, 4], 3, generator=seeded())
    with pytest.raises(UsageError, match="groups must be at most the 4 neurons of the smallest layer, not 5"):
        weight_partition(target, 5, seeded(), "network")
    with pytest.raises(UsageError, match="groups must be from 1 to the 4 neurons of the smallest layer, not 5"):
        weight_partition(target, 5, seeded(), "layer")


def test_an_always_on_group_alone_is_refused():
    with pytest.raises(UsageError, match="groups must be at least 2, not 1"):
        made("always-on", [7, 5], 1, "network")


@pytest.mark.parametrize("shape", [(30, 16), (17, 30), (0, 17), (17,), (2, 30, 17)])
@every_pattern_kind
def test_patterns_of_another_shape_are_refused(kind, shape):
    with pytest.raises(UsageError, match=r"firing patterns must be examples x 17 neurons .* not of shape \["):
        BY_PATTERNS[kind](torch.ones(shape, dtype=torch.bool), [10, 7], 4, seeded())


@pytest.mark.parametrize(("scope", "groups"), [("network", 0), ("network", 13), ("layer", 0), ("layer", 6)])
@every_kind
def test_a_number_of_groups_that_the_layers_cannot_hold_is_refused(kind, scope, groups):
    with pytest.raises(UsageError, match=f"groups must be .*, not {groups}$"):
        made(kind, [7, 5], groups, scope)


@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_coactivation_equals_a_double_loop_with_firing_rates_on_its_diagonal(examples, neurons, seed):
    patterns = random_patterns(examples, neurons, seed)
    rows, found = patterns.tolist(), coactivation(patterns)
    for i, j in itertools.product(range(neurons), repeat=2):
        assert found[i, j].item() == pytest.approx(sum(row[i] and row[j] for row in rows) / examples, abs=1e-6)
    torch.testing.assert_close(found.diagonal(), patterns.float().mean(0))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_neurons_fire_where_they_are_above_zero(activation):
    target, x = MLP(5, (4, 3), 2, activation, seeded()), torch.randn(9, 5, generator=seeded(1))
    first = target.activation(target.linears[0](x))
    second = target.activation(target.linears[1](first))
    expected = torch.cat([first, second], 1) > 0
    assert torch.equal(firing_patterns(target, x), expected)
    assert torch.equal(firing_patterns(target, x, batch=4), expected)
    with pytest.raises(UsageError, match="there are no examples to look at"):
        firing_patterns(target, x[:0])


def test_a_fixed_partition_is_always_the_same_one_and_nothing_is_drawn():
    partition, generator = make_partition("random", [5, 4], 3, seeded()), seeded()
    fixed, before = Fixed(partition), generator.get_state()
    assert fixed.propose(generator) is fixed.best() is partition
    assert torch.equal(generator.get_state(), before)
    fixed.update(make_partition("random", [5, 4], 3, seeded(1)), 0.9)
    assert fixed.best() is partition
    with pytest.raises(UsageError, match="must be a finite number, not nan"):
        fixed.update(partition, math.nan)
