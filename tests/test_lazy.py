"""Lazy networks: masked evaluation neuron by neuron, costs by brute force, gradients, calibration."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from condcomp_lib.errors import UsageError
from condcomp_lib.lazy import LEAST_SIGMA, RESCALES, LazyNetwork, calibrated, decided_by, evaluate
from condcomp_lib.partitions import SCOPES, Partition, make_partition
from condcomp_lib.policies import Budget, Policy, Pool, Sample, Threshold
from condcomp_lib.targets import MLP, multiply_adds

POOLS = [None, Pool((1, 4, 4), 2)]
either_scope = pytest.mark.parametrize("scope", SCOPES)
every_rescale = pytest.mark.parametrize("rescale", RESCALES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(count, seed=1):
    return torch.randn(count, 16, generator=seeded(seed))


def lazy_network(scope, rescale="none", activation="relu", hidden=(9, 7, 8), groups=4, pool=None, decision=None):
    """An untrained network whose policy's logits vary much by example; a partition of uneven groups."""
    target = MLP(16, hidden, 5, activation, seeded(1))
    partition = make_partition("random", hidden, groups, seeded(2), scope)
    policy = Policy(partition, 16, pool, seeded(3))
    with torch.no_grad():
        for gate in policy.gates:
            gate.weight.mul_(8)
    return LazyNetwork(target, partition, policy, decision or Sample(seeded(4)), rescale)


def always(lazy, level):
    """The same network with every bit set (-inf) or none (inf)."""
    return decided_by(lazy, Threshold((level,) * len(lazy.policy.gates)))


def masks(lazy, count, seed=5):
    return torch.rand(count, lazy.partition.bits, generator=seeded(seed)) < 0.4


def bits_of_neurons(partition):
    """For each layer, the mask's bit that each neuron obeys."""
    step = partition.groups if partition.scope == "layer" else 0
    return [[int(g) + layer * step for g in groups] for layer, groups in enumerate(partition.membership)]


def affine(layer, s, rows):
    """Chosen outputs of a linear layer, one product at a time; None for the others."""
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        sum(w * v for w, v in zip(weight[i], s, strict=True)) + bias[i] if i in rows else None
        for i in range(len(weight))
    ]


def by_loops(lazy, x, mask):
    """Scores and logits of one example under its mask; a neuron that the mask does not choose is never computed."""
    *hidden, last = lazy.target.linears
    function = math.tanh if isinstance(lazy.target.activation, torch.nn.Tanh) else lambda value: max(0.0, value)
    h, logits = x.tolist(), []
    for index, (layer, bits) in enumerate(zip(hidden, bits_of_neurons(lazy.partition), strict=True)):
        if index == 0 or lazy.partition.scope == "layer":
            gate, read = lazy.policy.gates[index], h
            if index == 0 and lazy.policy.pool:
                corners = [(i, j) for i in (0, 2) for j in (0, 2)]
                read = [(h[4 * i + j] + h[4 * i + j + 1] + h[4 * i + 4 + j] + h[4 * i + 5 + j]) / 4 for i, j in corners]
            logits += affine(gate, read, range(gate.out_features))
        chosen = {neuron for neuron, bit in enumerate(bits) if mask[bit]}
        values = affine(layer, h, chosen)
        h = [0.0] * len(bits)
        for neuron in chosen:
            h[neuron] = function(values[neuron])
            if lazy.rescale == "activity":
                h[neuron] *= len(bits) / len(chosen)
            elif lazy.rescale == "sigma":
                h[neuron] *= 1 / max(LEAST_SIGMA, 1 / (1 + math.exp(-logits[bits[neuron]])))
    return affine(last, h, range(last.out_features)), logits


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("pool", POOLS, ids=["whole", "pooled"])
@every_rescale
@either_scope
def test_masked_evaluation_equals_a_loop_over_neurons(scope, rescale, pool, activation):
    lazy, x = lazy_network(scope, rescale, activation, pool=pool), inputs(12)
    evaluated = evaluate(lazy, x)
    expected = [by_loops(lazy, row, mask) for row, mask in zip(x, evaluated.mask.tolist(), strict=True)]
    scores, logits = (torch.tensor(values) for values in zip(*expected, strict=True))
    torch.testing.assert_close(evaluated.scores, scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(evaluated.logits, logits, rtol=1e-4, atol=1e-4)
    assert 0 < evaluated.mask.double().mean() < 1
    assert evaluated.mask.dtype == torch.bool


@either_scope
def test_masks_follow_the_generator_of_the_decision(scope):
    lazy, x = lazy_network(scope), inputs(50)
    drawn = [evaluate(decided_by(lazy, Sample(seeded(seed))), x) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].mask, drawn[1].mask)
    assert torch.equal(drawn[0].scores, drawn[1].scores)
    assert not torch.equal(drawn[0].mask, drawn[2].mask)


