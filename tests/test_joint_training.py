"""Networks and policies that learn together: blocks, divergences, estimates against exact gradients, bad settings."""

import copy
import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from condcomp_lib import datasets, joint_training
from condcomp_lib.errors import UsageError
from condcomp_lib.estimators import Minibatch, Reinforce, log_probability
from condcomp_lib.estimators.pathwise import BudgetThrough
from condcomp_lib.estimators.sum_and_sample import SumAndSample
from condcomp_lib.joint_training import (
    activity_by_layer,
    as_decided,
    joint_plan,
    joint_spec,
    obtain_jointly,
    train_jointly,
)
from condcomp_lib.kernels import compile
from condcomp_lib.lazy import LazyNetwork, calibrated, decided_by, evaluate
from condcomp_lib.partitions import Partition, cut_into_blocks, make_partition
from condcomp_lib.policies import Budget, Given, Policy, Sample, Shared, Threshold, means_of_runs
from condcomp_lib.policy_training import ESTIMATORS, SUPERVISED
from condcomp_lib.runs import RunStore
from condcomp_lib.sparsity import divergence, variance_loss
from condcomp_lib.targets import MLP, start_glorot
from condcomp_lib.training import accuracy

LEARNING = [name for name in ESTIMATORS if name not in (*SUPERVISED, "dense", "dpg", "dpg-bits")]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blocks_net(hidden=(6, 4), size=2, inputs=5, classes=3, seed=0, steep=3.0, always_on=False):
    draws = seeded(seed)
    target, partition = MLP(inputs, hidden, classes, generator=draws), cut_into_blocks(hidden, size)
    policy = Policy(partition, inputs, generator=draws, always_on=always_on)
    with torch.no_grad():
        for gate in policy.gates:
            gate.weight.mul_(steep)
    return LazyNetwork(target, partition, policy, Sample(draws))


@pytest.fixture(scope="module")
def data():
    return datasets.load("digits")


def digits_net(seed=0, hidden=(48, 32), size=8):
    return blocks_net(hidden, size, 64, 10, seed, 1.0)


def plan(**changed):
    return joint_plan(**{"epochs": 2, "batch": 64, "learning_rate": 0.003, "network_rate": 0.01, "tau": 0.3, **changed})


