"""The oracle: contributions by plain loops, exact where everything is evaluated, costs of a policy in its place."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condcomp_lib.lazy import LazyNetwork, calibrated, evaluate
from condcomp_lib.oracle import TINY, Oracle
from condcomp_lib.partitions import SCOPES, Partition, make_partition
from condcomp_lib.policies import Budget, Policy, Pool, Sample, Threshold
from condcomp_lib.targets import MLP

either_scope = pytest.mark.parametrize("scope", SCOPES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(count, seed=1):
    return torch.randn(count, 16, generator=seeded(seed))


def network(hidden=(9, 7, 8), activation="relu"):
    return MLP(16, hidden, 5, activation, seeded())


def with_oracle(scope, decision, hidden=(9, 7, 8), groups=4, pool=None, only=None):
    """A lazy network that an oracle decides for; in its target one group `only` contributes, where that is given."""
    target = network(hidden)
    partition = make_partition("contiguous", hidden, groups, seeded(2), scope)
    if only is not None:
        with torch.no_grad():
            for layer, above, members in zip(target.linears, target.linears[1:], partition.membership, strict=False):
                layer.bias.add_(20)  # all neurons fire for every example
                above.weight[:, members != only] = 0
    return LazyNetwork(target, partition, Oracle(target, partition, pool), decision)


def neurons_at(target, layer, below):
    """Activations of one layer, product by product."""
    function = math.tanh if isinstance(target.activation, torch.nn.Tanh) else lambda value: max(0.0, value)
    weight, bias = target.linears[layer].weight.tolist(), target.linears[layer].bias.tolist()
    return [function(sum(w * v for w, v in zip(row, below, strict=True)) + b)
            for row, b in zip(weight, bias, strict=True)]  # fmt: skip


def shares_by_loops(target, partition, layer, h):
    """Each group's share of what the neurons of a layer, at `h`, add to the next one; for one example."""
    above, lengths = target.linears[layer + 1].weight.tolist(), []
    for group in range(partition.groups):
        members = [i for i, number in enumerate(partition.membership[layer].tolist()) if number == group]
        added = [sum(h[i] * row[i] for i in members) for row in above]
        lengths.append(math.sqrt(sum(value**2 for value in added)))
    return [length / max(sum(lengths), TINY) for length in lengths]


def logits_by_loops(target, partition, gate, s):
    """The oracle's logits for one example: one layer's in scope "layer", added up over the full network else."""
    if partition.scope == "layer":
        shares = shares_by_loops(target, partition, gate, neurons_at(target, gate, s))
    else:
        shares, h = [0.0] * partition.groups, s
        for layer in range(len(target.hidden)):
            h = neurons_at(target, layer, h)
            shares = [a + b for a, b in zip(shares, shares_by_loops(target, partition, layer, h), strict=True)]
    return [math.log(max(share, TINY)) for share in shares]


@settings(max_examples=30)
@given(st.sampled_from(SCOPES), st.sampled_from(["relu", "tanh"]), st.integers(1, 7), st.integers(0, 2**32))
def test_logits_equal_loops_over_examples_and_groups(scope, activation, groups, seed):
    target = network(activation=activation)
    partition = make_partition("random", target.hidden, groups, seeded(seed), scope)
    oracle = Oracle(target, partition)
    for gate, read in enumerate(oracle.reads()):
        s = torch.randn(3, read, generator=seeded(seed + gate))
        expected = torch.tensor([logits_by_loops(target, partition, gate, row) for row in s.tolist()])
        found = oracle.logits(gate, s).detach()
        torch.testing.assert_close(found.exp(), expected.exp(), rtol=1e-3, atol=5e-4)
        assert torch.equal(found < math.log(2 * TINY), expected < math.log(2 * TINY))


@either_scope
def test_groups_without_neurons_and_layers_without_activity_come_last_and_stay_finite(scope):
    target, empty = network((6, 6)), Partition((torch.tensor([0, 1, 1, 3, 3, 0]),) * 2, 4, scope)
    logits = Oracle(target, empty).logits(0, inputs(20))
    assert logits.isfinite().all()
    assert (logits[:, 2] == torch.tensor(TINY).log()).all()
    with torch.no_grad():
        for layer in target.linears[:-1]:
            layer.weight.zero_()
            layer.bias.fill_(-1)
    assert (Oracle(target, empty).logits(0, inputs(20)) == torch.tensor(TINY).log()).all()


