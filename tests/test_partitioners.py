"""Partitioners: planted groups found or not, values and choices by plain loops, bad input refused."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch

from condcomp_lib.datasets import Dataset, Split
from condcomp_lib.errors import UsageError
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.partitioners import search
from condcomp_lib.partitioners.bandits import RULES, Bandits
from condcomp_lib.partitioners.contextual import CONTEXTS, ContextualBandits, contexts_of, falling
from condcomp_lib.partitioners.gumbel import EPS, SCALE, Gumbel, gumbel_scores, straight_through, train_gumbel
from condcomp_lib.partitioners.local import LocalSearch
from condcomp_lib.partitions import Partition, make_partition
from condcomp_lib.policies import Policy, Sample
from condcomp_lib.policy_training import policy_plan
from condcomp_lib.targets import MLP

WIDTHS, GROUPS = (8, 6), 3
SEEDS = range(10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(widths=WIDTHS, inputs=5):
    return MLP(inputs, widths, 4, generator=seeded(1))


def flat(partition):
    return torch.cat(partition.membership)


def drawn(seed, groups=GROUPS, widths=WIDTHS):
    return make_partition("random", widths, groups, seeded(seed))


MAKERS = {
    **{rule: functools.partial(Bandits, WIDTHS, GROUPS, rule) for rule in RULES},
    "contextual": lambda scope="network": ContextualBandits(contexts_of(toy()), GROUPS, scope=scope),
    "gumbel": lambda scope="network": Gumbel(WIDTHS, GROUPS, seeded(), scope),
    "local": lambda scope="network": LocalSearch(make_partition("balanced", WIDTHS, GROUPS, seeded(), scope)),
}
of_every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


# Planted problems: the true groups are known.


def agreement(one, other):
    """Share of the pairs of neurons that are together in both partitions or apart in both."""
    together = [flat(partition)[:, None] == flat(partition) for partition in (one, other)]
    neurons = len(together[0])
    return ((together[0] == together[1]).sum().item() - neurons) / (neurons * (neurons - 1))


def planted(seed, groups=4, each=8):
    """A target whose incoming weights are a prototype of each true group plus a little noise, and these groups."""
    generator = seeded(seed)
    target = MLP(12, (groups * each,), groups, generator=generator)
    truth = torch.randperm(groups * each, generator=generator) % groups
    with torch.no_grad():
        weight = target.linears[0].weight
        prototypes = torch.randn(groups, 12, generator=generator)
        weight.copy_(prototypes[truth] + 0.1 * torch.randn(weight.shape, generator=generator))
    return target, Partition((truth,), groups)


def reached(seed, make, level, trials, enough=math.inf):
    """The agreement of `best()` with the planted groups; the worth is the agreement above `level`."""
    target, truth = planted(seed)
    partitioner = make(target, truth)
    search(partitioner, lambda found: agreement(found, truth) - level, trials, seeded(100 + seed), enough=enough)
    return agreement(partitioner.best(), truth)


def test_contextual_bandits_find_planted_groups():
    """A worth below 95 % agreement counts against the actions taken; a large ridge makes the values nearly sums."""

    def make(target, truth):
        return ContextualBandits(contexts_of(target), truth.groups, ridge=200.0, epsilon=falling(0.8, 0.05))

    assert sum(reached(seed, make, 0.95, 200) == 1 for seed in SEEDS) >= 9


@pytest.mark.parametrize("rule", RULES)
def test_plain_bandits_do_not_find_planted_groups(rule):
    def make(target, truth):
        return Bandits(truth.widths, truth.groups, rule)

    found = [reached(seed, make, 0.95, 200) for seed in SEEDS]
    assert sum(share == 1 for share in found) <= 2
    assert sum(found) / len(found) < 0.8


def test_local_search_finds_planted_groups():
    def make(target, truth):
        return LocalSearch(make_partition("contiguous", truth.widths, truth.groups, seeded()))

    assert sum(reached(seed, make, 0, 2500, enough=1.0) == 1 for seed in SEEDS) >= 9


def planted_classes(seed, classes=3, each=8, examples=384):
    """Hidden neurons that are always 1 and speak for the class of their true group: which of them are evaluated is all
    that decides. The inputs, 20 features for each class, tell it to the policy, which learns fast by so many."""
    generator = seeded(seed)
    truth = torch.randperm(classes * each, generator=generator) % classes
    target = MLP(20 * classes, (classes * each,), classes, generator=generator)
    with torch.no_grad():
        for parameter, value in zip(target.parameters(), (0.0, 1.0, 0.0, 0.0), strict=True):
            parameter.fill_(value)
        target.linears[1].weight[truth, torch.arange(len(truth))] = 2 / each
    y = torch.arange(examples) % classes
    x = torch.eye(classes)[y].repeat(1, 20) + 0.1 * torch.randn(examples, 20 * classes, generator=generator)
    split = Split(x.numpy(), y.numpy())
    data = Dataset("planted", split, split, split, (1, 1, x.shape[1]), classes, "made here", "0" * 16)
    return target, Partition((truth,), classes), data


def lazy_of(target, partition, rescale="none", seed=0):
    policy = Policy(partition, target.linears[0].in_features, generator=seeded(seed + 10))
    return LazyNetwork(target, partition, policy, Sample(seeded(seed + 20)), rescale)


def trained(seed, **settings):
    """Gumbel preferences trained on the planted classes, their agreement with the true groups, and the curve."""
    target, truth, data = planted_classes(seed)
    gumbel = Gumbel(truth.widths, truth.groups, seeded(seed + 1))
    lazy = lazy_of(target, make_partition("contiguous", truth.widths, truth.groups, seeded()), seed=seed)
    plan = policy_plan(tau=1 / 3, lambda_s=0.5, learning_rate=0.02, batch=64, **settings)
    curve = train_gumbel(gumbel, lazy, data, {**plan, "gumbel": "constant"}, seeded(seed))
    return gumbel, agreement(gumbel.best(), truth), curve


def test_gumbel_finds_the_group_that_each_class_needs():
    found = [trained(seed, epochs=30)[1:] for seed in SEEDS]
    assert sum(share == 1 for share, _ in found) >= 9
    assert sum(curve.accuracy[-1] > 0.9 and 0.25 < curve.activity[-1] < 0.45 for _, curve in found) >= 9


@pytest.mark.parametrize("estimator", ["dpg", "dpg-bits"])
def test_gumbel_learns_beside_dpg_too(estimator):
    _, share, curve = trained(0, epochs=20, estimator=estimator)
    assert share > 0.5  # chance: a third and a little
    assert curve.accuracy[-1] > curve.accuracy[0]


def test_gumbel_refuses_estimators_that_learn_by_relaxed_bits():
    with pytest.raises(
        UsageError, match=r"^unknown estimator for Gumbel-Softmax 'disarm'; known: dpg, dpg-bits, reinforce$"
    ):
        trained(0, epochs=1, estimator="disarm")


def test_training_by_gumbel_follows_its_seeds_and_scores_every_epoch():
    (one, _, curve), (other, _, again), (different, _, _) = (trained(seed, epochs=2) for seed in (0, 0, 1))
    assert torch.equal(one.preferences[0], other.preferences[0])
    assert not torch.equal(one.preferences[0], different.preferences[0])
    assert len(curve.accuracy) == len(curve.activity) == 2
    assert curve == again


# What is the same for all of them.


@of_every_kind
def test_the_same_seed_tries_the_same_partitions_and_leaves_the_global_generator_alone(make):
    before = torch.get_rng_state()
    runs = [search(make(), lambda found: found.largest_share, 8, seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    one, other, different = (torch.stack([flat(trial.partition) for trial in run]) for run in runs)
    assert torch.equal(one, other)
    assert not torch.equal(one, different)


@of_every_kind
@pytest.mark.parametrize("scope", ["network", "layer"])
@pytest.mark.parametrize("worth", [-1.0, 0.0, 0.5])
def test_a_constant_worth_teaches_nothing_but_proposals_stay_as_asked(make, scope, worth):
    partitioner = make(scope=scope)
    trials = search(partitioner, lambda found: worth, 12, seeded())
    assert [trial.worth for trial in trials] == [worth] * 12
    for found in [*(trial.partition for trial in trials), partitioner.best()]:
        assert (found.widths, found.groups, found.scope) == (WIDTHS, GROUPS, scope)


@of_every_kind
@pytest.mark.parametrize("worth", [math.nan, math.inf, -math.inf])
def test_a_worth_that_is_no_number_is_refused_and_not_learned_from(make, worth):
    partitioner = make()
    search(partitioner, lambda found: found.largest_share, 3, seeded())
    before = copy.deepcopy(partitioner)
    with pytest.raises(UsageError, match=rf"^a partition's worth must be a finite number, not {worth}; .*$"):
        search(partitioner, lambda found: worth, 3, seeded(1))
    assert getattr(partitioner, "trials", None) == getattr(before, "trials", None)
    assert torch.equal(flat(partitioner.best()), flat(before.best()))
    assert torch.equal(flat(partitioner.propose(seeded(2))), flat(before.propose(seeded(2))))


@pytest.mark.parametrize("kind", [*RULES, "contextual"])
@pytest.mark.parametrize("wrong", [drawn(0, widths=(6, 8)), drawn(0, widths=(8,)), drawn(0, groups=2)])
def test_a_partition_of_other_layers_or_groups_is_refused(kind, wrong):
    partitioner = MAKERS[kind]()
    with pytest.raises(UsageError, match=r"cuts layers of \[8, 6\] neurons into 3 groups, not layers of"):
        partitioner.update(wrong, 0.5)
    assert partitioner.trials == 0
    assert sum(counts.sum().item() for counts in partitioner.counts) == 0


def test_a_search_returns_all_its_trials_in_order_and_stops_when_it_is_enough():
    worths = [0.1, 0.7, 0.3, 0.9, 0.2]
    tried, left = [], iter(worths)

    def worth(partition):
        tried.append(partition)
        return next(left)

    trials = search(MAKERS["ucb1"](), worth, 5, seeded(), enough=0.9)
    assert [trial.worth for trial in trials] == worths[:4]
    assert [trial.partition for trial in trials] == tried
    assert len(search(MAKERS["ucb1"](), lambda found: 0.5, 5, seeded(), enough=0.6)) == 5


# Bandits.

INDEX = {
    "ucb1": lambda sums, counts, trial: sums / counts + math.sqrt(2 * math.log(trial) / counts) if counts else math.inf,
    "greedy": lambda sums, counts, trial: (1 + sums) / (1 + counts),
    "epsilon-greedy": lambda sums, counts, trial: sums / (1 + counts),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_neuron_chooses_as_a_bandit_in_plain_python(rule):
    """Wherever one action's index is highest the choice is that action, else one of the highest."""
    bandits, rewards, generator = Bandits(WIDTHS, GROUPS, rule, epsilon=0), np.random.default_rng(0), seeded()
    sums, counts = np.zeros((14, GROUPS)).tolist(), np.zeros((14, GROUPS)).tolist()
    for trial in range(60):
        found = bandits.propose(generator)
        worth = float(rewards.uniform(0, 0.9) + 0.05 * (found.membership[0][0] == 1))
        for neuron, chosen in enumerate(flat(found).tolist()):
            indices = [INDEX[rule](s, n, trial) for s, n in zip(sums[neuron], counts[neuron], strict=True)]
            highest = [action for action, index in enumerate(indices) if index == max(indices)]
            assert chosen in highest
            assert trial < GROUPS or len(highest) == 1
            sums[neuron][chosen] += worth
            counts[neuron][chosen] += 1
        bandits.update(found, worth)
    means = [[s / n if n else -math.inf for s, n in zip(*rows, strict=True)] for rows in zip(sums, counts, strict=True)]
    assert flat(bandits.best()).tolist() == np.argmax(means, axis=1).tolist()


