"""Partitions: every neuron in exactly one group, counts by plain loops, bad input refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condcomp_lib.errors import UsageError
from condcomp_lib.partitions import KINDS, SCOPES, Partition, make_partition

layers = st.lists(st.integers(1, 40), min_size=1, max_size=4)
seeds = st.integers(0, 2**32)


@st.composite
def made(draw, kinds=KINDS, scopes=SCOPES):
    """A partition of every kind and scope, with any number of groups that its layers can hold."""
    widths, scope = draw(layers), draw(st.sampled_from(scopes))
    groups = draw(st.integers(1, sum(widths) if scope == "network" else min(widths)))
    generator = torch.Generator().manual_seed(draw(seeds))
    return make_partition(draw(st.sampled_from(kinds)), widths, groups, generator, scope)


@st.composite
def given_by_hand(draw):
    """A partition of arbitrary membership, and a mask for some examples."""
    widths, scope = draw(layers), draw(st.sampled_from(SCOPES))
    groups = draw(st.integers(1, sum(widths) if scope == "network" else min(widths)))
    membership = [draw(st.lists(st.integers(0, groups - 1), min_size=w, max_size=w)) for w in widths]
    partition = Partition(tuple(torch.tensor(numbers) for numbers in membership), groups, scope)
    bits = groups * (len(widths) if scope == "layer" else 1)
    row = st.lists(st.booleans(), min_size=bits, max_size=bits)
    return partition, draw(st.lists(row, min_size=1, max_size=4))


def neurons_of_bits(partition):
    """For each bit, the (layer, neuron) pairs that it switches."""
    step = partition.groups if partition.scope == "layer" else 0
    found = {bit: [] for bit in range(partition.groups * (len(partition.membership) if step else 1))}
    for layer, groups in enumerate(partition.membership):
        for neuron, group in enumerate(groups.tolist()):
            found[group + layer * step].append((layer, neuron))
    return found


def runs(numbers):
    """The numbers with repetitions of the one before left out."""
    return [number for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1]]


@given(made())
def test_every_kind_and_scope_puts_each_neuron_into_exactly_one_group(partition):
    everything = {(layer, neuron) for layer, width in enumerate(partition.widths) for neuron in range(width)}
    groups = [
        {
            (layer, i)
            for layer, columns in enumerate(partition.columns)
            for i in (columns == bit).nonzero().flatten().tolist()
        }
        for bit in range(partition.bits)
    ]
    assert set().union(*groups) == everything
    assert sum(len(group) for group in groups) == len(everything)


@given(made())
def test_one_bit_at_a_time_evaluates_every_neuron_once(partition):
    one_by_one = partition.neurons(torch.eye(partition.bits, dtype=torch.bool))
    assert one_by_one.sum(0).tolist() == list(partition.widths)


@given(made(scopes=["layer"]))
def test_a_bit_of_scope_layer_switches_neurons_of_its_own_layer_only(partition):
    for bit, neurons in neurons_of_bits(partition).items():
        assert {layer for layer, _ in neurons} <= {bit // partition.groups}


@given(made(kinds=["balanced"]))
def test_balanced_sizes_differ_by_at_most_one(partition):
    for sizes in partition.sizes.split(partition.groups):
        assert sizes.max() - sizes.min() <= 1
        assert sizes.min() >= 1


@given(made(kinds=["contiguous"]))
def test_contiguous_groups_are_runs_whose_sizes_differ_by_at_most_one(partition):
    for width, groups in zip(partition.widths, partition.membership, strict=True):
        order = runs(groups.tolist())
        assert order == sorted(set(order))
        sizes = torch.bincount(groups, minlength=partition.groups)
        assert sizes.max() - sizes.min() <= 1
        assert len(order) == min(width, partition.groups)


@given(given_by_hand())
def test_counts_equal_plain_loops(case):
    partition, mask = case
    switched = neurons_of_bits(partition)
    depth, total = len(partition.membership), sum(len(groups) for groups in partition.membership)
    assert partition.bits == len(switched)
    assert partition.widths == tuple(len(groups) for groups in partition.membership)
    for bit, neurons in switched.items():
        assert all(partition.columns[layer][neuron] == bit for layer, neuron in neurons)
        assert partition.sizes[bit] == len(neurons)
        for layer in range(depth):
            assert partition.sizes_by_layer[layer, bit] == sum(1 for where, _ in neurons if where == layer)
    assert partition.largest_share == max(len(neurons) for neurons in switched.values()) / total
    evaluated = [[0] * depth for _ in mask]
    for example, bits in enumerate(mask):
        for bit, neurons in switched.items():
            for layer, _ in neurons:
                evaluated[example][layer] += bits[bit]
    assert partition.neurons(torch.tensor(mask)).tolist() == evaluated
    assert partition.activity(torch.tensor(mask)).tolist() == pytest.approx([sum(row) / total for row in evaluated])


@given(made())
def test_no_bit_evaluates_nothing_and_all_bits_everything(partition):
    mask = torch.tensor([[False], [True]]).expand(2, partition.bits)
    assert partition.activity(mask).tolist() == [0, 1]


def test_counts_are_int64_and_evaluated_neurons_float64():
    partition = make_partition("random", [5, 4], 3, torch.Generator(), "layer")
    assert {tensor.dtype for tensor in (*partition.columns, partition.sizes, partition.sizes_by_layer)} == {torch.int64}
    mask = torch.ones(2, 6, dtype=torch.bool)
    assert partition.neurons(mask).dtype == partition.activity(mask).dtype == torch.float64


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["random", "balanced"])
def test_a_drawn_partition_follows_its_generator_and_leaves_the_global_one_alone(kind, scope):
    before = torch.get_rng_state()
    drawn = [
        torch.cat(make_partition(kind, [30, 20], 4, torch.Generator().manual_seed(seed), scope).membership)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("kind", ["random", "balanced"])
def test_a_drawn_partition_differs_between_layers_and_moves_its_generator_on(kind):
    generator = torch.Generator().manual_seed(0)
    first, second = (make_partition(kind, [30, 30], 4, generator, "layer").membership for _ in range(2))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


def test_contiguous_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    make_partition("contiguous", [30, 20], 4, generator)
    assert torch.equal(generator.get_state(), before)


def test_random_groups_of_2400_neurons_hold_150_with_a_deviation_of_12():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.stack([make_partition("random", [800] * 3, 16, generator).sizes for _ in range(200)]).double()
    assert sizes.mean() == 150
    assert sizes.std().item() == pytest.approx((2400 * 1 / 16 * 15 / 16) ** 0.5, rel=0.05)
    assert sizes.mean(0).tolist() == pytest.approx([150] * 16, abs=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("scope", "groups", "said"),
    [
        ("network", 0, "groups must be from 1 to the 7 neurons of the network, not 0"),
        ("network", -2, "groups must be from 1 to the 7 neurons of the network, not -2"),
        ("network", 8, "groups must be from 1 to the 7 neurons of the network, not 8"),
        ("layer", 0, "groups must be from 1 to the 3 neurons of the smallest layer, not 0"),
        ("layer", 4, "groups must be from 1 to the 3 neurons of the smallest layer, not 4"),
    ],
)
def test_a_number_of_groups_that_the_layers_cannot_hold_is_refused(kind, scope, groups, said):
    with pytest.raises(UsageError, match=said):
        make_partition(kind, [4, 3], groups, torch.Generator(), scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_as_many_groups_as_neurons_are_allowed(scope):
    partition = make_partition("balanced", [3, 3], 6 if scope == "network" else 3, torch.Generator(), scope)
    assert partition.sizes.tolist() == [1] * 6


def test_a_partition_by_hand_is_held_to_the_same_number_of_groups():
    membership = (torch.zeros(4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UsageError, match="groups must be from 1 to the 7 neurons of the network, not 8"):
        Partition(membership, 8)
    with pytest.raises(UsageError, match="groups must be from 1 to the 3 neurons of the smallest layer, not 4"):
        Partition(membership, 4, "layer")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("widths", [[], [0], [4, 0, 3]])
def test_empty_layers_and_no_layers_are_refused(widths, scope):
    said = "a partition needs hidden layers of at least one neuron each, not widths " + str(widths).replace("[", r"\[")
    for kind in KINDS:
        with pytest.raises(UsageError, match=said):
            make_partition(kind, widths, 1, torch.Generator(), scope)
    with pytest.raises(UsageError, match=said):
        Partition(tuple(torch.zeros(width, dtype=torch.int64) for width in widths), 1, scope)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UsageError, match="unknown partition 'even'; known: balanced, contiguous, random"):
        make_partition("even", [4, 3], 2, torch.Generator())
    with pytest.raises(UsageError, match="unknown scope 'global'; known: layer, network"):
        make_partition("random", [4, 3], 2, torch.Generator(), "global")
    with pytest.raises(UsageError, match="unknown scope 'global'; known: layer, network"):
        Partition((torch.tensor([0, 1]),), 2, "global")


@pytest.mark.parametrize("outside", [-1, 2, 7])
def test_a_group_that_does_not_exist_is_named_with_its_layer(outside):
    with pytest.raises(UsageError, match=f"layer 2 has a neuron in group {outside}; groups go from 0 to 1"):
        Partition((torch.tensor([0, 1]), torch.tensor([1, outside, 0])), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_membership_of_another_type_is_refused(dtype):
    with pytest.raises(UsageError, match=f"membership of layer 2 must be one int64 number a neuron, not {dtype}"):
        Partition((torch.tensor([0, 1]), torch.tensor([0, 1]).to(dtype)), 2)


def test_membership_of_two_dimensions_is_refused_by_its_shape():
    with pytest.raises(UsageError, match=r"membership of layer 1 must be one int64 number a neuron, not .*2\D+3"):
        Partition((torch.zeros(2, 3, dtype=torch.int64),), 2)