@torch.no_grad()
def test_masked_forward_is_that_of_a_loop_over_blocks_and_gates_read_what_was_kept():
    lazy, x = blocks_net(), torch.randn(7, 5, generator=seeded(1))
    found = lazy.evaluate(x, None, Threshold((0.0, 0.0)))
    for i, one in enumerate(x):
        h, bits = one, []
        for layer, gate in enumerate(lazy.policy.gates):
            logits = [float(h @ row + d) for row, d in zip(gate.weight, gate.bias, strict=True)]
            linear = lazy.target.linears[layer]
            above = torch.zeros(linear.out_features)
            for neuron in range(linear.out_features):
                if logits[neuron // 2] > 0:
                    above[neuron] = max(0.0, float(h @ linear.weight[neuron] + linear.bias[neuron]))
            h = above
            bits += [logit > 0 for logit in logits] + [False] * (3 - len(logits))
        assert found.mask[i].tolist() == bits
        torch.testing.assert_close(found.scores[i], lazy.target.linears[-1](h))


def test_layers_of_different_numbers_of_blocks_count_only_what_is_there():
    lazy = blocks_net()
    assert (lazy.partition.counts, lazy.partition.groups, lazy.partition.bits) == ((3, 2), 3, 6)
    assert [gate.out_features for gate in lazy.policy.gates] == [3, 2]
    mask = torch.tensor([[True, False, True, True, False, False], [True, True, True, True, True, False]])
    assert lazy.partition.neurons(mask).tolist() == [[4, 2], [6, 4]]
    cost = lazy.cost(mask)
    assert cost.multiply_adds == (5 * 5, (4 * 2 + 6 * 4) / 2, 3 * 3)
    assert cost.policy_multiply_adds == (5 * 3, 5 * 2)
    assert cost.policy_bytes == (4 * 6 * 3, 4 * 6 * 2)
    expected = cost.total_multiply_adds / lazy.target_cost().total_multiply_adds
    assert lazy.computes(mask).mean().item() == pytest.approx(expected)
    assert [part.shape[1] for part in lazy.partition.by_gate(mask)] == [3, 2]


def test_bits_that_a_layer_does_not_need_are_never_set():
    lazy, x = blocks_net(), torch.randn(500, 5, generator=seeded(1))
    for decision in (lazy.decision, Threshold((0.0, 0.0)), Budget.of(1.0, lazy.partition, lazy.policy)):
        assert not evaluate(decided_by(lazy, decision), x).mask[:, 5].any()
    assert Budget.of(1.0, lazy.partition, lazy.policy).counts == (3, 2)
    found = evaluate(calibrated(lazy, x, 0.5), x)
    assert activity_by_layer(lazy, found) == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.parametrize("batch", ["one", "per-example", "shared"])
@pytest.mark.parametrize("decision", [Threshold((0.2, -0.1)), Budget((2, 1)), Threshold((-math.inf, -math.inf))])
def test_different_numbers_of_blocks_compile(decision, batch):
    lazy, x = decided_by(blocks_net((48, 32), 16, 20, 4, steep=6.0), decision), torch.randn(9, 20, generator=seeded(2))
    expected = [decided_by(lazy, Shared(decision)) if batch == "shared" else lazy][0].evaluate(x)
    scores = compile(lazy, batch)(x) if batch != "one" else torch.cat([compile(lazy, batch)(one[None]) for one in x])
    torch.testing.assert_close(scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_block_masks_repeat_over_blocks():
    lazy = blocks_net((8, 6), 2)
    mask = evaluate(lazy, torch.randn(20, 5, generator=seeded(1))).mask
    for columns in lazy.partition.columns:
        by_neuron = mask[:, columns]
        assert torch.equal(by_neuron[:, ::2], by_neuron[:, 1::2])


def test_divergence_is_that_of_torch():
    sigma = torch.rand(6, 4, generator=seeded()) * 0.9 + 0.05
    expected = kl_divergence(Bernoulli(sigma), Bernoulli(torch.full_like(sigma, 0.12))).sum(1)
    torch.testing.assert_close(divergence(sigma, 0.12), expected)


def gradients(lazy, loss):
    lazy.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten().clone() for weight in lazy.policy.parameters()])


def expected_estimate(lazy, data, settings, rows, monkeypatch):
    """The policy's gradient that joint training's loss has on average: over all masks, each as likely as it is."""
    total = 0
    for bits in itertools.product([False, True], repeat=5):
        mask = torch.tensor([[*bits, False]])
        monkeypatch.setattr(joint_training, "Sample", lambda _, mask=mask: Given(mask))
        training = joint_training.JointTraining(lazy, data, settings, seeded())
        with torch.no_grad():
            found = lazy.evaluate(training.x[rows], None, Given(mask))
            probability = log_probability(found.logits, found.mask).exp()
        assert len(probability) == 1
        total = total + probability * gradients(lazy, training.loss(rows))
    return total


def exact(lazy, data, settings, rows, divergences=True):
    """The gradient of the expected cost in the policy's weights, from all masks."""
    training = joint_training.JointTraining(lazy, data, settings, seeded())
    x, y, loss = training.x[rows], training.y[rows], torch.zeros(1)
    for bits in itertools.product([False, True], repeat=5):
        found = lazy.evaluate(x, None, Given(torch.tensor([[*bits, False]])), through=False)
        cost = torch.nn.functional.cross_entropy(found.scores, y, reduction="none").detach()
        if divergences:
            for logits in lazy.partition.by_gate(found.logits):
                cost = cost + settings["lambda_s"] * divergence(logits.sigmoid(), settings["tau"])
        loss = loss + log_probability(found.logits, found.mask).exp() * cost
    return gradients(lazy, loss.sum())


@pytest.fixture
def tiny(data):
    lazy = blocks_net((6, 4), 2, 64, 10)
    lazy.target.requires_grad_(False)
    return lazy