@either_scope
def test_with_one_neuron_a_group_its_share_is_its_value_times_the_length_of_its_outgoing_weights(scope):
    target, x = network((8, 8), "tanh"), inputs(10)
    one_each = Partition(make_partition("balanced", (8, 8), 8, seeded(2), "layer").membership, 8, scope)
    h, shares = x, []
    for layer, groups in enumerate(one_each.membership):
        h = target.activation(target.linears[layer](h))
        parts = h.abs() * target.linears[layer + 1].weight.norm(dim=0)
        shares.append((parts / parts.sum(1, keepdim=True))[:, groups.argsort()])
    found = Oracle(target, one_each).logits(0, x).exp()
    expected = shares[0] + shares[1] if scope == "network" else shares[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if scope == "network":  # an empty ninth group changes nothing
        wider = Oracle(target, Partition(one_each.membership, 9, scope)).logits(0, x).exp()[:, :8]
        torch.testing.assert_close(wider, expected, rtol=1e-4, atol=1e-5)


@either_scope
def test_a_budget_of_all_groups_gives_exactly_the_targets_scores(scope):
    lazy, x = with_oracle(scope, Budget((4,) * (3 if scope == "layer" else 1))), inputs(50)
    with torch.inference_mode():
        assert torch.equal(evaluate(lazy, x).scores, lazy.target(x))


@pytest.mark.parametrize("only", range(4))
@either_scope
def test_the_only_group_that_contributes_is_ranked_first_and_is_enough(scope, only):
    lazy, x = with_oracle(scope, Budget((1,) * (3 if scope == "layer" else 1)), only=only), inputs(50)
    found = evaluate(lazy, x)
    assert (found.logits.split(4, 1)[0].argmax(1) == only).all()
    torch.testing.assert_close(found.scores, lazy.target(x).detach())


@pytest.mark.parametrize("pool", [None, Pool((1, 4, 4), 2)], ids=["whole", "pooled"])
@either_scope
def test_it_costs_what_a_policy_in_its_place_would(scope, pool):
    lazy = with_oracle(scope, Threshold((-1.5,) * 3), pool=pool)
    policy = Policy(lazy.partition, 16, pool, seeded())
    mask = evaluate(lazy, inputs(40)).mask
    assert lazy.policy.reads() == policy.reads()
    assert lazy.cost(mask) == LazyNetwork(lazy.target, lazy.partition, policy, lazy.decision).cost(mask)


@pytest.mark.parametrize("asked", [0.25, 0.6, 1])
@either_scope
def test_it_can_be_calibrated(scope, asked):
    lazy, x = with_oracle(scope, Sample(seeded())), inputs(400)
    mask = evaluate(calibrated(lazy, x, asked), x).mask
    assert lazy.partition.activity(mask).mean().item() == pytest.approx(asked, abs=0.01)


@either_scope
def test_at_equal_activity_it_keeps_the_scores_nearer_to_the_targets_than_an_untrained_policy(scope):
    lazy, x = with_oracle(scope, Budget((2,) * 3), hidden=(40, 40), groups=8), inputs(200)
    blind = LazyNetwork(lazy.target, lazy.partition, Policy(lazy.partition, 16, None, seeded()), lazy.decision)
    off = [(evaluate(net, x).scores - lazy.target(x).detach()).norm(dim=1).mean() for net in (lazy, blind)]
    assert off[0] < off[1]


def test_an_oracle_never_chooses_a_group_that_a_layer_does_not_have():
    target = network((8, 6, 2))
    with torch.no_grad():
        for layer in target.linears[:-1]:
            layer.bias.fill_(-100)  # no neuron fires: no group contributes more than another
    partition = Partition((torch.arange(8), torch.arange(6), torch.arange(2)), 8, "layer", (8, 6, 2))
    oracle = Oracle(target, partition)
    mask = evaluate(LazyNetwork(target, partition, oracle, Budget((4, 3, 2))), inputs(30)).mask
    assert [part.sum(1).unique().tolist() for part in partition.by_gate(mask)] == [[4], [3], [2]]
