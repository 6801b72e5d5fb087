"""Training loops: targets with dropout and each optimiser, policies on a frozen target, equal-compute controls."""

import copy
import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from condcomp_lib import datasets, estimators, policy_training, training
from condcomp_lib.datasets import Split
from condcomp_lib.errors import UsageError
from condcomp_lib.fitting import OPTIMISERS, SCHEDULES, Balanced, TrainingError, fit, plan
from condcomp_lib.flow import Flow, scores_with_flow
from condcomp_lib.lazy import LazyNetwork, decided_by, evaluate
from condcomp_lib.partitions import Partition, make_partition
from condcomp_lib.policies import Policy, Sample, Threshold
from condcomp_lib.policy_training import policy_plan, train_policy
from condcomp_lib.pretraining import PENALTIES, PRETRAINING, activation_penalty, scores_and_hidden
from condcomp_lib.runs import RunStore
from condcomp_lib.targets import MLP, multiply_adds
from condcomp_lib.training import (
    accuracy,
    build,
    control_width,
    first_layer,
    obtain_control,
    obtain_target,
    snapshot,
    target_spec,
    train_target,
)

RATES = {"sgd": 0.1, "momentum": 0.05, "rmsprop": 0.003, "adam": 0.01}
EPS = {name: 0.2 for name in PRETRAINING if "uniform" in name}
PENALTY = {name: {"coefficient": 0.1} for name in PENALTIES}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data():
    return datasets.load("digits")


TARGET = target_spec("digits", "2x32", target_seed=0, epochs=8, batch=64, learning_rate=0.01)


@pytest.fixture(scope="module")
def obtained(data, tmp_path_factory):
    return obtain_target(TARGET, data, RunStore(tmp_path_factory.mktemp("artefacts")))


@pytest.fixture(scope="module")
def trained(obtained):
    return obtained[0]


def small(**settings):
    return target_spec("digits", "16", **{"target_seed": 0, "epochs": 2, "batch": 64, **settings})


@pytest.mark.parametrize("pretraining", PRETRAINING)
def test_each_pretraining_beats_chance_and_follows_its_seed(pretraining, data, tmp_path):
    spec = small(
        pretraining=pretraining, eps=EPS.get(pretraining), penalty=PENALTY.get(pretraining), learning_rate=0.01
    )
    first, second = (obtain_target(spec, data, RunStore(tmp_path / name))[1] for name in "ab")
    assert first.result == second.result
    assert first.result["test_accuracy"] > 0.25
    for name, array in first.arrays().items():
        assert (array == second.arrays()[name]).all()


def test_every_pretraining_starts_from_the_same_weights_and_leads_elsewhere(data, tmp_path):
    specs = [
        target_spec("digits", "16-12", target_seed=0, epochs=2, batch=64, pretraining=name, eps=EPS.get(name),
                    penalty=PENALTY.get(name))
        for name in PRETRAINING
    ]  # fmt: skip
    for weights in zip(*(build(spec, data).parameters() for spec in specs), strict=True):
        assert all(torch.equal(weights[0], other) for other in weights)
    ends = [obtain_target(spec, data, RunStore(tmp_path))[0].linears[0].weight for spec in specs]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(ends, 2))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_each_optimiser_beats_chance_and_follows_its_seed(optimiser, data, tmp_path):
    spec = small(optimiser=optimiser, learning_rate=RATES[optimiser], pretraining="dropout-0.5")
    first, second = (obtain_target(spec, data, RunStore(tmp_path / name))[1] for name in "ab")
    assert first.result == second.result
    assert first.result["test_accuracy"] > 0.25


def test_a_penalty_without_weight_changes_nothing_but_what_is_drawn(data):
    plain = train_target(small(balanced=True), data)
    for pretraining in PENALTIES:
        free = train_target(small(balanced=True, pretraining=pretraining, penalty={"coefficient": 0.0}), data)
        assert free.result["penalty_share"] == [0.0, 0.0]
        for name, array in plain.arrays.items():
            assert array == pytest.approx(free.arrays[name], abs=1e-4)