@pytest.mark.parametrize("to_go", [False, True])
def test_corrected_divergence_has_the_exact_gradient(tiny, data, to_go, monkeypatch):
    settings = joint_plan(baseline="none", kl="corrected", tau=0.2, lambda_s=0.5, to_go=to_go)
    settings = {**settings}
    rows = torch.tensor([3])
    expected = exact(tiny, data, settings, rows)
    torch.testing.assert_close(
        expected_estimate(tiny, data, settings, rows, monkeypatch), expected, rtol=1e-3, atol=1e-5
    )


def test_divergence_inside_the_cost_says_nothing_to_the_gate_it_belongs_to(data, monkeypatch):
    """With one hidden layer, as in the 500-unit network, the paper's form has the gradient of the labels alone."""
    lazy = blocks_net((10,), 2, 64, 10)
    rows, found = torch.tensor([3]), {}
    for name, lambda_s in (("with", 0.5), ("without", 0.0)):
        settings = {**joint_plan(baseline="none", kl="cost", tau=0.2, lambda_s=lambda_s)}
        total = 0
        for bits in itertools.product([False, True], repeat=5):
            mask = torch.tensor([bits])
            monkeypatch.setattr(joint_training, "Sample", lambda _, mask=mask: Given(mask))
            training = joint_training.JointTraining(lazy, data, settings, seeded())
            with torch.no_grad():
                logits = lazy.evaluate(training.x[rows], None, Given(mask)).logits
            total = total + log_probability(logits, mask).exp() * gradients(lazy, training.loss(rows))
        found[name] = total
    torch.testing.assert_close(found["with"], found["without"], rtol=1e-3, atol=1e-5)
    assert found["with"].abs().max() > 1e-3


def test_one_product_is_the_sum_of_explicit_gradients():
    """(C - b) grad log pi example by example, without the vector-Jacobian product (*dropout-policies*, section 3.1)."""
    lazy, x = blocks_net(), torch.randn(6, 5, generator=seeded(1))
    costs, mask = torch.randn(6, generator=seeded(2)), torch.rand(6, 6, generator=seeded(3)) < 0.5
    mask[:, 5] = False
    found = lazy.evaluate(x, None, Given(mask), through=False)
    at_once = gradients(lazy, Reinforce("mean").loss(costs, log_probability(found.logits, found.mask)))
    by_hand = 0
    for i in range(6):
        one = lazy.evaluate(x[i : i + 1], None, Given(mask[i : i + 1]), through=False)
        by_hand = by_hand + (costs[i] - costs.mean()) * gradients(lazy, log_probability(one.logits, one.mask).sum()) / 6
    torch.testing.assert_close(at_once, by_hand)


def test_score_functions_leave_the_network_to_its_own_gradient(data):
    """The weights' gradient is that of the mean cost under the masks, whatever the policy's part of the loss."""
    lazy = digits_net()
    settings = {**joint_plan(lambda_s=0.0, baseline="none")}
    training = joint_training.JointTraining(lazy, data, settings, seeded())
    rows, state = torch.arange(32), lazy.decision.generator.get_state()
    training.loss(rows).backward()
    found = [layer.weight.grad.clone() for layer in lazy.target.linears]
    lazy.zero_grad()
    lazy.decision.generator.set_state(state)
    evaluated = lazy.evaluate(training.x[rows], None, None)
    torch.nn.functional.cross_entropy(evaluated.scores, training.y[rows]).backward()
    for grad, layer in zip(found, lazy.target.linears, strict=True):
        torch.testing.assert_close(grad, layer.weight.grad)


def test_a_step_on_the_variance_raises_it():
    lazy, x = blocks_net((8, 6), 2), torch.randn(40, 5, generator=seeded(1))
    gate = lazy.policy.gates[0]
    before = variance_loss(gate(x).sigmoid())
    before.backward()
    with torch.no_grad():
        gate.weight -= 0.01 * gate.weight.grad
        gate.bias -= 0.01 * gate.bias.grad
    assert variance_loss(gate(x).sigmoid()) < before  # L_v is minus the variance