def test_a_gate_does_not_see_neurons_that_were_masked_below():
    lazy, x = lazy_network("layer", decision=Threshold((0.0, 0.0, 0.0))), inputs(1)
    before = evaluate(lazy, x)
    off = ~before.mask[0, lazy.partition.columns[0]]
    assert 0 < off.sum() < len(off)
    with torch.no_grad():
        lazy.target.linears[0].weight[off] += 100
        lazy.policy.gates[1].weight[:, off] += 100
    after = evaluate(lazy, x)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.scores, before.scores)


@either_scope
def test_given_masks_are_obeyed_without_rescaling(scope):
    x = inputs(12)
    expected = evaluate(lazy_network(scope), x)
    for rescale in RESCALES:
        assert torch.equal(lazy_network(scope, rescale).masked_scores(x, expected.mask), expected.scores)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("rescale", ["none", "activity"])
@either_scope
def test_with_every_bit_set_the_scores_are_exactly_those_of_the_target(scope, rescale, activation):
    lazy, x = always(lazy_network(scope, rescale, activation), -math.inf), inputs(40)
    evaluated = lazy.evaluate(x)
    assert evaluated.mask.all()
    assert torch.equal(evaluated.scores, lazy.target(x))
    assert torch.equal(lazy.masked_scores(x, evaluated.mask), lazy.target(x))


@pytest.mark.parametrize("rescale", ["none", "activity"])
@either_scope
def test_calibrated_for_everything_it_predicts_as_the_target(scope, rescale):
    lazy = calibrated(lazy_network(scope, rescale), inputs(300), 1.0)
    x = inputs(300, seed=6)
    assert torch.equal(evaluate(lazy, x).scores.argmax(1), lazy.target(x).argmax(1))
    assert evaluate(lazy, x).mask.all()


@every_rescale
@either_scope
def test_with_no_bit_set_only_the_last_biases_are_left(scope, rescale):
    lazy, x = always(lazy_network(scope, rescale), math.inf), inputs(40)
    evaluated = lazy.evaluate(x)
    assert not evaluated.mask.any()
    assert evaluated.scores.isfinite().all()
    torch.testing.assert_close(evaluated.scores, lazy.target.linears[-1].bias.expand(40, 5))


@either_scope
def test_a_group_without_neurons_in_a_layer_leaves_scores_finite(scope):
    partition = Partition((torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])), 3, scope)
    for rescale in RESCALES:
        policy = Policy(partition, 16, generator=seeded())
        lazy = LazyNetwork(MLP(16, (3, 3), 2, generator=seeded()), partition, policy, Sample(seeded()), rescale)
        assert evaluate(lazy, inputs(50)).scores.isfinite().all()


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_rescaling_by_sigma_leaves_decisions_that_are_not_random_as_they_are(scope):
    lazy, x = lazy_network(scope, "sigma"), inputs(20)
    assert torch.equal(always(lazy, -math.inf)(x), lazy.target(x))


def test_rescaling_by_sigma_leaves_the_mean_over_masks_unchanged():
    lazy = lazy_network("network", "sigma", hidden=(12,))
    with torch.no_grad():
        lazy.policy.gates[0].weight.mul_(0.1)
    x = inputs(1)
    scores = evaluate(lazy, x.expand(20000, 16)).scores.double()
    error = (scores.mean(0) - lazy.target(x)[0]) / (scores.std(0) / len(scores) ** 0.5)
    assert error.abs().max() < 4


@either_scope
def test_calling_the_network_gives_the_scores(scope):
    lazy, x = lazy_network(scope, decision=Budget((2, 2, 2))), inputs(12)
    assert torch.equal(lazy(x), lazy.evaluate(x).scores)


@every_rescale
@either_scope
def test_the_first_layer_given_equals_the_first_layer_computed(scope, rescale):
    lazy, x = lazy_network(scope, rescale, decision=Budget((2, 3, 1))), inputs(12)
    computed, known = lazy.evaluate(x), lazy.evaluate(x, first=lazy.target.linears[0](x))
    for name in ("scores", "mask", "logits"):
        assert torch.equal(getattr(computed, name), getattr(known, name))