def test_penalties_lower_what_they_measure(data):
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)

    def measured(pretraining, coefficient):
        spec = small(pretraining=pretraining, penalty={"coefficient": coefficient}, epochs=4, balanced=True)
        outcome = train_target(spec, data)
        model = build(spec, data)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in outcome.arrays.items()})
        with torch.no_grad():
            if pretraining == "flow":
                return scores_with_flow(model, x, y, Flow())[1].item(), outcome
            return activation_penalty(scores_and_hidden(model, x)[1], pretraining).item(), outcome

    for pretraining, coefficient in (("flow", 3.0), ("l1", 3.0), ("hoyer", 3.0)):
        (with_it, outcome), (without, _) = measured(pretraining, coefficient), measured(pretraining, 0.0)
        assert with_it < 0.95 * without
        assert all(0 < share < 1 for share in outcome.result["penalty_share"])


def test_snapshots_keep_the_weights_of_their_epochs(data, tmp_path):
    spec = small(snapshots=[1, 2], epochs=2)
    target, record = obtain_target(spec, data, RunStore(tmp_path))
    first, last = (snapshot(record, data, epoch) for epoch in (1, 2))
    kept = first if record.result["best_epoch"] == 1 else last
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), kept.parameters(), strict=True))
    assert not torch.equal(first.linears[0].weight, last.linears[0].weight)
    assert accuracy(last, data.valid) == record.result["learning_curve"][1]
    with pytest.raises(UsageError, match=r"^this target kept its weights of epochs \[1, 2\], not of 3$"):
        snapshot(record, data, 3)
    with pytest.raises(UsageError, match=r"^snapshots are of epochs from 1 to 2, not of 99$"):
        small(snapshots=[1, 99], epochs=2)


def test_the_flow_penalty_needs_relu():
    with pytest.raises(UsageError, match=r"^the class-flow penalty needs ReLU"):
        small(pretraining="flow", penalty={"coefficient": 1.0}, activation="tanh")
    with pytest.raises(UsageError, match=r"^unknown form of the class-flow penalty 'rot'"):
        small(pretraining="flow", penalty={"coefficient": 1.0, "form": "rot"})


@pytest.mark.parametrize(("batch", "classes"), [(10, 10), (23, 10), (32, 3)])
def test_balanced_minibatches_hold_every_class_alike_and_pass_over_each_in_turn(batch, classes):
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.arange(classes), torch.randint(classes, (400,), generator=generator).clamp(max=classes - 1)])
    minibatches = Balanced(y, classes, batch)
    rows = list(minibatches(len(y), generator))
    assert len(rows) == math.ceil(len(y) / batch)
    for part in rows:
        counts = torch.bincount(y[part], minlength=classes)
        assert counts.sum() == batch
        assert counts.max() - counts.min() <= 1
    seen = torch.bincount(torch.cat(rows), minlength=len(y))
    for label in range(classes):
        times = seen[y == label]
        assert times.max() - times.min() <= 1  # no example comes again before all others of its class


def test_balanced_minibatches_refuse_what_they_cannot_hold():
    with pytest.raises(
        UsageError, match=r"^class-balanced minibatches hold every class: batch must be at least 3, not 2$"
    ):
        Balanced(torch.tensor([0, 1, 2]), 3, 2)
    with pytest.raises(UsageError, match=r"^class 1 has no training example, so minibatches cannot be class-balanced$"):
        Balanced(torch.tensor([0, 2]), 3, 8)


def test_a_target_with_random_rates_needs_eps_and_others_refuse_it():
    with pytest.raises(UsageError, match="dropout-uniform needs eps"):
        small(pretraining="dropout-uniform")
    with pytest.raises(UsageError, match=r"eps=0\.2 goes with random dropout rates only"):
        small(pretraining="dropout-0.5", eps=0.2)
    assert small(pretraining="dropout-uniform", eps=0.2).settings["dropout_eps"] == 0.2
    assert "dropout_eps" not in small().settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 0}, "^epochs and batch must be at least 1, not 0 and 128$"),
        ({"batch": -1}, "^epochs and batch must be at least 1, not 20 and -1$"),
        ({"schedule": "step"}, "^unknown schedule 'step'; known: constant, cosine$"),
        ({"optimiser": "lbfgs"}, "^unknown optimiser 'lbfgs'; known: adam, momentum, rmsprop, sgd$"),
        ({"learning_rate": 0}, "^the learning rate must be a number above 0, not 0$"),
        ({"learning_rate": -0.1}, "^the learning rate must be a number above 0, not -0.1$"),
        ({"learning_rate": math.nan}, "^the learning rate must be a number above 0, not nan$"),
    ],
)
def test_bad_plans_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        plan(**settings)