@pytest.mark.parametrize("estimator", LEARNING)
def test_network_and_policy_both_learn(data, estimator):
    lazy = digits_net()
    before = copy.deepcopy(lazy.state_dict())
    curve = train_jointly(lazy, data, plan(estimator=estimator, rates=[0.4, 0.4], batch=16, epochs=4), seeded())
    assert all(not torch.equal(before[name], value) for name, value in lazy.state_dict().items())
    assert curve.accuracy[curve.epoch - 1] == max(curve.accuracy) > 0.5
    assert [len(part) for part in (curve.accuracy, curve.activity, curve.entropy)] == [4, 4, 4]
    assert all(0.2 < share < 0.6 for share in curve.activity[-1])
    assert not any(weight.requires_grad for weight in lazy.target.parameters())


def test_sampled_activity_comes_to_the_sparsity_target(data):
    lazy = digits_net()
    lazy.policy.start_at(0.8)
    assert min(activity_by_layer(lazy, evaluate(lazy, torch.from_numpy(data.valid.x)))) > 0.7
    curve = train_jointly(lazy, data, plan(epochs=6, lambda_s=3.0, tau=0.3, batch=32), seeded())
    assert curve.activity[-1] == pytest.approx([0.3, 0.3], abs=0.1)


def test_a_policy_switched_on_late_waits_and_is_what_is_kept(data):
    lazy = digits_net()
    policy = copy.deepcopy(lazy.policy.state_dict())
    seen = []
    training = joint_training.JointTraining(lazy, data, plan(epochs=4, dense_epochs=3), seeded())
    score = training.score

    def watch():
        seen.append(all(torch.equal(policy[name], value) for name, value in lazy.policy.state_dict().items()))
        return score()

    training.score = watch
    fitted = training.fit(None)
    assert seen == [True, True, True, False]
    assert fitted.epoch == 4
    assert [len(activity) for activity in training.joint_curve.activity] == [0, 0, 0, 2]


def test_what_is_asked_for_falls_from_the_whole_network_by_the_same_factor(data):
    lazy, asked = digits_net(), []
    settings = plan(estimator="budget-through", rates=[1 / 6, 0.25], epochs=5, anneal=2)
    training = joint_training.JointTraining(lazy, data, settings, seeded())
    counts = []
    for rows in torch.arange(40).split(8):
        counts.append(training.estimator.relaxed(seeded()).counts)
        asked.append(list(training.asked))
        training.loss(rows)
        training.score()
    assert asked[0] == [1.0, 1.0]
    assert asked[1] == pytest.approx([(1 / 6) ** 0.5, 0.5])
    assert asked[2:] == [[1 / 6, 0.25]] * 3
    assert counts == [(6, 4), (2, 2), (1, 1), (1, 1), (1, 1)]
    assert training.joint_curve.activity[0] == [1.0, 1.0]
    assert training.joint_curve.activity[-1] == pytest.approx([1 / 6, 0.25])


def test_a_budget_keeps_the_same_number_of_blocks_for_every_example_and_sigma_goes_back():
    logits = torch.randn(50, 6, generator=seeded()).requires_grad_()
    bits = BudgetThrough(seeded(1), (2,), 0.5)(logits, 0)
    assert bits.detach().sum(1).tolist() == pytest.approx([2.0] * 50)
    bits.sum().backward()
    sigma = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, sigma * (1 - sigma))
    still = BudgetThrough(seeded(1), (2,), 0.0)(logits.detach(), 0)
    assert torch.equal(still > 0.5, Budget((2,))(logits.detach(), 0))


def one_gate(hidden=(6, 4), groups=4, seed=0):
    draws = seeded(seed)
    target = MLP(5, hidden, 3, generator=draws)
    partition = make_partition("balanced", hidden, groups, draws)
    return LazyNetwork(target, partition, Policy(partition, 5, generator=draws), Sample(draws))