@either_scope
def test_minibatches_change_nothing_and_leave_no_gradient(scope):
    lazy, x = lazy_network(scope, decision=Budget((2, 2, 2))), inputs(50)
    parts, whole = evaluate(lazy, x, batch=7), lazy.evaluate(x)
    assert torch.equal(parts.mask, whole.mask)
    torch.testing.assert_close(parts.scores, whole.scores)
    torch.testing.assert_close(parts.logits, whole.logits)
    assert not parts.scores.requires_grad
    assert not parts.logits.requires_grad


@every_rescale
@either_scope
def test_gradients_reach_the_policy_through_its_logits_only(scope, rescale):
    lazy = lazy_network(scope, rescale)
    lazy.target.requires_grad_(False)
    evaluated = lazy.evaluate(inputs(30))
    assert not evaluated.scores.requires_grad
    for gate, logits in zip(lazy.policy.gates, evaluated.logits.split(lazy.partition.groups, dim=1), strict=True):
        lazy.zero_grad()
        logits.sum().backward(retain_graph=True)
        assert [other is gate for other in lazy.policy.gates] == [
            other.weight.grad is not None and bool(other.weight.grad.any()) for other in lazy.policy.gates
        ]
    assert all(parameter.grad is None for parameter in lazy.target.parameters())


def test_gradients_reach_only_target_neurons_that_were_evaluated():
    lazy, x = lazy_network("network", activation="tanh"), inputs(1)
    evaluated = lazy.evaluate(x)
    evaluated.scores.sum().backward()
    off = ~evaluated.mask[0, lazy.partition.columns[0]]
    assert off.any()
    assert not lazy.target.linears[0].weight.grad[off].any()
    assert lazy.target.linears[0].weight.grad[~off].any()
    assert all(gate.weight.grad is None for gate in lazy.policy.gates)


def counted(lazy, mask):
    """What a walk over examples, layers and evaluated neurons counts, every weight read once for each example."""
    depth, gates = len(lazy.partition.membership), len(lazy.policy.gates)
    neurons, policy_reads, policy_bytes = [0] * depth, [0] * gates, [0] * gates
    products, read = [0] * (depth + 1), [0] * (depth + 1)
    for row in mask.tolist():
        alive = [[i for i, bit in enumerate(bits) if row[bit]] for bits in bits_of_neurons(lazy.partition)]
        sides = [range(16), *alive, range(5)]
        for layer in range(depth + 1):
            for _ in sides[layer + 1]:
                read[layer] += 4
                for _ in sides[layer]:
                    products[layer] += 1
                    read[layer] += 4
        for layer in range(depth):
            neurons[layer] += len(alive[layer])
        pooled = lazy.policy.pool is not None
        for gate in range(gates):
            source = range(4) if gate == 0 and pooled else sides[gate]
            policy_reads[gate] += 16 if gate == 0 and pooled else 0
            for _ in range(lazy.partition.groups):
                policy_bytes[gate] += 4
                for _ in source:
                    policy_reads[gate] += 1
                    policy_bytes[gate] += 4
    return {
        "neurons": neurons,
        "multiply_adds": products,
        "bytes": read,
        "policy_multiply_adds": policy_reads,
        "policy_bytes": policy_bytes,
    }


@pytest.mark.parametrize("pool", POOLS, ids=["whole", "pooled"])
@either_scope
def test_cost_equals_a_brute_force_count(scope, pool):
    lazy = lazy_network(scope, pool=pool)
    mask = torch.cat([masks(lazy, 9), torch.zeros(1, lazy.partition.bits, dtype=torch.bool)])
    cost, expected = lazy.cost(mask), counted(lazy, mask)
    for name, counts in expected.items():
        assert getattr(cost, name) == pytest.approx([count / len(mask) for count in counts]), name
    assert cost.total_multiply_adds == pytest.approx(
        sum(expected["multiply_adds"] + expected["policy_multiply_adds"]) / len(mask)
    )
    assert cost.total_bytes == pytest.approx(sum(expected["bytes"] + expected["policy_bytes"]) / len(mask))