class Steps:
    """A model of one weight that falls by `learning_rate` a step, and what each epoch left of it."""

    def __init__(self, broken=(), loss_then=lambda weight: weight * math.nan):
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.after, self.rows, self.broken, self.loss_then = [0.0], [], broken, loss_then

    def loss(self, rows):
        self.rows.append(rows)
        weight = self.model.weight.sum()
        return self.loss_then(weight) if len(self.rows) - 1 in self.broken else weight

    def fit(self, scores, examples=8, **settings):
        scores = iter(scores)

        def score():
            self.after.append(self.model.weight.item())
            return next(scores)

        keep = settings.pop("keep", "best")
        settings = {"batch": 4, "optimiser": "sgd", "schedule": "constant", "learning_rate": 0.25} | settings
        return fit(self.model, self.loss, score, examples, plan(**settings), seeded(), keep=keep)


@pytest.mark.parametrize(("keep", "epoch"), [("best", 2), ("last", 4)])
def test_the_weights_of_the_best_or_the_last_epoch_are_kept(keep, epoch):
    steps = Steps()
    fitted = steps.fit([0.1, 0.3, 0.3, 0.2], epochs=4, keep=keep)
    assert steps.after == [0.0, -0.5, -1.0, -1.5, -2.0]
    assert fitted.curve == [0.1, 0.3, 0.3, 0.2]
    assert fitted.epoch == epoch
    assert fitted.state["weight"].item() == steps.model.weight.item() == steps.after[epoch]


@pytest.mark.parametrize(("keep", "epoch"), [("best", 1), ("last", 3)])
def test_patience_ends_training_when_the_score_has_not_risen(keep, epoch):
    fitted = Steps().fit([0.5, 0.5, 0.4, 0.9], epochs=4, patience=2, keep=keep)
    assert fitted.curve == [0.5, 0.5, 0.4]
    assert fitted.epoch == epoch


def test_every_epoch_sees_every_example_once_in_another_order():
    steps = Steps()
    steps.fit([0.0] * 3, examples=10, epochs=3)
    assert [len(rows) for rows in steps.rows] == [4, 4, 2] * 3
    orders = [torch.cat(steps.rows[start : start + 3]) for start in (0, 3, 6)]
    assert all(order.sort().values.tolist() == list(range(10)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_sets_the_rate_of_every_step(schedule):
    steps = Steps()
    steps.fit([0.0] * 3, epochs=3, schedule=schedule)
    factors = [SCHEDULES[schedule](6)(step) for step in range(6)]
    assert steps.after == pytest.approx([-0.25 * sum(factors[: 2 * epoch]) for epoch in range(4)])


def test_weights_without_gradients_stay():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(6, 2)
    fit(model, lambda rows: model(x[rows]).sum(), lambda: 0.0, 6, plan(epochs=1, batch=3), seeded(), keep="last")
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"1.weight", "1.bias"}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("step", "epoch", "within"), [(0, 1, 0), (1, 1, 1), (4, 3, 0), (5, 3, 1)])
def test_a_loss_that_is_no_number_stops_with_the_step_and_restores_the_last_good_epoch(value, step, epoch, within):
    steps = Steps(broken={step}, loss_then=lambda weight: weight + float(value))
    said = (
        rf"^the loss became {value} at epoch {epoch}, step {within}; the weights after epoch {epoch - 1} are kept; "
        r"lower the learning rate \(0.25\) or check the inputs$"
    )
    with pytest.raises(TrainingError, match=said) as caught:
        steps.fit([0.0] * 4, epochs=4)
    assert steps.model.weight.item() == steps.after[epoch - 1]
    assert caught.value.state["weight"].item() == steps.after[epoch - 1]