@pytest.mark.parametrize("rule", ["greedy", "ucb1"])
def test_every_action_is_tried_before_one_is_repeated(rule):
    trials = search(MAKERS[rule](), lambda found: found.largest_share, GROUPS, seeded())
    for chosen in torch.stack([flat(trial.partition) for trial in trials], 1).tolist():
        assert sorted(chosen) == list(range(GROUPS))


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_epsilon_is_the_share_of_random_actions(epsilon):
    bandits, generator = Bandits([600], GROUPS, "epsilon-greedy", epsilon=epsilon), seeded()
    bandits.update(make_partition("random", [600], GROUPS, generator), 0.5)
    proposals = torch.stack([flat(bandits.propose(generator)) for _ in range(10)])
    kept = (proposals == flat(bandits.best())).double().mean().item()
    assert kept == pytest.approx(1 - epsilon * (1 - 1 / GROUPS), abs=0.03)


# Contextual bandits.


@pytest.mark.parametrize("ridge", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("context", CONTEXTS)
def test_values_are_ridge_least_squares_over_all_trials(context, ridge):
    contexts = contexts_of(toy(), context)
    bandits = ContextualBandits(contexts, 4, ridge=ridge)
    trials = [(Partition(drawn(seed).membership, 4), worth) for seed, worth in enumerate([0.3, -0.8, 0.5, 0.9, 0.1])]
    for partition, worth in trials:
        bandits.update(partition, worth)
    for layer, weights in enumerate(context.double().numpy() for context in contexts):
        features = weights.shape[1]
        penalty = ridge * (weights**2).sum(1).mean()
        for group in range(3):
            members = [(partition.membership[layer] == group).numpy() for partition, _ in trials]
            rows = np.concatenate([*(weights[member] for member in members), math.sqrt(penalty) * np.eye(features)])
            worths = np.repeat([worth for _, worth in trials], [member.sum() for member in members])
            beta = np.linalg.lstsq(rows, np.concatenate([worths, np.zeros(features)]), rcond=None)[0]
            np.testing.assert_allclose(bandits.values[layer][:, group].numpy(), weights @ beta, rtol=1e-7, atol=1e-10)
        assert not bandits.values[layer][:, 3].any()


def test_a_context_holds_incoming_weights_and_if_asked_outgoing_ones():
    target = toy()
    for layer, (incoming, both) in enumerate(zip(contexts_of(target), contexts_of(target, CONTEXTS[1]), strict=True)):
        below, above = (target.linears[layer + i].weight.tolist() for i in (0, 1))
        assert incoming.tolist() == below
        assert both.tolist() == [row + [out[i] for out in above] for i, row in enumerate(below)]


def test_exploration_falls_evenly_from_the_first_trial_to_the_tenth():
    epsilons = [falling()(trial) for trial in range(1, 31)]
    assert epsilons[0] == 0.8
    assert epsilons[9:] == pytest.approx([0.1] * 21)
    assert [a - b for a, b in itertools.pairwise(epsilons[:10])] == pytest.approx([0.7 / 9] * 9)


def test_the_first_proposal_is_random_and_later_ones_are_the_best_but_for_epsilon():
    asked = []
    context = torch.randn(600, 20, generator=seeded())
    bandits = ContextualBandits([context], GROUPS, epsilon=lambda trial: asked.append(trial) or float(trial == 3))
    trials = search(bandits, lambda found: found.largest_share - 0.34, 3, seeded())
    assert asked == [1, 2]
    for random in (trials[0].partition, bandits.propose(seeded(5))):
        assert (random.sizes - 200).abs().max() < 50
        assert (flat(random) == flat(bandits.best())).double().mean() < 0.6
    bandits.update(trials[0].partition, 0.2)
    assert torch.equal(flat(bandits.propose(seeded(6))), flat(bandits.best()))


def test_dead_neurons_have_no_value_and_harm_nobody():
    contexts = [torch.randn(8, 5, generator=seeded()), torch.zeros(6, 8)]
    contexts[0][2:4] = 0
    bandits = ContextualBandits(contexts, GROUPS)
    trials = search(bandits, lambda found: found.largest_share, 5, seeded())
    assert not bandits.values[0][2:4].any()
    assert not bandits.values[1].any()
    assert bandits.values[0].isfinite().all()
    alone = ContextualBandits([contexts[0][[0, 1, 4, 5, 6, 7]]], GROUPS, ridge=6 / 8)  # of mean |w|^2
    for trial in trials:
        alone.update(Partition((trial.partition.membership[0][[0, 1, 4, 5, 6, 7]],), GROUPS), trial.worth)
    torch.testing.assert_close(bandits.values[0][[0, 1, 4, 5, 6, 7]], alone.values[0])


# Gumbel-Softmax.


def preferring(rows):
    """A Gumbel of one layer whose neurons have these preferences (float, neurons x groups)."""
    gumbel = Gumbel([len(rows)], rows.shape[1])
    with torch.no_grad():
        next(gumbel.parameters()).copy_(rows / SCALE)
    return gumbel


@pytest.mark.parametrize(("temperature", "noise"), [(1.0, 1.0), (0.3, 1.0), (2.0, 0.5), (1.0, 0.0)])
def test_a_draw_is_one_hot_and_has_the_gradient_of_the_softmax(temperature, noise):
    mu, weights = torch.randn(2, 9, 4, generator=seeded())
    mu.requires_grad_()
    value = straight_through(mu, seeded(3), temperature, noise)
    (value * weights).sum().backward()
    gumbel = -torch.log(-torch.log(torch.rand(9, 4, generator=seeded(3)) + EPS) + EPS)
    z = ((mu.detach() + noise * gumbel) / temperature).double().numpy()
    y = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(value.detach().numpy(), np.eye(4)[z.argmax(1)], atol=1e-6)
    pulled = weights.double().numpy()
    expected = y * (pulled - (y * pulled).sum(1, keepdims=True)) / temperature
    np.testing.assert_allclose(mu.grad.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_groups_are_drawn_with_the_softmax_of_the_preferences():
    mu = torch.tensor([1.0, 0.0, -1.0, 0.5])
    shares = preferring(mu.expand(20_000, 4)).propose(seeded()).sizes / 20_000
    assert shares.tolist() == pytest.approx(mu.softmax(0).tolist(), abs=0.015)


def test_the_temperature_changes_gradients_but_not_draws_and_no_noise_means_the_best():
    gumbel = preferring(torch.randn(200, 4, generator=seeded()))
    hot, cold, still = (gumbel.draw(seeded(7), *how)[0].argmax(1) for how in ((5.0,), (0.2,), (1.0, 0.0)))
    assert torch.equal(hot, cold)
    assert torch.equal(hot, flat(gumbel.propose(seeded(7))))
    assert torch.equal(still, flat(gumbel.best()))
    assert not torch.equal(hot, still)


@pytest.mark.parametrize("rescale", ["none", "activity"])
@pytest.mark.parametrize("scope", ["network", "layer"])
def test_scores_of_one_hot_draws_are_those_of_the_lazy_network(scope, rescale):
    target, x = toy(), torch.randn(40, 5, generator=seeded())
    partition = make_partition("random", WIDTHS, GROUPS, seeded(), scope)
    one_hot = [torch.eye(GROUPS)[groups] for groups in partition.membership]
    expected = lazy_of(target, partition, rescale).evaluate(x)
    for first in (None, target.linears[0](x)):
        scores, mask, logits = gumbel_scores(lazy_of(target, partition, rescale), one_hot, x, first)
        assert torch.equal(mask, expected.mask)
        torch.testing.assert_close(scores, expected.scores)
        torch.testing.assert_close(logits, expected.logits)


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_scores_teach_the_preferences_only_and_logits_the_policy_only(scope):
    gumbel, x = Gumbel(WIDTHS, GROUPS, seeded(), scope), torch.randn(40, 5, generator=seeded())
    lazy = lazy_of(toy(), make_partition("random", WIDTHS, GROUPS, seeded(), scope))
    scores, _, logits = gumbel_scores(lazy, gumbel.draw(seeded()), x)
    scores.square().sum().backward()
    assert all(parameter.grad is None for parameter in lazy.policy.parameters())
    learned = [parameter.grad.clone() for parameter in gumbel.parameters()]
    assert all(gradient.any() for gradient in learned)
    logits.square().sum().backward()
    assert all(parameter.grad.any() for parameter in lazy.policy.parameters())
    assert all(map(torch.equal, learned, [parameter.grad for parameter in gumbel.parameters()]))


# Local search.


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_a_swap_moves_two_neurons_of_one_layer_and_keeps_all_sizes(scope):
    start = make_partition("random", WIDTHS, GROUPS, seeded(), scope)
    local, generator = LocalSearch(start), seeded()
    assert local.propose(generator) is local.best() is start
    local.update(start, 0.5)
    for trial in range(40):
        before, found = local.current, local.propose(generator)
        moved = [(a != b).sum().item() for a, b in zip(before.membership, found.membership, strict=True)]
        assert sorted(moved) == [0, 2]
        assert torch.equal(found.sizes_by_layer, start.sizes_by_layer)
        local.update(found, 0.5 + trial % 3)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_falls_are_accepted_only_while_it_is_hot_and_the_best_is_never_lost(temperature):
    start = make_partition("balanced", WIDTHS, GROUPS, seeded())
    local = LocalSearch(start, temperature=temperature, span=100, generator=seeded(1))
    worths, noise, trials, generator = [], np.random.default_rng(0), [], seeded()
    for _ in range(200):
        found = local.propose(generator)
        trials.append((float(noise.uniform()), found))
        local.update(found, trials[-1][0])
        worths.append(local.worth)
        assert local.best() is max(trials, key=lambda trial: trial[0])[1]
    falls = [a > b for a, b in itertools.pairwise(worths)]
    assert sum(falls[:100]) >= 5 if temperature else not any(falls)
    assert not any(falls[100:])
    local.update(local.propose(generator), local.worth)
    assert local.accepted == 1 + sum(a != b for a, b in itertools.pairwise(worths))


# Bad arguments.


def trained_with(rescale="none", schedule="constant"):
    target, truth, data = planted_classes(0)
    settings = {**policy_plan(epochs=1), "gumbel": schedule}
    train_gumbel(Gumbel(truth.widths, 3), lazy_of(target, truth, rescale), data, settings, seeded())


BAD = {
    "unknown bandit rule 'best'; known: epsilon-greedy, greedy, ucb1": lambda: Bandits([4], 2, "best"),
    "epsilon must be between 0 and 1, not 1.5": lambda: Bandits([4], 2, "epsilon-greedy", epsilon=1.5),
    "epsilon must be between 0 and 1, not nan": lambda: Bandits([4], 2, "greedy", epsilon=math.nan),
    "epsilon must fall from at most 1 .* not from 0.1 to 0.8 over 10": lambda: falling(0.1, 0.8),
    "epsilon must fall from at most 1 .* not from 0.8 to 0.1 over 0": lambda: falling(span=0),
    "the ridge must be a number above 0, not 0": lambda: ContextualBandits([torch.eye(4)], 2, ridge=0),
    "the ridge must be a number above 0, not nan": lambda: ContextualBandits([torch.eye(4)], 2, ridge=math.nan),
    "contexts of layer 2 hold": lambda: ContextualBandits([torch.eye(4), torch.full((3, 4), math.nan)], 2),
    "unknown context 'outgoing'; known: incoming, inc": lambda: contexts_of(toy(), "outgoing"),
    "temperature must be above 0 and noise at least 0, not 0": lambda: Gumbel([4], 2).draw(seeded(), 0),
    "temperature must be above 0 and noise at least 0, not 1 and -1": lambda: Gumbel([4], 2).draw(seeded(), 1, -1),
    "swaps and span must be at least 1, not 0 and 1": lambda: LocalSearch(drawn(0), swaps=0),
    "swaps and span must be at least 1, not 1 and 0": lambda: LocalSearch(drawn(0), span=0),
    "the temperature must be a number of at least 0, not -1": lambda: LocalSearch(drawn(0), temperature=-1),
    "the temperature must be a number of at least 0, not nan": lambda: LocalSearch(drawn(0), temperature=math.nan),
    "nothing to swap: every layer": lambda: LocalSearch(drawn(0, groups=1)),
    "a search needs at least one trial, not 0": lambda: search(MAKERS["greedy"](), lambda found: 0.5, 0, seeded()),
    "unknown Gumbel schedule 'cosine'; known: annealed, anneal": lambda: trained_with(schedule="cosine"),
    'takes rescale "none" or "activity", not "sigma"': lambda: trained_with("sigma"),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_arguments_are_named_in_one_line(said):
    with pytest.raises(UsageError, match=said) as caught:
        BAD[said]()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("scope", "most"), [("network", 14), ("layer", 6)])
def test_more_groups_than_the_layers_hold_are_refused(scope, most):
    makers = [
        lambda groups: Bandits(WIDTHS, groups, "ucb1", scope=scope),
        lambda groups: ContextualBandits(contexts_of(toy()), groups, scope=scope),
        lambda groups: Gumbel(WIDTHS, groups, seeded(), scope),
    ]
    for make in makers:
        assert make(most).propose(seeded()).groups == most
        with pytest.raises(UsageError, match=f"groups must be from 1 to the {most} neurons of"):
            make(most + 1)


def test_local_search_refuses_a_partition_that_is_no_swap_of_its_own():
    start = make_partition("balanced", WIDTHS, GROUPS, torch.Generator().manual_seed(0))
    local = LocalSearch(start)
    for other in (
        make_partition("balanced", (3, 2), GROUPS, torch.Generator()),
        Partition(tuple(torch.zeros(width, dtype=torch.int64) for width in WIDTHS), GROUPS),
    ):
        with pytest.raises(UsageError):
            local.update(other, 0.5)
    assert local.trials == 0


def test_a_partition_of_the_other_scope_is_refused():
    bandits = Bandits(WIDTHS, GROUPS, "greedy")
    with pytest.raises(UsageError, match="scope 'network', not 'layer'"):
        bandits.update(make_partition("random", WIDTHS, GROUPS, torch.Generator(), "layer"), 0.5)
    with pytest.raises(UsageError, match="unknown scope"):
        Bandits(WIDTHS, GROUPS, "greedy", scope="everything")


def test_what_bandits_start_from_must_be_a_number():
    with pytest.raises(UsageError, match="the initial value must be a finite number, not nan"):
        Bandits(WIDTHS, GROUPS, "greedy", initial=math.nan)
    with pytest.raises(UsageError, match="must be neurons x features"):
        ContextualBandits([torch.ones(4)], 2)


def test_a_gumbel_proposal_is_the_draw_of_the_training():
    gumbel = Gumbel(WIDTHS, GROUPS, torch.Generator().manual_seed(0))
    drawn = gumbel.draw(torch.Generator().manual_seed(1), temperature=0.3)
    proposed = gumbel.propose(torch.Generator().manual_seed(1))
    assert all(torch.equal(rows.argmax(1), m) for rows, m in zip(drawn, proposed.membership, strict=True))
