"""What policies learn from and are measured by: compute by example, relaxed masks, fills, the search over masks; and
what their training loop has of its own: moved pictures, learning rates by part."""

import copy
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condcomp_lib.errors import UsageError
from condcomp_lib.estimators.pathwise import StraightThrough
from condcomp_lib.fitting import OPTIMISERS, SCHEDULES, fit, plan
from condcomp_lib.lazy import RESCALES, LazyNetwork, calibrated, compensated, decided_by, evaluate
from condcomp_lib.oracle import MaskSearch
from condcomp_lib.partitions import SCOPES, Partition, make_partition
from condcomp_lib.policies import Budget, Policy, Pool, Sample, Threshold
from condcomp_lib.pretraining import shifted
from condcomp_lib.targets import MLP

either_scope = pytest.mark.parametrize("scope", SCOPES)
every_rescale = pytest.mark.parametrize("rescale", RESCALES)
either_pool = pytest.mark.parametrize("pool", [None, Pool((1, 4, 4), 2)], ids=["whole", "pooled"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(count, seed=1):
    return torch.randn(count, 16, generator=seeded(seed))


def lazy_network(scope, rescale="none", hidden=(9, 7, 8), groups=4, pool=None, decision=None, fill=None, **policy):
    """An untrained network whose policy's logits vary much by example; a partition of uneven groups."""
    target = MLP(16, hidden, 5, "tanh", seeded(1))
    partition = make_partition("random", hidden, groups, seeded(2), scope)
    policy = Policy(partition, 16, pool, seeded(3), **policy)
    with torch.no_grad():
        for gate in policy.gates:
            gate.weight.mul_(8)
    decision = decision or Threshold((0.0,) * len(policy.gates))
    return LazyNetwork(target, partition, policy, decision, rescale, fill)


def filling(hidden=(9, 7, 8), seed=8):
    return tuple(torch.randn(width, generator=seeded(seed)) for width in hidden)


def masks(lazy, count, seed=5):
    return torch.rand(count, lazy.partition.bits, generator=seeded(seed)) < 0.4


def given_bits(mask, groups):
    """A decision for these bits, whatever the logits."""
    return lambda logits, gate: mask[:, gate * groups : (gate + 1) * groups]


# compute, example by example


@either_pool
@either_scope
def test_each_examples_compute_is_what_its_mask_costs_alone_and_their_mean_what_all_cost(scope, pool):
    lazy = lazy_network(scope, pool=pool)
    mask = torch.cat([masks(lazy, 20), torch.zeros(1, lazy.partition.bits).bool()])
    found, full = lazy.computes(mask), lazy.target_cost().total_multiply_adds
    assert found.tolist() == pytest.approx([lazy.cost(row[None]).total_multiply_adds / full for row in mask])
    assert found.mean().item() == pytest.approx(lazy.cost(mask).total_multiply_adds / full)
    assert found.mean().item() == pytest.approx(lazy.compute(mask))


@either_pool
@either_scope
def test_compute_has_the_gradient_of_a_relaxed_mask(scope, pool):
    lazy = lazy_network(scope, pool=pool)
    relaxed = torch.rand(3, lazy.partition.bits, generator=seeded(), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lazy.computes, (relaxed,))
    lazy.computes(relaxed).sum().backward()
    switches = lazy.partition.sizes > 0
    assert (relaxed.grad[:, switches] > 0).all()
    assert not relaxed.grad[:, ~switches].any()


@either_scope
def test_compute_is_the_same_for_bits_and_for_numbers_that_stand_for_them(scope):
    lazy = lazy_network(scope)
    assert torch.equal(lazy.computes(masks(lazy, 9)), lazy.computes(masks(lazy, 9).float()))


# decisions for one evaluation


@every_rescale
@either_scope
def test_a_decision_given_decides_once_and_changes_nothing(scope, rescale):
    lazy, x, other = lazy_network(scope, rescale, decision=Sample(seeded(4))), inputs(20), Budget((2, 1, 3))
    decision, state = lazy.decision, lazy.decision.generator.get_state()
    found, expected = lazy.evaluate(x, decision=other), decided_by(lazy, other).evaluate(x)
    for name in ("scores", "mask", "logits"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert lazy.decision is decision
    assert torch.equal(decision.generator.get_state(), state)
    assert not torch.equal(lazy.evaluate(x).mask, found.mask)


@pytest.mark.parametrize("filled", [False, True])
@every_rescale
@either_scope
def test_bits_with_a_gradient_give_the_same_scores_as_bits(scope, rescale, filled):
    lazy, x = lazy_network(scope, rescale, fill=filling() if filled else None), inputs(12)
    bits = masks(lazy, 12)
    relaxed = bits.float().requires_grad_()
    plain, found = (lazy.evaluate(x, decision=given_bits(mask, 4)) for mask in (bits, relaxed))
    assert torch.equal(found.scores, plain.scores)
    assert torch.equal(found.logits, plain.logits)
    assert torch.equal(found.mask.bool(), plain.mask)
    lazy.requires_grad_(False)
    lazy.evaluate(x, decision=given_bits(relaxed, 4)).scores.square().sum().backward()
    assert relaxed.grad.any(0)[lazy.partition.sizes > 0].all()


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("rescale", ["none", "activity"])
@either_scope
def test_the_gradient_of_a_relaxed_mask_is_that_of_finite_differences(scope, rescale, filled):
    lazy = lazy_network(scope, rescale, hidden=(5, 4), groups=3, fill=filling((5, 4)) if filled else None).double()
    if filled:
        lazy.fill = tuple(values.double() for values in lazy.fill)
    vars(lazy.partition)["rows"] = tuple(rows.double() for rows in lazy.partition.rows)  # cached there as float32
    x = inputs(2).double()
    mask = 0.2 + 0.8 * torch.rand(2, lazy.partition.bits, generator=seeded(), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda relaxed: lazy.evaluate(x, decision=given_bits(relaxed, 3)).scores, (mask.requires_grad_(),)
    )


@either_scope
def test_hidden_activations_are_those_before_the_mask(scope):
    lazy, x = lazy_network(scope), inputs(12)
    found = lazy.evaluate(x)
    h = x
    for hidden, layer, columns in zip(found.hidden, lazy.target.linears, lazy.partition.columns, strict=False):
        torch.testing.assert_close(hidden, layer(h).tanh())
        h = hidden * found.mask[:, columns]
    assert len(found.hidden) == 3
    assert (found.hidden[0] != 0).all()
    assert evaluate(lazy, x).hidden == ()


@either_scope
def test_a_partitions_rows_say_for_each_group_which_neurons_it_holds(scope):
    membership = (torch.tensor([0, 2, 2, 0]), torch.tensor([2, 2, 0]))
    for rows, groups in zip(Partition(membership, 3, scope).rows, membership, strict=True):
        assert rows.dtype == torch.float32
        assert rows.tolist() == [[float(group == own) for own in groups.tolist()] for group in range(3)]


# fills


@pytest.mark.parametrize("hidden", [(9, 7), (9, 8, 7), (9, 7, 8, 5), ()])
def test_a_fill_of_other_sizes_is_refused(hidden):
    said = f"fill must hold one number for each neuron of hidden layers [9, 7, 8], not {list(hidden)}"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        lazy_network("network", fill=filling(hidden))


@every_rescale
@either_scope
def test_a_fill_of_zeros_is_no_fill(scope, rescale):
    none = tuple(torch.zeros(width) for width in (9, 7, 8))
    one, other = (lazy_network(scope, rescale, fill=fill, decision=Sample(seeded(4))) for fill in (None, none))
    expected, found = one.evaluate(inputs(20)), other.evaluate(inputs(20))
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.logits, expected.logits)


def scores_by_loops(lazy, x, mask):
    """Scores of one example with skipped neurons at their fill, one product at a time."""
    h, *above = x.tolist(), *lazy.target.linears
    for index, (layer, columns) in enumerate(zip(above[:-1], lazy.partition.columns, strict=True)):
        bits = [float(mask[column]) for column in columns.tolist()]
        scale = len(bits) / max(sum(bits), 1) if lazy.rescale == "activity" else 1.0
        full = nn.functional.linear(torch.tensor(h), layer.weight, layer.bias).tanh().tolist()
        fill = lazy.fill[index].tolist()
        h = [value * scale * bit + own * (1 - bit) for value, own, bit in zip(full, fill, bits, strict=True)]
    weight, bias = above[-1].weight.tolist(), above[-1].bias.tolist()
    return [sum(w * value for w, value in zip(row, h, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


@pytest.mark.parametrize("rescale", ["none", "activity"])
@either_scope
def test_skipped_neurons_count_as_their_fill_and_kept_ones_as_before(scope, rescale):
    lazy, x = lazy_network(scope, rescale, fill=filling()), inputs(12)
    found = lazy.evaluate(x)
    expected = [scores_by_loops(lazy, row, mask) for row, mask in zip(x, found.mask.tolist(), strict=True)]
    assert 0 < found.mask.double().mean() < 1
    torch.testing.assert_close(found.scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@every_rescale
@either_scope
def test_with_every_bit_set_a_fill_counts_for_nothing(scope, rescale):
    lazy, x = lazy_network(scope, rescale, fill=filling(), decision=Budget((4, 4, 4))), inputs(12)
    assert torch.equal(lazy(x), lazy.target(x))


def test_gates_read_what_was_evaluated_and_not_the_fill():
    fill = tuple(100 * values for values in filling())
    lazy, x = lazy_network("layer", fill=fill), inputs(12)
    found = lazy.evaluate(x)
    logits = found.logits.split(4, dim=1)
    for gate, (below, columns) in enumerate(zip(found.hidden[:-1], lazy.partition.columns[:-1], strict=True), 1):
        torch.testing.assert_close(logits[gate], lazy.policy.logits(gate, below * found.mask[:, columns]))
    without = lazy_network("layer").evaluate(x).logits.split(4, dim=1)
    assert torch.equal(logits[1], without[1])
    assert not torch.equal(logits[2], without[2])  # it reads neurons that read the fill


@either_scope
def test_a_fill_goes_along_with_other_decisions(scope):
    lazy = lazy_network(scope, fill=filling())
    assert decided_by(lazy, Budget((1, 1, 1))).fill is lazy.fill
    assert calibrated(lazy, inputs(50), 0.5).fill is lazy.fill


def means_where_skipped(lazy, x, mask):
    """For each neuron its mean over the examples that skip it, given the means of the layers below."""
    h, fills = x, []
    for layer, columns in zip(lazy.target.linears[:-1], lazy.partition.columns, strict=True):
        full, bits, means = layer(h).tanh(), mask[:, columns], []
        for neuron in range(len(columns)):
            skipped = [full[i, neuron].item() for i in range(len(x)) if not bits[i, neuron]]
            means.append(sum(skipped) / len(skipped) if skipped else 0.0)
        fills.append(torch.tensor(means))
        h = torch.where(bits, full, fills[-1])
    return fills


@pytest.mark.parametrize("batch", [2048, 7])
@either_scope
def test_compensation_fills_in_each_neurons_mean_over_the_examples_that_skip_it(scope, batch):
    lazy, x = lazy_network(scope, always_on=True), inputs(50)
    filled = compensated(lazy, x, batch)
    torch.testing.assert_close(list(filled.fill), means_where_skipped(lazy, x, filled.evaluate(x).mask))
    for values, groups in zip(filled.fill, lazy.partition.membership, strict=True):
        assert not values[groups == 0].any()  # the always-on group is never skipped
        assert values[groups != 0].any()


@either_scope
def test_where_nothing_is_skipped_nothing_is_filled_in(scope):
    filled = compensated(lazy_network(scope, decision=Budget((4, 4, 4))), inputs(20))
    assert not any(values.any() for values in filled.fill)


@either_scope
def test_compensation_costs_nothing_and_leaves_the_network_as_it_was(scope):
    lazy, x = lazy_network(scope, "activity"), inputs(50)
    before, filled = copy.deepcopy(lazy.state_dict()), compensated(lazy, x)
    mask = filled.evaluate(x).mask
    assert filled.cost(mask) == lazy.cost(mask)
    assert lazy.fill is None
    assert (filled.target, filled.policy, filled.decision) == (lazy.target, lazy.policy, lazy.decision)
    assert filled.rescale == "activity"
    assert all(torch.equal(value, before[name]) for name, value in lazy.state_dict().items())


def test_compensation_gives_one_hidden_layer_the_targets_mean_scores():
    lazy, x = lazy_network("network", hidden=(9,)), inputs(50)
    filled = compensated(lazy, x)
    torch.testing.assert_close(filled(x).mean(0), lazy.target(x).mean(0))
    assert not torch.allclose(lazy(x).mean(0), lazy.target(x).mean(0), atol=1e-2)


def test_compensation_starts_anew_where_a_fill_was():
    lazy, x = lazy_network("network"), inputs(50)
    once = compensated(lazy, x)
    again = compensated(once, x)
    for one, other in zip(once.fill, again.fill, strict=True):
        assert torch.equal(one, other)


# the search over masks

TINY = {"network": ((6, 5), 4, (2,)), "layer": ((6, 5), 3, (1, 2))}


def searched(scope, counts=None, batch=4096, **changed):
    hidden, groups, asked = TINY[scope]
    lazy = lazy_network(scope, hidden=hidden, groups=groups, **changed)
    return MaskSearch(lazy, counts or asked, batch)


def divergence(lazy, x, mask):
    """Of one example's prediction under its mask from the full one, in float64."""
    predictions = []
    for bits in ([True] * lazy.partition.bits, mask):
        h = x.double().numpy()
        for layer, columns in zip(lazy.target.linears[:-1], lazy.partition.columns, strict=True):
            weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
            h = np.tanh(weight @ h + bias) * np.array([float(bits[column]) for column in columns.tolist()])
        last = lazy.target.linears[-1]
        scores = last.weight.detach().double().numpy() @ h + last.bias.detach().double().numpy()
        predictions.append(np.exp(scores) / np.exp(scores).sum())
    full, found = predictions
    return float((full * np.log(full / found)).sum())


def leave_out(search, x):
    """The mask of one example when the least missed group that may go goes, again and again."""
    groups, mask = search.lazy.partition.groups, [True] * search.lazy.partition.bits
    while True:
        left = [sum(mask[start : start + groups]) for start in range(0, len(mask), groups)]
        may_go = [bit for bit, on in enumerate(mask) if on and left[bit // groups] > search.counts[bit // groups]]
        if not may_go:
            return mask
        without = {bit: divergence(search.lazy, x, [*mask[:bit], False, *mask[bit + 1 :]]) for bit in may_go}
        mask[min(without, key=without.get)] = False


def exchanges(mask, groups):
    """All masks that differ by one exchange within a gate."""
    for on, off in itertools.permutations(range(len(mask)), 2):
        if mask[on] and not mask[off] and on // groups == off // groups:
            yield [bit if place not in (on, off) else place == off for place, bit in enumerate(mask)]


def random_masks(search, count, seed=6):
    """Masks with the asked number of groups of every gate, drawn without looking at anything."""
    draws = torch.rand(count, len(search.counts), search.lazy.partition.groups, generator=seeded(seed))
    chosen = [Budget(search.counts)(draws[:, gate], gate) for gate in range(len(search.counts))]
    return torch.cat(chosen, 1)


@pytest.mark.parametrize("batch", [4096, 5])
@either_scope
def test_divergences_equal_a_plain_computation(scope, batch):
    search, x = searched(scope, batch=batch), inputs(7)
    tried = torch.rand(7, 4, search.lazy.partition.bits, generator=seeded()) < 0.5
    tried[:, 0] = True
    found = search.distances(x, tried)
    for row, bits, own in zip(x, tried.tolist(), found, strict=True):
        assert own.tolist() == pytest.approx([divergence(search.lazy, row, mask) for mask in bits], rel=1e-4, abs=1e-6)
    assert found[:, 0].tolist() == pytest.approx([0] * 7, abs=1e-7)


@pytest.mark.parametrize("batch", [4096, 5])
@either_scope
def test_the_greedy_search_equals_a_plain_loop(scope, batch):
    search, x = searched(scope, batch=batch), inputs(12)
    assert search.greedy(x).tolist() == [leave_out(search, row) for row in x]


@settings(max_examples=20)
@given(st.sampled_from(SCOPES), st.data())
def test_every_mask_found_has_the_asked_groups_of_each_gate(scope, data):
    _, groups, own = TINY[scope]
    counts = data.draw(st.tuples(*[st.integers(1, groups)] * len(own)))
    search, x = searched(scope, counts), inputs(5)
    for mask in (search.greedy(x), search.improve(x, random_masks(search, 5))):
        assert mask.dtype == torch.bool
        assert mask.view(5, len(counts), groups).sum(2).tolist() == [list(counts)] * 5


@pytest.mark.parametrize("fill", [None, filling((6, 5))], ids=["zero", "filled"])
@either_scope
def test_exchanges_never_raise_a_divergence_and_end_where_none_lowers_it(scope, fill):
    search, x = searched(scope, fill=fill), inputs(20)
    start = random_masks(search, 20)
    kept, groups = start.clone(), search.lazy.partition.groups
    before, now = search.distances(x, start[:, None])[:, 0], start
    for rounds in (1, 2, 50):
        now = search.improve(x, start, rounds)
        after = search.distances(x, now[:, None])[:, 0]
        assert (after <= before + 1e-7).all()
        before = after
    assert (after < search.distances(x, start[:, None])[:, 0]).any()
    tried = torch.tensor([list(exchanges(mask, groups)) for mask in now.tolist()])
    assert (search.distances(x, tried).amin(1) >= after - 1e-7).all()
    assert torch.equal(start, kept)
    assert torch.equal(search.improve(x, start, 0), start)


@either_scope
def test_the_searchs_scores_are_the_lazy_networks_under_the_mask(scope):
    search, x = searched(scope), inputs(12)
    mask = search.greedy(x)
    assert torch.equal(search.scores(x, mask), search.lazy.masked_scores(x, mask.clone()))
    everything = torch.ones_like(mask)
    assert torch.equal(search.scores(x, everything), search.lazy.target(x))


@pytest.mark.parametrize(
    ("scope", "counts"),
    [("network", ()), ("network", (0,)), ("network", (5,)), ("network", (2, 2)), ("layer", (2,)), ("layer", (2, 4))],
)
def test_counts_that_the_gates_do_not_have_are_refused(scope, counts):
    hidden, groups, asked = TINY[scope]
    lazy = lazy_network(scope, hidden=hidden, groups=groups)
    said = f"each of {len(asked)} gates must be asked for 1 to {groups} groups, not for {list(counts)}"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        MaskSearch(lazy, counts)


# moved pictures

SHAPE = (2, 4, 5)


def pictures(count):
    return torch.randn(count, 40, generator=seeded(3))


def crops(picture, most):
    """Every way to move one picture, its border repeated: (down, right) and the picture."""
    wide = np.pad(picture.numpy().reshape(SHAPE), [(0, 0), (most, most), (most, most)], mode="edge")
    for down, right in itertools.product(range(2 * most + 1), repeat=2):
        yield (down, right), wide[:, down : down + 4, right : right + 5].reshape(-1)


def test_pictures_moved_by_nothing_are_the_same():
    x = pictures(6)
    assert torch.equal(shifted(x, SHAPE, 0, seeded()), x)


@pytest.mark.parametrize("most", [1, 2, 6])
def test_every_picture_is_a_crop_of_itself_with_its_border_repeated(most):
    x = pictures(30)
    moved = shifted(x, SHAPE, most, seeded())
    assert moved.shape == x.shape
    for picture, found in zip(x, moved.numpy(), strict=True):
        assert any((found == crop).all() for _, crop in crops(picture, most))


def test_all_ways_to_move_are_equally_likely():
    x = pictures(1)
    moved = shifted(x.expand(1800, 40), SHAPE, 1, seeded()).numpy()
    times = {way: (moved == crop).all(1).sum() for way, crop in crops(x[0], 1)}
    assert sum(times.values()) == 1800
    assert all(abs(count - 200) < 5 * 200**0.5 for count in times.values())


def test_moves_follow_the_generator_and_no_other():
    x, before = pictures(20), torch.get_rng_state()
    one, again, other = (shifted(x, SHAPE, 2, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_moves_by_less_than_nothing_are_refused():
    said = "^pictures can be moved by 0 pixels or more, not by -1$"
    with pytest.raises(UsageError, match=said):
        shifted(pictures(2), SHAPE, -1, seeded())


# learning rates by part


def two_parts():
    """A model of two weights that start at zero."""
    model = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    for weight in model.parameters():
        nn.init.zeros_(weight)
    return model


def fitted(model, rates, **settings):
    """The weights after three epochs of two steps in which the loss is their sum."""
    settings = {"epochs": 3, "batch": 4, "learning_rate": 0.25, **settings}

    def loss(rows):
        return sum(weight.sum() for weight in model.parameters())

    fit(model, loss, lambda: 0.0, 8, plan(**settings), seeded(), keep="last", rates=rates)
    return [weight.item() for weight in model.parameters()]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_part_without_a_learning_rate_stays_while_the_rest_moves_as_alone(optimiser):
    model = two_parts()
    stayed, moved = fitted(model, [(model[0], 0.0)], optimiser=optimiser)
    assert stayed == 0
    assert moved == fitted(two_parts(), (), optimiser=optimiser)[1] < 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_part_follows_its_own_rate_on_the_same_schedule(schedule):
    model = two_parts()
    steps = sum(SCHEDULES[schedule](6)(step) for step in range(6))
    found = fitted(model, [(model[1], 0.5)], optimiser="sgd", schedule=schedule)
    assert found == pytest.approx([-0.25 * steps, -0.5 * steps])


def test_all_parts_may_have_rates_of_their_own():
    model = two_parts()
    found = fitted(model, [(model[0], 0.1), (model[1], 0.5)], optimiser="sgd", schedule="constant")
    assert found == pytest.approx([-0.6, -3.0])


def test_a_part_that_needs_no_gradient_stays_whatever_its_rate():
    model = two_parts()
    model[0].requires_grad_(False)
    stayed, moved = fitted(model, [(model[0], 0.5)], optimiser="sgd")
    assert (stayed, moved) == (0, fitted(two_parts(), (), optimiser="sgd")[1])


def test_a_compensated_network_can_be_trained_through_its_bits():
    """The means are constants of an ordinary graph."""
    lazy = lazy_network("layer")
    filled = compensated(lazy, inputs(20))
    filled.evaluate(inputs(20), None, StraightThrough(seeded())).scores.square().sum().backward()
    assert all(gate.weight.grad.any() for gate in lazy.policy.gates)