@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_weights_that_are_no_numbers_after_an_epochs_last_step_are_never_good(keep, epochs):
    steps = Steps(broken={3}, loss_then=lambda weight: (weight * 0).sqrt())
    with pytest.raises(TrainingError) as caught:
        steps.fit([0.1, 0.2, 0.3], epochs=epochs, keep=keep)
    assert caught.value.state["weight"].item() == steps.after[1] == -0.5
    assert steps.model.weight.item() == -0.5


def test_a_training_error_survives_the_way_back_from_a_worker():
    error = TrainingError("the loss became nan", {"weight": torch.arange(3.0)})
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is TrainingError
    assert str(again) == "the loss became nan"
    assert list(again.state) == ["weight"]
    assert torch.equal(again.state["weight"], error.state["weight"])
    assert pickle.loads(pickle.dumps(TrainingError("no weights"))).state == {}


def lazy_net(target, groups=8, scope="network", seed=0, rescale="none"):
    generator = seeded(seed)
    partition = make_partition("balanced", target.hidden, groups, generator, scope)
    policy = Policy(partition, target.linears[0].in_features, generator=generator)
    return LazyNetwork(target, partition, policy, Sample(generator), rescale)


def policy_settings(**changed):
    return policy_plan(**{"epochs": 2, "batch": 64, "learning_rate": 0.01, **changed})


def quick(target, data, seed=0, scope="network", rescale="none", cache_bytes=2**30, **changed):
    """A policy trained for two epochs, and its curve."""
    lazy = lazy_net(target, scope=scope, seed=seed, rescale=rescale)
    curve = train_policy(lazy, data, policy_settings(**changed), seeded(seed), cache_bytes=cache_bytes)
    return lazy.policy.state_dict(), curve


def same(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("baseline", ["mean", "moving", "leave-one-out", "none"])
def test_policy_training_is_a_function_of_its_seeds(baseline, trained, data):
    before = torch.get_rng_state()
    (first, curve), (second, again) = (quick(trained, data, baseline=baseline) for _ in range(2))
    assert same(first, second)
    assert curve == again
    assert len(curve.accuracy) == len(curve.activity) == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(first, quick(trained, data, seed=1, baseline=baseline)[0])


def test_policy_training_leaves_the_target_as_it_is(trained, data):
    target = copy.deepcopy(trained).requires_grad_(True)
    before = copy.deepcopy(target.state_dict())
    untrained = lazy_net(target).policy.state_dict()
    policy, _ = quick(target, data)
    assert same(before, target.state_dict())
    assert all(weight.grad is None and not weight.requires_grad for weight in target.parameters())
    assert not any(torch.equal(weight, untrained[name]) for name, weight in policy.items())


@pytest.mark.parametrize("scope", ["network", "layer"])
@pytest.mark.parametrize("rescale", ["none", "activity", "sigma"])
def test_the_cached_first_layer_changes_nothing(scope, rescale, trained, data):
    cached, curve = quick(trained, data, scope=scope, rescale=rescale)
    fallen_back, again = quick(trained, data, scope=scope, rescale=rescale, cache_bytes=0)
    torch.testing.assert_close(cached, fallen_back, rtol=1e-4, atol=1e-5)
    assert curve.activity == pytest.approx(again.activity, abs=0.002)


def test_one_step_of_policy_training_equals_a_plain_computation(trained, data):
    few = dataclasses.replace(data, train=Split(data.train.x[:50], data.train.y[:50]))
    asked = {"epochs": 1, "batch": 50, "learning_rate": 0.5, "optimiser": "sgd", "schedule": "constant"}
    settings = policy_plan(baseline="leave-one-out", tau=0.3, lambda_s=0.7, lambda_v=0.2, **asked)
    lazy, expected = lazy_net(trained), lazy_net(trained)
    train_policy(lazy, few, settings, seeded(5))

    rows = torch.randperm(50, generator=seeded(5))
    x, y = torch.from_numpy(few.train.x)[rows], torch.from_numpy(few.train.y)[rows]
    gate = expected.policy.gates[0]
    sigma = torch.sigmoid(gate(x))
    mask = torch.rand(sigma.shape, generator=expected.decision.generator) < sigma
    costs = cross_entropy(expected.masked_scores(x, mask), y, reduction="none").detach()
    others = (costs.sum() - costs) / 49
    log_probability = torch.where(mask, sigma, 1 - sigma).log().sum(1)
    l_b, l_e = (sigma.mean(0) - 0.3).abs().sum(), (sigma.mean(1) - 0.3).abs().mean()
    l_v = -((sigma - sigma.mean(0)) ** 2).mean(0).sum()
    (((costs - others) * log_probability).mean() + 0.7 * (l_b + l_e) + 0.2 * l_v).backward()
    with torch.no_grad():
        for weight in gate.parameters():
            weight -= 0.5 * weight.grad
    torch.testing.assert_close(lazy.policy.state_dict(), expected.policy.state_dict(), rtol=1e-4, atol=1e-6)


def at_activity(lazy, activity):
    """The lazy network whose policy ignores its input and sets every bit with this probability."""
    blind = copy.deepcopy(lazy.policy)
    for gate in blind.gates:
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, math.log(activity / (1 - activity)))
    return LazyNetwork(lazy.target, lazy.partition, blind, Sample(seeded(9)), lazy.rescale)