def test_summing_over_a_single_pick_is_the_exact_expected_cost_for_policy_and_weights():
    lazy, x, y = one_gate(), torch.randn(7, 5, generator=seeded(1)), torch.arange(7) % 3

    def cost(found):
        return torch.nn.functional.cross_entropy(found.scores, y, reduction="none")

    found = SumAndSample(lambda: (1,))(Minibatch(lazy, x, cost), seeded(2))
    assert found.found.mask.sum(1).tolist() == [1] * 7
    policy, weights = list(lazy.policy.parameters()), list(lazy.target.parameters())
    ours = torch.autograd.grad(found.loss, [*policy, *weights])
    probability, expected = lazy.evaluate(x).logits.softmax(1), torch.zeros(())
    for group, bits in enumerate(torch.eye(4, dtype=torch.bool)):
        expected = expected + (probability[:, group] * cost(lazy.evaluate(x, None, Given(bits[None])))).mean()
    for one, other in zip(ours, torch.autograd.grad(expected, [*policy, *weights]), strict=True):
        torch.testing.assert_close(one, other)


def test_of_several_picks_the_last_one_is_tried_with_every_group_that_is_left():
    lazy, x, tried = blocks_net((8, 6), 2), torch.randn(6, 5, generator=seeded(1)), []

    def cost(found):
        tried.append(found.mask)
        return found.scores.square().sum(1)

    found = SumAndSample(lambda: (2, 1))(Minibatch(lazy, x, cost), seeded(2)).found
    assert len(tried) == 4 + 3 + 1
    first, second, sampled = tried[:4], tried[4:7], found.mask[:, :4]
    for group, mask in enumerate(first):
        assert mask[:, group].all()
        assert (mask[:, :4] & sampled).any(1).all()  # what was picked before is there, whichever is tried
        assert set(mask[:, :4].sum(1).tolist()) <= {1, 2}
        assert mask[:, 4:].sum(1).tolist() == [1] * 6
    for group, mask in enumerate(second):
        assert torch.equal(mask[:, :4], sampled)
        assert mask[:, 4:7].int().tolist() == [[int(group == bit) for bit in range(3)]] * 6


@pytest.mark.parametrize("always_on", [False, True])
@pytest.mark.parametrize("counts", [(1, 1), (2, 2)])
def test_what_is_tried_is_what_the_network_computes_under_that_mask(counts, always_on):
    lazy, x, tried = blocks_net((8, 6), 2, always_on=always_on), torch.randn(6, 5, generator=seeded(1)), []

    def cost(found):
        tried.append(found)
        return found.scores.square().sum(1)

    SumAndSample(lambda: counts)(Minibatch(lazy, x, cost), seeded(2))
    for found in tried:
        torch.testing.assert_close(found.scores, lazy.evaluate(x, None, Given(found.mask)).scores)


def test_gumbel_noise_of_scale_one_draws_a_group_by_the_softmax_of_the_logits():
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(20_000, -1)
    share = BudgetThrough(seeded(), (1,), 1.0)(logits, 0).mean(0)
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.015, rtol=0)


def test_block_dropout_keeps_blocks_at_its_rate_and_learns(data):
    lazy = digits_net()
    policy = copy.deepcopy(lazy.policy.state_dict())
    settings = plan(estimator="dense", uniform=0.5, epochs=4)
    curve = train_jointly(lazy, data, settings, seeded())
    found = evaluate(as_decided(lazy, torch.from_numpy(data.valid.x), settings), torch.from_numpy(data.test.x))
    assert activity_by_layer(lazy, found) == pytest.approx([0.5, 0.5], abs=0.05)
    assert curve.accuracy[-1] > 0.5
    assert all(torch.equal(policy[name], value) for name, value in lazy.policy.state_dict().items())


def test_a_dense_net_is_trained_and_validated_in_full(data):
    lazy = digits_net()
    curve = train_jointly(lazy, data, plan(estimator="dense", epochs=3), seeded())
    assert curve.activity == curve.entropy == [[], [], []]
    assert curve.accuracy[curve.epoch - 1] == max(curve.accuracy) == pytest.approx(accuracy(lazy.target, data.valid))