@either_scope
def test_mean_cost_is_the_mean_of_the_costs_of_single_examples(scope):
    lazy = lazy_network(scope)
    mask = masks(lazy, 8)
    alone = [lazy.cost(row[None]) for row in mask]
    assert lazy.cost(mask).total_multiply_adds == pytest.approx(np.mean([cost.total_multiply_adds for cost in alone]))
    assert lazy.cost(mask).total_bytes == pytest.approx(np.mean([cost.total_bytes for cost in alone]))
    assert lazy.compute(mask) == pytest.approx(np.mean([lazy.compute(row[None]) for row in mask]))


def test_the_target_in_full_costs_every_weight_and_no_policy():
    lazy = lazy_network("layer")
    cost = lazy.target_cost()
    assert cost.multiply_adds == tuple(multiply_adds([16, 9, 7, 8, 5]))
    assert cost.neurons == (9, 7, 8)
    assert cost.total_bytes == 4 * sum(parameter.numel() for parameter in lazy.target.parameters())
    assert cost.policy_multiply_adds == cost.policy_bytes == ()


@pytest.mark.parametrize("pool", POOLS, ids=["whole", "pooled"])
@either_scope
def test_compute_with_everything_evaluated_is_one_and_the_policys_share(scope, pool):
    lazy = lazy_network(scope, pool=pool)
    mask = torch.ones(3, lazy.partition.bits, dtype=torch.bool)
    cost = lazy.cost(mask)
    assert cost.multiply_adds == lazy.target_cost().multiply_adds
    assert sum(cost.policy_bytes) == 4 * sum(parameter.numel() for parameter in lazy.policy.parameters())
    share = sum(gate.weight.numel() for gate in lazy.policy.gates) + (16 if pool else 0)
    full = sum(layer.weight.numel() for layer in lazy.target.linears)
    assert lazy.compute(mask) == pytest.approx(1 + share / full)


def test_with_nothing_evaluated_the_first_gate_and_all_biases_that_are_read_remain():
    lazy = lazy_network("layer")
    cost = lazy.cost(torch.zeros(3, lazy.partition.bits, dtype=torch.bool))
    assert cost.total_multiply_adds == 16 * 4
    assert cost.bytes == (0, 0, 0, 4 * 5)
    assert cost.policy_bytes == (4 * 4 * 17, 4 * 4, 4 * 4)


@pytest.fixture(scope="module", params=SCOPES)
def wide(request):
    return lazy_network(request.param, activation="tanh", hidden=(40, 30), groups=12)


@settings(max_examples=10)
@given(asked=st.floats(0.02, 1))
@example(asked=0.02)
@example(asked=1.0)
def test_calibrated_activity_holds_on_other_data(wide, asked):
    lazy = calibrated(wide, inputs(20000, seed=7), asked)
    mask = evaluate(lazy, inputs(20000, seed=8)).mask
    assert lazy.partition.activity(mask).mean().item() == pytest.approx(asked, abs=0.005)
    if lazy.partition.scope == "layer":
        shares = lazy.partition.neurons(mask).mean(0) / torch.tensor(lazy.partition.widths)
        assert shares.tolist() == pytest.approx([asked] * 2, abs=0.005)


def test_layers_can_be_calibrated_to_different_activities():
    lazy = calibrated(lazy_network("layer", hidden=(60, 48), groups=24), inputs(5000, seed=7), (0.2, 0.6))
    mask = evaluate(lazy, inputs(5000, seed=7)).mask
    assert (lazy.partition.neurons(mask).mean(0) / torch.tensor([60, 48])).tolist() == pytest.approx(
        [0.2, 0.6], abs=1e-3
    )


@either_scope
def test_calibration_leaves_the_network_and_the_global_generator_alone(scope):
    lazy, before = lazy_network(scope), torch.get_rng_state()
    decision, state = lazy.decision, lazy.decision.generator.get_state()
    weights = {name: value.clone() for name, value in lazy.state_dict().items()}
    assert calibrated(lazy, inputs(100), 0.5).policy is lazy.policy
    assert lazy.decision is decision
    assert torch.equal(decision.generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in lazy.state_dict().items())


@pytest.mark.parametrize("asked", [0, 1.5, -0.1, math.nan])
def test_an_activity_that_is_no_share_is_refused(asked):
    with pytest.raises(UsageError, match=rf"activity must be in \(0, 1\], not {asked}"):
        calibrated(lazy_network("layer"), inputs(10), asked)