def judged(lazy, split, draws=5):
    """Mean loss, accuracy and activity over several draws of masks."""
    x, y = torch.from_numpy(split.x), torch.from_numpy(split.y)
    found = [evaluate(lazy, x) for _ in range(draws)]
    scores, labels = torch.cat([one.scores for one in found]), y.repeat(draws)
    activity = torch.cat([lazy.partition.activity(one.mask) for one in found]).mean().item()
    return cross_entropy(scores, labels).item(), (scores.argmax(1) == labels).double().mean().item(), activity


def test_a_trained_policy_beats_a_blind_one_of_the_same_activity(trained, data):
    lazy = lazy_net(trained)
    settings = policy_settings(epochs=20, learning_rate=0.02, tau=0.5, lambda_s=1.0)
    curve = train_policy(lazy, data, settings, seeded())
    loss, hits, activity = judged(lazy, data.valid)
    blind_loss, blind_hits, blind_activity = judged(at_activity(lazy, activity), data.valid)
    assert blind_activity == pytest.approx(activity, abs=0.02)
    assert loss < 0.7 * blind_loss
    assert hits > blind_hits + 0.1
    assert curve.accuracy[-1] > curve.accuracy[0]


@pytest.mark.parametrize("tau", [0.2, 0.8])
def test_a_large_lambda_moves_activity_to_tau(tau, trained, data):
    lazy = lazy_net(trained)
    before = judged(lazy, data.valid)[2]
    curve = train_policy(lazy, data, policy_settings(epochs=10, tau=tau, lambda_s=20.0), seeded())
    assert abs(before - tau) > 0.2
    assert judged(lazy, data.valid)[2] == pytest.approx(tau, abs=0.05)
    assert curve.activity[-1] == pytest.approx(tau, abs=0.05)


def test_the_policy_of_the_last_epoch_is_kept_where_an_earlier_one_was_more_accurate(trained, data):
    lazy = lazy_net(trained)
    settings = policy_settings(epochs=5, tau=0.1, lambda_s=5.0, learning_rate=0.0007, schedule="constant")
    curve = train_policy(lazy, data, settings, seeded())
    best = curve.accuracy.index(max(curve.accuracy))
    assert curve.activity[best] > curve.activity[-1] + 0.1
    assert judged(lazy, data.valid)[2] == pytest.approx(curve.activity[-1], abs=0.03)


def test_reinforce_refuses_masks_that_are_not_sampled(trained, data):
    lazy = lazy_net(trained)
    fixed = decided_by(lazy, Threshold.at(0.5, lazy.policy))
    with pytest.raises(UsageError, match="REINFORCE learns from sampled masks, not from a Threshold"):
        train_policy(fixed, data, policy_settings(), seeded())


def test_lambda_v_makes_decisions_differ_between_examples(trained, data):
    varying = []
    for lambda_v in (0.0, 5.0):
        lazy = lazy_net(trained)
        train_policy(lazy, data, policy_settings(epochs=3, lambda_v=lambda_v), seeded())
        varying.append(evaluate(lazy, torch.from_numpy(data.valid.x)).logits.sigmoid().var(0).mean())
    assert varying[1] > 1.5 * varying[0]