def test_a_network_is_obtained_once(data, tmp_path):
    artefacts, spec = RunStore(tmp_path), joint_spec("digits", "24-16", 8, seed=0, epochs=1, start=0.3, glorot=True)
    lazy, first = obtain_jointly(spec, data, artefacts)
    again, second = obtain_jointly(spec, data, artefacts)
    assert first.provenance == second.provenance
    x = torch.from_numpy(data.test.x)
    for one, other in zip(evaluate(lazy, x).logits, evaluate(again, x).logits, strict=True):
        assert torch.equal(one, other)


def test_the_first_block_of_every_layer_can_stay_on(data, tmp_path):
    spec = joint_spec("digits", "24-16", 8, seed=0, always_on=True, epochs=1, estimator="budget-through", tau=0.5)
    lazy, _ = obtain_jointly(spec, data, RunStore(tmp_path))
    mask = evaluate(lazy, torch.from_numpy(data.test.x)).mask
    assert [part[:, 0].all().item() for part in lazy.partition.by_gate(mask)] == [True, True]
    assert [part.sum(1).unique().tolist() for part in lazy.partition.by_gate(mask)] == [[2], [1]]


def test_runs_of_examples_share_a_mask_and_learn(data):
    lazy = digits_net()
    settings = plan(shared=16, baseline="moving", epochs=4, lambda_s=1.0)
    curve = train_jointly(lazy, data, settings, seeded())
    decided = as_decided(lazy, torch.from_numpy(data.valid.x), settings)
    mask = evaluate(decided, torch.from_numpy(data.test.x)).mask
    for run in mask.split(16):
        assert torch.equal(run, run[:1].expand_as(run))
    assert len(mask.unique(dim=0)) > 1
    assert curve.accuracy[-1] > curve.accuracy[0]


def test_a_shared_mask_has_the_gradient_of_the_examples_that_share_it():
    """Sum over a run of (C_i - b) grad log pi(M), as the mean cost times the gradient for the run."""
    lazy, x = blocks_net(), torch.randn(8, 5, generator=seeded(1))
    costs = torch.randn(8, generator=seeded(2))
    mask = (torch.rand(2, 6, generator=seeded(3)) < 0.5).repeat_interleave(4, 0)
    mask[:, 5] = False
    logits = lazy.policy.logits(0, x)
    runs = Reinforce("none").loss(means_of_runs(costs, 4), log_probability(means_of_runs(logits, 4), mask[::4, :3]))
    lazy.zero_grad()
    runs.backward()
    found = lazy.policy.gates[0].weight.grad.clone()
    lazy.zero_grad()
    again = means_of_runs(lazy.policy.logits(0, x), 4).repeat_interleave(4, 0)
    (costs * log_probability(again, mask[:, :3])).mean().backward()
    torch.testing.assert_close(found, lazy.policy.gates[0].weight.grad)


def test_decay_shrinks_weights(data):
    norms = []
    for l2 in (0.0, 0.05):
        lazy = digits_net()
        train_jointly(lazy, data, plan(l2=l2), seeded())
        norms.append(sum(layer.weight.square().sum() for layer in lazy.target.linears))
    assert norms[1] < 0.5 * norms[0]


def test_glorot_has_its_variance():
    network = MLP(400, (300,), 10)
    start_glorot(network, seeded())
    assert network.linears[0].weight.var().item() == pytest.approx(2 / 700, rel=0.02)
    assert not network.linears[0].bias.any()


def test_a_policy_starts_at_its_rate():
    lazy = blocks_net()
    lazy.policy.start_at(0.12)
    sigma = [part.sigmoid() for part in lazy.partition.by_gate(lazy.evaluate(torch.zeros(1, 5)).logits)]
    assert sigma[0].flatten().tolist() == pytest.approx([0.12] * 3)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_policies_do_not_start_at_either_end(rate):
    with pytest.raises(UsageError, match=r"^a policy must start at a rate between 0 and 1, not at "):
        blocks_net().policy.start_at(rate)