def test_as_many_activities_as_gates_are_needed():
    with pytest.raises(UsageError, match="one for each of the 3 gates, not 2"):
        calibrated(lazy_network("layer"), inputs(10), (0.5, 0.5))
    with pytest.raises(UsageError, match="one for each of the 1 gates, not 3"):
        calibrated(lazy_network("network"), inputs(10), (0.5, 0.5, 0.5))


@either_scope
def test_another_decision_shares_the_weights_and_leaves_the_original_decision(scope):
    lazy, x = lazy_network(scope, "activity"), inputs(40)
    original, decision = lazy.decision, Budget((1, 2, 3))
    other = decided_by(lazy, decision)
    assert lazy.decision is original
    assert other.decision is decision
    assert (other.target, other.partition, other.policy, other.rescale) == (
        lazy.target,
        lazy.partition,
        lazy.policy,
        "activity",
    )
    before = other(x)
    with torch.no_grad():
        lazy.target.linears[-1].bias += 1
    torch.testing.assert_close(other(x), before + 1)


def parts(scope="network", hidden=(9, 7), groups=4, features=16):
    target = MLP(16, hidden, 5, generator=seeded())
    partition = make_partition("balanced", hidden, groups, seeded(), scope)
    return target, partition, Policy(partition, features, generator=seeded())


@either_scope
def test_a_partition_of_another_target_is_refused(scope):
    target, _, _ = parts(scope)
    _, partition, policy = parts(scope, hidden=(9, 8))
    said = r"the partition is for hidden layers of \[9, 8\] neurons, the target has \[9, 7\]"
    with pytest.raises(UsageError, match=said):
        LazyNetwork(target, partition, policy, Sample(seeded()))


@either_scope
def test_a_policy_of_another_number_of_groups_is_refused(scope):
    target, partition, _ = parts(scope)
    _, _, policy = parts(scope, groups=3)
    said = (
        rf"the policy sets {policy.bits} bits \(scope {scope}\), the partition has {partition.bits} \(scope {scope}\)"
    )
    with pytest.raises(UsageError, match=said):
        LazyNetwork(target, partition, policy, Sample(seeded()))


def test_a_policy_of_the_other_scope_is_refused():
    target, partition, _ = parts("network", groups=8)
    _, _, policy = parts("layer", groups=4)
    with pytest.raises(UsageError, match=r"sets 8 bits \(scope layer\), the partition has 8 \(scope network\)"):
        LazyNetwork(target, partition, policy, Sample(seeded()))


@either_scope
def test_a_policy_that_reads_another_input_is_refused(scope):
    target, partition, _ = parts(scope)
    _, _, policy = parts(scope, features=15)
    with pytest.raises(UsageError, match=r"policy.*15.*16"):
        LazyNetwork(target, partition, policy, Sample(seeded()))


def test_a_policy_that_reads_other_layers_is_refused():
    target, partition, _ = parts("layer", hidden=(9, 7))
    _, _, policy = parts("layer", hidden=(8, 7))
    with pytest.raises(UsageError, match=r"policy.*8.*9"):
        LazyNetwork(target, partition, policy, Sample(seeded()))


def test_a_policy_with_as_many_bits_over_other_layers_is_refused():
    target, partition, _ = parts("layer", hidden=(9, 7), groups=6)
    _, _, policy = parts("layer", hidden=(9, 7, 7), groups=4)
    with pytest.raises(UsageError, match="policy"):
        LazyNetwork(target, partition, policy, Sample(seeded()))


def test_an_unknown_rescale_lists_the_known_ones():
    with pytest.raises(UsageError, match="unknown rescale 'mean'; known: activity, none, sigma"):
        LazyNetwork(*parts(), Sample(seeded()), "mean")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["layers.0.weight", "layers.1.bias", "layers.2.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(name, value):
    target, partition, policy = parts()
    with torch.no_grad():
        target.get_parameter(name).view(-1)[3] = value
    with pytest.raises(UsageError, match=f"the target's {name} holds a number that is not finite; train it again"):
        LazyNetwork(target, partition, policy, Sample(seeded()))


@either_scope
def test_no_examples_are_refused(scope):
    lazy = lazy_network(scope)
    with pytest.raises(UsageError, match="there are no examples to evaluate"):
        evaluate(lazy, inputs(0))
    with pytest.raises(UsageError, match="there are no examples to evaluate"):
        calibrated(lazy, inputs(0), 0.5)