@pytest.mark.parametrize("tau", [0, -0.1, 1.1, math.nan])
def test_policy_plans_refuse_a_tau_that_is_no_share(tau):
    with pytest.raises(UsageError, match=rf"^the sparsity target tau must be in \(0, 1\], not {tau}$"):
        policy_plan(tau=tau)


def test_policy_plans_refuse_unknown_names_and_hold_the_loops_settings():
    with pytest.raises(UsageError, match="unknown baseline 'median'"):
        policy_plan(baseline="median")
    with pytest.raises(UsageError, match="unknown optimiser 'lbfgs'"):
        policy_plan(optimiser="lbfgs")
    asked = {"epochs": 3, "batch": 7, "optimiser": "rmsprop"}
    assert policy_plan(**asked).items() >= plan(**asked).items()


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_a_last_batch_of_one_is_refused_before_anything_is_trained(baseline, trained, data):
    assert len(data.train) % 269 == 1
    lazy = lazy_net(trained)
    before = copy.deepcopy(lazy.policy.state_dict())
    said = (
        rf"^1077 examples in batches of 269 leave a last batch of one, for which baseline '{baseline}' says nothing; "
        "choose another batch$"
    )
    with pytest.raises(UsageError, match=said):
        train_policy(lazy, data, policy_settings(batch=269, baseline=baseline), seeded())
    assert same(before, lazy.policy.state_dict())


@pytest.mark.parametrize("baseline", ["none", "moving"])
def test_other_baselines_train_with_a_last_batch_of_one(baseline, trained, data):
    _, curve = quick(trained, data, batch=269, baseline=baseline)
    assert len(curve.accuracy) == 2


@pytest.mark.parametrize("baseline", ["none", "moving"])
def test_a_last_batch_of_one_with_lambda_v_is_refused_before_anything_is_trained(baseline, trained, data):
    lazy = lazy_net(trained)
    before = copy.deepcopy(lazy.policy.state_dict())
    with pytest.raises(UsageError):
        train_policy(lazy, data, policy_settings(batch=269, baseline=baseline, lambda_v=0.1), seeded())
    assert same(before, lazy.policy.state_dict())


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_inputs_that_are_no_numbers_stop_policy_training(cache_bytes, trained, data):
    x = data.train.x.copy()
    x[100] = math.nan
    broken = dataclasses.replace(data, train=Split(x, data.train.y))
    lazy = lazy_net(trained)
    before = copy.deepcopy(lazy.policy.state_dict())
    with pytest.raises(TrainingError, match=r"^the loss became nan at epoch 1, step \d+") as caught:
        train_policy(lazy, broken, policy_settings(), seeded(), cache_bytes=cache_bytes)
    assert same(before, lazy.policy.state_dict())
    assert same(before, caught.value.state)


@pytest.mark.parametrize("examples", [1, 2048, 2049, 5000])
def test_the_first_layer_equals_a_direct_computation_where_it_fits(examples):
    target, x = MLP(3, (5, 4), 2), torch.randn(examples, 3)
    found = first_layer(target, x, examples * 5 * 4)
    torch.testing.assert_close(found, target.linears[0](x).detach())
    assert not found.requires_grad
    assert first_layer(target, x, examples * 5 * 4 - 1) is None
    assert first_layer(target, x, 0) is None


networks = st.builds(MLP, st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(2, 10))


def dense(target, width):
    """Multiply-adds of the dense net with this width in all hidden layers, counted plainly."""
    sides = [target.linears[0].in_features, *[width] * len(target.hidden), target.linears[-1].out_features]
    return sum(a * b for a, b in itertools.pairwise(sides))


def off(target, width, wanted):
    return abs(dense(target, width) - wanted)


def full(target):
    return sum(multiply_adds([target.linears[0].in_features, *target.hidden, target.linears[-1].out_features]))


@given(networks, st.floats(0.001, 1))
def test_the_controls_width_is_the_one_of_nearest_multiply_adds(target, share):
    wanted = share * full(target)
    nearest = min(off(target, width, wanted) for width in range(1, 32))
    assert off(target, control_width(target, wanted), wanted) == nearest