@torch.no_grad()
def test_with_all_blocks_off_the_net_still_answers():
    lazy, x = blocks_net(), torch.randn(3, 5, generator=seeded(1))
    found = lazy.evaluate(x, None, Given(torch.zeros(1, 6, dtype=torch.bool)))
    torch.testing.assert_close(found.scores, lazy.target.linears[-1].bias.expand(3, -1))


def test_a_batch_of_one_needs_a_baseline_that_allows_it(data):
    with pytest.raises(UsageError, match=r"^baseline 'mean' needs a minibatch of at least two examples, not one$"):
        train_jointly(digits_net(), data, plan(batch=1, epochs=1, epoch_examples=4), seeded())
    train_jointly(digits_net(), data, plan(batch=1, epochs=1, epoch_examples=4, baseline="moving"), seeded())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kl": "cost", "tau": 1.0}, "a divergence needs a base rate between 0 and 1, not 1.0"),
        ({"kl": "cost", "tau": 0.0}, r"the sparsity target tau must be in (0, 1], not 0.0"),
        ({"kl": "costs"}, "unknown form of the divergence 'costs'; known: corrected, cost"),
        ({"kl": "cost", "estimator": "disarm"}, "kl goes with REINFORCE, not with 'disarm'"),
        ({"to_go": True, "estimator": "disarm"}, "to_go goes with REINFORCE, not with 'disarm'"),
        ({"shared": 7}, "a minibatch of 64 examples cannot be cut into runs of 7 that share a mask; choose a number of "
                        "at least 2 that divides it"),
        ({"network_rate": 0.0}, "the network's learning rate must be a number above 0, not 0.0"),
        ({"l2": -1.0}, "l2 must be a number of at least 0, not -1.0"),
        ({"dense_epochs": 2}, "dense_epochs must leave some of the 2 epochs, not be 2"),
        ({"anneal": 2}, "anneal must leave some of the 2 epochs, not be 2"),
        ({"uniform": 0.5},
         "uniform is a rate in (0, 1] and goes with the estimator \"dense\"; not 0.5 with 'reinforce'"),
        ({"uniform": 0.0, "estimator": "dense"},
         "uniform is a rate in (0, 1] and goes with the estimator \"dense\"; not 0.0 with 'dense'"),
        ({"options": {"noise": -1.0}, "estimator": "budget-through"},
         "the noise's scale must be a number of at least 0, not -1.0"),
        ({"keep": "first"}, "unknown epoch to keep 'first'; known: best, last"),
        ({"distil": 0.5}, "distil goes with estimators that follow the cost's own gradient, not with 'reinforce'"),
        ({"kl": "cost", "anneal": 1},
         "anneal changes the activity that L_b and L_e ask for; a divergence has one base rate, tau"),
        ({"warm_start": 1, "estimator": "straight-through"},
         "warm_start is for a trained target; here the network learns from the start"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(changed, message):
    with pytest.raises(UsageError) as raised:
        plan(**changed)
    assert str(raised.value) == message


@pytest.mark.parametrize("size", [0, 3, -2])
def test_blocks_that_do_not_divide_a_layer_are_refused(size):
    with pytest.raises(
        UsageError, match=rf"^blocks of {size} neurons do not divide layer 1 of 4; choose a block size "
    ):
        cut_into_blocks([4, 6], size)


@pytest.mark.parametrize(
    ("counts", "scope", "message"),
    [
        ((2, 1), "network", 'numbers of groups for each layer go with scope "layer", not "network"'),
        ((1, 1), "layer", r"2 hidden layers need as many numbers of groups, the largest 2; not [1, 1]"),
        ((2,), "layer", r"2 hidden layers need as many numbers of groups, the largest 2; not [2]"),
        ((2, 3), "layer", r"2 hidden layers need as many numbers of groups, the largest 2; not [2, 3]"),
    ],
)
def test_numbers_of_groups_that_fit_no_layer_are_refused(counts, scope, message):
    with pytest.raises(UsageError) as raised:
        Partition((torch.tensor([0, 1]), torch.tensor([0, 0])), 2, scope, counts)
    assert str(raised.value) == message