@pytest.mark.parametrize("hidden", [(5,), (8, 8), (6, 3, 7)])
def test_a_lazy_network_that_costs_more_than_its_target_has_a_control_of_as_much(hidden):
    target = MLP(20, hidden, 4)
    wanted = 1.7 * full(target)
    nearest = min(off(target, width, wanted) for width in range(1, 50))
    assert off(target, control_width(target, wanted), wanted) == nearest


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 3), st.integers(2, 10))
def test_the_control_of_the_whole_targets_cost_has_its_width(inputs, width, layers, classes):
    target = MLP(inputs, (width,) * layers, classes)
    assert control_width(target, dense(target, width)) == width


CONTROL = {"epochs": 4, "batch": 64, "learning_rate": 0.01}


def test_a_control_is_trained_once_and_has_the_compute_of_the_lazy_network(
    obtained, trained, data, tmp_path, monkeypatch
):
    store, lazy = RunStore(tmp_path), lazy_net(trained)
    wanted = lazy.cost(evaluate(lazy, torch.from_numpy(data.valid.x)).mask).total_multiply_adds
    control, record = obtain_control(*obtained, wanted, data, store, **CONTROL)
    width = control.hidden[0]
    assert control.hidden == (width, width)
    assert dense(trained, width - 1) < wanted < dense(trained, width + 1)
    assert accuracy(control, data.test) == record.result["test_accuracy"] > 0.5
    assert accuracy(control, data.valid) == record.result["valid_accuracy"] == max(record.result["learning_curve"])
    assert record.spec.settings["target"] == record.provenance["uses"]["target"]["name"] == TARGET.name

    monkeypatch.setattr(training, "_distil", lambda *given, **named: pytest.fail("trained again"))
    again, cached = obtain_control(*obtained, wanted, data, store, **CONTROL)
    assert cached == record
    assert not again.training
    assert same(control.state_dict(), again.state_dict())


def test_controls_follow_their_seed(obtained, trained, data, tmp_path):
    wanted = 0.3 * dense(trained, 32)
    runs = [
        obtain_control(*obtained, wanted, data, RunStore(tmp_path / name), seed=seed, **CONTROL)[1]
        for name, seed in (("a", 0), ("b", 0), ("b", 1))
    ]
    assert runs[0].result == runs[1].result
    assert runs[0].name == runs[1].name != runs[2].name
    assert runs[1].result != runs[2].result


def test_each_target_has_its_own_controls_and_they_learn_from_its_scores(obtained, trained, data, tmp_path):
    store, wanted = RunStore(tmp_path), 0.5 * dense(trained, 32)
    other_spec = target_spec("digits", "2x32", target_seed=1, epochs=1, batch=64)
    other, other_target = obtain_target(other_spec, data, store)
    one, record = obtain_control(*obtained, wanted, data, store, **CONTROL)
    two, other_record = obtain_control(other, other_target, wanted, data, store, **CONTROL)
    assert record.name != other_record.name
    assert one.hidden == two.hidden
    assert not same(one.state_dict(), two.state_dict())
    smaller = obtain_control(*obtained, 0.6 * wanted, data, store, **CONTROL)[0]
    assert smaller.hidden < one.hidden
    assert len(list(store.folder.glob(f"{data.checksum}/controls/*.json"))) == 3


def test_a_control_does_not_change_its_target(data, tmp_path):
    spec = target_spec("digits", "8", target_seed=0, epochs=1)
    target, trained = obtain_target(spec, data, RunStore(tmp_path))
    before = copy.deepcopy(target.state_dict())
    obtain_control(target, trained, 300, data, RunStore(tmp_path), epochs=1)
    assert same(before, target.state_dict())
    assert all(weight.grad is None for weight in target.parameters())


@pytest.mark.parametrize("rescale", ["none", "sigma"])
@pytest.mark.parametrize("scope", ["network", "layer"])
def test_a_first_layer_that_is_known_already_gives_the_identical_policy(scope, rescale, trained, data):
    policy, curve = quick(trained, data, scope=scope, rescale=rescale)
    lazy = lazy_net(trained, scope=scope, rescale=rescale)
    known = first_layer(trained, torch.from_numpy(data.train.x), 2**30)
    assert train_policy(lazy, data, policy_settings(), seeded(), first=known) == curve
    assert same(policy, lazy.policy.state_dict())
    other = lazy_net(trained, scope=scope, rescale=rescale)
    train_policy(other, data, policy_settings(), seeded(), first=-known)
    assert not same(policy, other.policy.state_dict())


@pytest.mark.parametrize("batch", [2048, 100])
@pytest.mark.parametrize("scope", ["network", "layer"])
def test_evaluation_with_a_known_first_layer_is_the_same(scope, batch, trained, data):
    x = torch.from_numpy(data.valid.x)
    lazy = lazy_net(trained, scope=scope)
    lazy = decided_by(lazy, Threshold.at(0.5, lazy.policy))
    plain, known = evaluate(lazy, x, batch=batch), evaluate(lazy, x, first_layer(trained, x, 2**30), batch)
    assert torch.equal(plain.mask, known.mask)
    torch.testing.assert_close(known.scores, plain.scores)
    torch.testing.assert_close(known.logits, plain.logits)
    shifted = evaluate(lazy, x, first_layer(trained, x, 2**30) + 1, batch)
    assert not torch.allclose(shifted.scores, plain.scores)


def test_without_a_controller_policy_plans_are_what_they_were():
    assert policy_plan(controller=0) == policy_plan(controller=0.0) == policy_plan()
    assert "controller" not in policy_plan()
    assert policy_plan(controller=0.1) == {**policy_plan(), "controller": 0.1}


def test_a_controller_needs_a_weight_to_multiply():
    with pytest.raises(UsageError, match="a controller multiplies lambda_s, which must then start above 0"):
        policy_plan(controller=0.1, lambda_s=0.0)


@pytest.mark.parametrize("controller", [-0.1, math.nan, math.inf])
def test_a_controller_that_is_no_number_of_at_least_0_is_refused(controller):
    with pytest.raises(UsageError, match=f"^controller must be a number of at least 0, not {controller}$"):
        policy_plan(controller=controller)


def with_a_large_group(lazy):
    """The same network with half of all neurons in its first group, and few in each of the others."""
    groups = (torch.arange(32) - 16).clamp(min=0) * 7 // 16 + (torch.arange(32) >= 16)
    return LazyNetwork(lazy.target, Partition((groups,) * 2, 8), lazy.policy, lazy.decision)


def test_the_controller_follows_the_share_of_neurons_above_tau(trained, data, monkeypatch):
    used, masks = [], []
    known = policy_training.sparsity_loss, estimators.log_probability
    monkeypatch.setattr(policy_training, "sparsity_loss", lambda *given: used.append(given[2]) or known[0](*given))
    monkeypatch.setattr(estimators, "log_probability", lambda *given: masks.append(given[1]) or known[1](*given))
    lazy = with_a_large_group(lazy_net(trained))
    train_policy(lazy, data, policy_settings(tau=0.3, lambda_s=0.5, controller=0.1), seeded())
    expected, sizes = [0.5], lazy.partition.sizes.tolist()
    for mask in masks:
        evaluated = [sum(size for size, bit in zip(sizes, row, strict=True) if bit) for row in mask.tolist()]
        expected.append(expected[-1] * math.exp(0.1 * (sum(evaluated) / len(evaluated) / 64 - 0.3)))
    assert sizes[0] == 32
    assert len(used) == len(masks) == 34
    assert used == pytest.approx(expected[:-1])


@pytest.mark.parametrize(("uneven", "tau"), [(False, 0.2), (False, 0.6), (True, 0.3)])
def test_a_controller_brings_activity_to_tau_where_lambda_is_too_weak(uneven, tau, trained, data):
    off = []
    for controller in (0.0, 0.3):
        lazy = lazy_net(trained)
        lazy = with_a_large_group(lazy) if uneven else lazy
        settings = policy_settings(epochs=10, tau=tau, lambda_s=0.02, controller=controller, learning_rate=0.02)
        train_policy(lazy, data, settings, seeded())
        off.append(abs(judged(lazy, data.valid)[2] - tau))
    assert off[1] < 0.05 < 0.3 < off[0]
