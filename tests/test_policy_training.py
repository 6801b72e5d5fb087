"""Training of policies by every estimator: what is trained and what stays, settings, warm starts, fine-tuning."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch

from condcomp_lib import datasets
from condcomp_lib.datasets import Split
from condcomp_lib.errors import UsageError
from condcomp_lib.lazy import LazyNetwork, calibrated, decided_by, evaluate
from condcomp_lib.oracle import Oracle
from condcomp_lib.partitions import make_partition
from condcomp_lib.policies import Policy, Sample, Threshold
from condcomp_lib.policy_training import ESTIMATORS, SUPERVISED, obtain_policy, policy_plan, train_policy
from condcomp_lib.runs import RunSpec, RunStore
from condcomp_lib.sparsity import FORMS
from condcomp_lib.training import accuracy, obtain_control, obtain_target, target_spec

PATHWISE = ("straight-through", "threshold-through", "budget-through", "gumbel-sigmoid", "gaussian")
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
either_scope = pytest.mark.parametrize("scope", ["network", "layer"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def obtained(data, tmp_path_factory):
    spec = target_spec("digits", "2x16", target_seed=0, epochs=2, batch=64, learning_rate=0.01)
    return obtain_target(spec, data, RunStore(tmp_path_factory.mktemp("artefacts")))


@pytest.fixture
def target(obtained):
    """A copy for each test, because fine-tuning changes it in place."""
    return copy.deepcopy(obtained[0])


def lazy_net(target, scope="network", seed=0, **policy):
    generator = seeded(seed)
    partition = make_partition("balanced", target.hidden, 4, generator, scope)
    policy = Policy(partition, 64, generator=generator, **policy)
    return LazyNetwork(copy.deepcopy(target), partition, policy, Sample(generator))


def plan(**changed):
    return policy_plan(**{"epochs": 1, "batch": 64, "learning_rate": 0.01, **changed})


def learned(target, data, scope="network", seed=0, **settings):
    """The lazy network with its trained policy, and the curve."""
    lazy = lazy_net(target, scope, seed)
    return lazy, train_policy(lazy, data, plan(**settings), seeded(seed))


def same(one, other):
    """Whether two networks have the same weights."""
    weights = other.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in one.state_dict().items())


# settings


def test_the_plan_is_what_it_was_where_nothing_new_is_asked_for():
    assert policy_plan(epochs=5) == {
        "estimator": "reinforce",
        "baseline": "mean",
        "tau": 0.25,
        "lambda_s": 1.0,
        "lambda_v": 0.0,
        "optimiser": "adam",
        "learning_rate": 0.001,
        "schedule": "cosine",
        "batch": 128,
        "max_epochs": 5,
        "patience": None,
    }


NEW = {
    "options": {"normalise": True},
    "sparsity": "rate",
    "rates": (0.2, 0.4),
    "computation": 1.5,
    "distil": 0.25,
    "labels": 0.5,
    "augment": 1,
    "warm_start": 2,
    "finetune": 1e-4,
}


@pytest.mark.parametrize("name", NEW)
def test_what_is_asked_for_is_added_to_the_plan(name):
    estimator = "straight-through" if name == "finetune" else "reinforce"
    assert policy_plan(estimator=estimator, **{name: NEW[name]}) == {
        **policy_plan(estimator=estimator),
        name: NEW[name],
    }


@every_estimator
def test_only_reinforce_has_a_baseline(estimator):
    settings = policy_plan(estimator=estimator)
    assert settings["estimator"] == estimator
    assert ("baseline" in settings) == (estimator == "reinforce")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"estimator": "rebar"}, f"^unknown estimator 'rebar'; known: {', '.join(sorted(ESTIMATORS))}$"),
        ({"sparsity": "l2"}, "^unknown form of the sparsity loss 'l2'; known: code, kl, rate, text$"),
        ({"baseline": "median"}, "^unknown baseline 'median'; known: leave-one-out, mean, moving, none$"),
        ({"rates": (0.5, 0)}, r"^the sparsity target tau must be in \(0, 1\], not 0$"),
        ({"rates": (1.5, 0.5)}, r"^the sparsity target tau must be in \(0, 1\], not 1.5$"),
        ({"rates": (math.nan,)}, r"^the sparsity target tau must be in \(0, 1\], not nan$"),
        ({"tau": -0.5, "estimator": "dpg"}, r"^the sparsity target tau must be in \(0, 1\], not -0.5$"),
        ({"options": {"entropy_weight": -1}}, "^the entropy's weight must be a number of at least 0, not -1$"),
        ({"controller": 1.0, "lambda_s": 0, "estimator": "disarm"}, "^a controller multiplies lambda_s"),
        ({"estimator": "gaussian", "epochs": 0}, "^epochs and batch must be at least 1, not 0 and 128$"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        policy_plan(**settings)


@pytest.mark.parametrize("value", [-0.1, -1, math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["lambda_s", "lambda_v", "computation", "distil", "labels", "augment", "warm_start", "finetune"]
)
def test_weights_that_are_no_numbers_of_at_least_0_are_refused(name, value):
    with pytest.raises(UsageError, match=rf"^{name} must be a number of at least 0, not {value}$"):
        policy_plan(estimator="straight-through", **{name: value})


@every_estimator
def test_weights_of_the_target_learn_only_where_the_loss_is_the_cost(estimator):
    if estimator in ("dense", "sum-and-sample", *PATHWISE):
        assert policy_plan(estimator=estimator, finetune=1e-3)["finetune"] == 1e-3
    else:
        known = "dense, sum-and-sample, straight-through, threshold-through, budget-through, gumbel-sigmoid, gaussian"
        with pytest.raises(UsageError, match=f"^the target's weights learn with {known} only, not with '{estimator}'$"):
            policy_plan(estimator=estimator, finetune=1e-3)
    assert policy_plan(estimator=estimator, finetune=None)["finetune"] is None


def test_as_many_rates_as_gates_are_needed(target, data):
    lazy = lazy_net(target, "layer")
    before = copy.deepcopy(lazy.policy)
    said = "^give one activity, or one for each of the 2 gates, not 3$"
    with pytest.raises(UsageError, match=said):
        train_policy(lazy, data, plan(rates=(0.5, 0.5, 0.5)), seeded())
    assert same(before, lazy.policy)


# every estimator


@either_scope
@every_estimator
def test_every_estimator_trains_the_policy_by_its_seeds_and_leaves_the_target(estimator, scope, target, data):
    before = torch.get_rng_state()
    (first, curve), (second, again) = (learned(target, data, scope, estimator=estimator) for _ in range(2))
    assert len(curve.accuracy) == len(curve.activity) == 1
    assert all(0 <= value <= 1 for value in (*curve.accuracy, *curve.activity))
    assert curve == again
    assert same(first.policy, second.policy)
    assert same(first.target, target)
    assert not any(weight.requires_grad or weight.grad is not None for weight in first.target.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    if estimator != "dense":
        other = lazy_net(target, scope)
        assert not same(first.policy, other.policy)
        train_policy(other, data, plan(estimator=estimator), seeded(1))
        assert not same(first.policy, other.policy)


def test_estimators_lead_to_policies_of_their_own(target, data):
    found = [learned(target, data, "layer", estimator=name)[0].policy for name in ESTIMATORS]
    assert not any(same(one, other) for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("reinforce", {"normalise": True}),
        ("gumbel-sigmoid", {"temperature": 2.0}),
        ("gaussian", {"deviation": 0.5}),
        ("dpg", {"noise": 0.5}),
        ("dpg-bits", {"hidden": 8}),
    ],
)
def test_options_reach_the_estimator(estimator, options, target, data):
    default, changed = (learned(target, data, estimator=estimator, options=own)[0] for own in ({}, options))
    assert same(default.policy, learned(target, data, estimator=estimator)[0].policy)
    assert not same(default.policy, changed.policy)


@pytest.mark.parametrize("estimator", ["straight-through", "gumbel-sigmoid", "disarm", "cross-entropy"])
def test_a_trained_policy_beats_an_untrained_one_at_the_same_activity(estimator, target, data):
    trained, _ = learned(target, data, "layer", estimator=estimator, epochs=6, sparsity="rate", tau=0.5)
    x, y = torch.from_numpy(data.valid.x), torch.from_numpy(data.valid.y)
    hits = []
    for lazy in (lazy_net(target, "layer"), trained):
        found = evaluate(calibrated(lazy, x, 0.5), x)
        hits.append((found.scores.argmax(1) == y).double().mean().item())
    assert hits[1] > hits[0] + 0.05


# what an example costs


def test_distillation_of_weight_0_is_none(target, data):
    (plain, curve), (zero, again) = learned(target, data), learned(target, data, distil=0, labels=1.0, computation=0)
    assert curve == again
    assert same(plain.policy, zero.policy)
    assert not same(plain.policy, learned(target, data, distil=0.25)[0].policy)


@pytest.mark.parametrize("estimator", ["reinforce", "straight-through"])
def test_distillation_alone_does_not_look_at_labels(estimator, target, data):
    wrong = dataclasses.replace(data, train=Split(data.train.x, (data.train.y + 3) % 10))
    for labels, alike in ((0, True), (1, False)):
        one, other = (
            learned(target, split, estimator=estimator, distil=1, labels=labels)[0] for split in (data, wrong)
        )
        assert same(one.policy, other.policy) == alike


@pytest.mark.parametrize("estimator", ["reinforce", "gumbel-sigmoid"])
def test_a_weight_of_computation_lowers_the_multiply_adds_of_a_sampled_policy(estimator, target, data):
    spent = []
    for computation in (0, 10):
        lazy, _ = learned(target, data, estimator=estimator, lambda_s=0, epochs=4, computation=computation)
        spent.append(lazy.computes(evaluate(lazy, torch.from_numpy(data.valid.x)).mask).mean().item())
    assert spent[1] < spent[0] - 0.1


# what holds activity


@pytest.mark.parametrize("form", FORMS)
def test_each_form_holds_every_gate_to_its_rate(form, target, data):
    lazy, _ = learned(target, data, "layer", sparsity=form, rates=(0.7, 0.3), lambda_s=30, epochs=8, learning_rate=0.03)
    mask = evaluate(lazy, torch.from_numpy(data.valid.x)).mask
    shares = mask.double().mean(0).split(4)
    assert [share.mean().item() for share in shares] == pytest.approx([0.7, 0.3], abs=0.06)


@pytest.mark.parametrize("estimator", ["straight-through", "threshold-through", "gumbel-sigmoid"])
def test_the_numbers_that_stand_for_bits_are_held_to_the_rate(estimator, target, data):
    lazy, curve = learned(
        target, data, "layer", estimator=estimator, sparsity="rate", tau=0.3, lambda_s=30, epochs=8, learning_rate=0.02
    )
    sampled = estimator != "threshold-through"
    decided = lazy if sampled else decided_by(lazy, Threshold.at(0.5, lazy.policy))
    mask = evaluate(decided, torch.from_numpy(data.valid.x)).mask
    assert mask.double().mean().item() == pytest.approx(0.3, abs=0.06)
    assert len(curve.activity) == 8


@every_estimator
def test_with_rates_the_curve_is_measured_at_these_rates(estimator, target, data):
    _, curve = learned(target, data, "layer", estimator=estimator, rates=(0.75, 0.25), epochs=2)
    assert curve.activity == pytest.approx([0.5, 0.5], abs=0.01)


# warm starts


@pytest.mark.parametrize("estimator", ["reinforce", "threshold-through", "dpg"])
def test_a_warm_start_is_cross_entropy_to_the_oracle_before_the_estimator(estimator, target, data):
    both, curve = learned(target, data, "layer", estimator=estimator, warm_start=2, lambda_v=0.1, distil=0.5)
    lazy, shuffling = lazy_net(target, "layer"), seeded()
    parts = [
        train_policy(lazy, data, plan(lambda_v=0.1, distil=0.5, **own), shuffling)
        for own in ({"estimator": "cross-entropy", "epochs": 2}, {"estimator": estimator})
    ]
    assert same(both.policy, lazy.policy)
    assert curve.accuracy == parts[0].accuracy + parts[1].accuracy
    assert curve.activity == parts[0].activity + parts[1].activity
    assert len(curve.accuracy) == 3
    assert not same(both.policy, learned(target, data, "layer", estimator=estimator)[0].policy)


def test_a_warm_start_of_no_epochs_is_none(target, data):
    (plain, curve), (zero, again) = learned(target, data), learned(target, data, warm_start=0)
    assert curve == again
    assert same(plain.policy, zero.policy)


def test_a_warm_start_leaves_the_target_that_is_fine_tuned_afterwards(target, data):
    lazy, _ = learned(target, data, estimator="dense", lambda_s=0, warm_start=1, finetune=1e-3)
    alone, _ = learned(target, data, estimator="cross-entropy")
    assert same(lazy.policy, alone.policy)
    assert not same(lazy.target, target)


# fine-tuning


@either_scope
@pytest.mark.parametrize("estimator", ["dense", *PATHWISE])
def test_fine_tuning_trains_the_target_too_and_by_its_seeds(estimator, scope, target, data):
    tuned, again = (learned(target, data, scope, estimator=estimator, finetune=1e-3, lambda_s=0) for _ in range(2))
    assert not any(
        torch.equal(weight, was) for weight, was in zip(tuned[0].target.parameters(), target.parameters(), strict=True)
    )
    assert same(tuned[0].target, again[0].target)
    assert same(tuned[0].policy, again[0].policy)
    assert tuned[1] == again[1]
    assert same(tuned[0].policy, lazy_net(target, scope).policy) == (estimator == "dense")
    assert not any(weight.requires_grad for weight in tuned[0].target.parameters())


def test_the_target_follows_its_own_rate_and_the_policy_the_plans(target, data):
    one_step = {"batch": len(data.train), "optimiser": "sgd", "schedule": "constant", "estimator": "straight-through"}
    slow, fast = (learned(target, data, finetune=rate, **one_step)[0] for rate in (0.1, 0.3))
    assert same(slow.policy, fast.policy)
    for was, one, other in zip(*(net.parameters() for net in (target, slow.target, fast.target)), strict=True):
        torch.testing.assert_close(other - was, 3 * (one - was), rtol=1e-3, atol=1e-6)
        assert not torch.equal(one, was)


@pytest.mark.parametrize("finetune", [0, 0.0, None])
def test_fine_tuning_at_no_rate_is_none(finetune, target, data):
    frozen, curve = learned(target, data, estimator="straight-through", finetune=finetune)
    plain, expected = learned(target, data, estimator="straight-through")
    assert same(frozen.target, target)
    assert curve == expected
    assert same(frozen.policy, plain.policy)


@either_scope
def test_with_every_group_evaluated_only_the_target_learns(scope, target, data):
    lazy, _ = learned(target, data, scope, estimator="dense", lambda_s=0, finetune=1e-2, epochs=4)
    assert same(lazy.policy, lazy_net(target, scope).policy)
    assert accuracy(lazy.target, data.valid) > accuracy(target, data.valid)


def test_with_every_group_evaluated_there_is_nothing_to_distil(target, data):
    settings = {"optimiser": "sgd", "lambda_s": 0, "labels": 0, "distil": 1, "finetune": 0.1}
    lazy, _ = learned(target, data, estimator="dense", **settings)
    torch.testing.assert_close(lazy.target.state_dict(), target.state_dict())
    masked, _ = learned(target, data, estimator="straight-through", **settings)
    assert not torch.allclose(masked.target.linears[0].weight, target.linears[0].weight, atol=1e-3)


# moved pictures


@pytest.mark.parametrize("estimator", ["reinforce", "threshold-through"])
def test_moved_pictures_are_evaluated_anew_and_follow_the_seed(estimator, target, data):
    moved, again, plain = (
        learned(target, data, estimator=estimator, epochs=2, augment=augment)[0] for augment in (1, 1, 0)
    )
    assert same(moved.policy, again.policy)
    assert not same(moved.policy, plain.policy)
    assert same(moved.target, target)
    lazy = lazy_net(target)  # a first layer known for the pictures as they were is of no use
    wrong = torch.zeros(len(data.train), 16)
    train_policy(lazy, data, plan(estimator=estimator, epochs=2, augment=1), seeded(), first=wrong)
    assert same(lazy.policy, moved.policy)


# what is refused


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "reinforce"])
def test_only_reinforce_needs_a_network_that_samples(estimator, target, data):
    def fixed():
        lazy = lazy_net(target)
        return decided_by(lazy, Threshold.at(0.5, lazy.policy))

    lazy, settings = fixed(), plan(estimator=estimator)
    assert len(train_policy(lazy, data, settings, seeded()).accuracy) == 1
    assert isinstance(lazy.decision, Threshold)
    said = "^REINFORCE learns from sampled masks, not from a Threshold"
    with pytest.raises(UsageError, match=said):
        train_policy(fixed(), data, plan(), seeded())


@every_estimator
def test_a_last_batch_of_one_is_refused_where_a_baseline_or_l_v_needs_two(estimator, target, data):
    lazy = lazy_net(target)
    before, last = copy.deepcopy(lazy.policy), "^1077 examples in batches of 269 leave a last batch of one, for which "
    settings = plan(estimator=estimator, batch=269, lambda_v=0.1)
    with pytest.raises(UsageError, match=last + ("baseline 'mean'" if estimator == "reinforce" else "L_v") + " says"):
        train_policy(lazy, data, settings, seeded())
    assert same(before, lazy.policy)
    if estimator != "reinforce":
        assert len(train_policy(lazy, data, {**settings, "lambda_v": 0.0}, seeded()).accuracy) == 1


@every_estimator
def test_rescaling_by_sigma_goes_with_reinforce_only(estimator, target, data):
    plain = lazy_net(target)
    lazy = LazyNetwork(plain.target, plain.partition, plain.policy, plain.decision, "sigma")
    before = copy.deepcopy(lazy.policy)
    if estimator == "reinforce":
        train_policy(lazy, data, plan(), seeded())
        assert not same(before, lazy.policy)
    else:
        with pytest.raises(
            UsageError, match=f"^rescale \"sigma\" goes with REINFORCE from the start only, not with '{estimator}'$"
        ):
            train_policy(lazy, data, plan(estimator=estimator), seeded())
        assert same(before, lazy.policy)


@every_estimator
def test_an_oracle_has_nothing_to_learn(estimator, target, data):
    lazy = lazy_net(target)
    knowing = LazyNetwork(target, lazy.partition, Oracle(target, lazy.partition), lazy.decision)
    said = "^an oracle has nothing to learn; give it a lazy network with a Policy$"
    with pytest.raises(UsageError, match=said):
        train_policy(knowing, data, plan(estimator=estimator), seeded())


@pytest.mark.parametrize("settings", [*({"estimator": name} for name in SUPERVISED), {"warm_start": 1}], ids=str)
@either_scope
def test_a_policy_with_an_always_on_group_cannot_be_supervised(settings, scope, target, data):
    lazy = lazy_net(target, scope, always_on=True)
    before = copy.deepcopy(lazy.policy)
    said = "^a supervised router needs a policy without an always-on group$"
    with pytest.raises(UsageError, match=said):
        train_policy(lazy, data, plan(**settings), seeded())
    assert same(before, lazy.policy)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name not in ("dense", *SUPERVISED)])
def test_all_others_train_a_policy_with_an_always_on_group(estimator, target, data):
    lazy = lazy_net(target, "layer", always_on=True)
    train_policy(lazy, data, plan(estimator=estimator), seeded())
    assert not same(lazy.policy, lazy_net(target, "layer", always_on=True).policy)
    assert evaluate(lazy, torch.from_numpy(data.valid.x)).mask[:, [0, 4]].all()


# artefacts


def test_fine_tuned_weights_come_back_from_the_cache(target, data, tmp_path):
    settings = plan(estimator="straight-through", finetune=0.01)
    spec = RunSpec("policies", 1, {**settings, "policy_seed": 0})
    first, second = (lazy_net(copy.deepcopy(target)) for _ in range(2))
    for lazy in (first, second):
        obtain_policy(spec, lazy, data, RunStore(tmp_path))
    assert same(first.policy, second.policy)
    assert same(first.target, second.target)
    assert not same(first.target, target)


@pytest.mark.parametrize("estimator", ["disarm", "dpg", "gumbel-sigmoid", "cross-entropy"])
def test_a_trained_policy_comes_back_from_the_cache(estimator, target, data, tmp_path):
    spec = RunSpec("policies", 1, {**plan(estimator=estimator, rates=(0.5,)), "policy_seed": 0})
    first, second = lazy_net(target), lazy_net(target)
    records = [obtain_policy(spec, lazy, data, RunStore(tmp_path)) for lazy in (first, second)]
    assert records[0] == records[1]
    assert records[0].result["epochs"] == 1
    assert same(first.policy, second.policy)
    assert not same(first.policy, lazy_net(target).policy)


def test_a_control_that_sees_moved_pictures_is_another_artefact(obtained, data, tmp_path):
    settings = {"epochs": 2, "batch": 64, "learning_rate": 0.01}
    found = [
        obtain_control(*obtained, 800, data, RunStore(tmp_path / folder), **settings, **own)
        for folder, own in (("a", {}), ("a", {"augment": 0}), ("a", {"augment": 1}), ("b", {"augment": 1}))
    ]
    (plain, none, moved, again), records = zip(*found, strict=True)
    assert records[0] == records[1]
    assert records[0].name != records[2].name == records[3].name
    assert "augment" not in records[0].spec.settings
    assert records[2].spec.settings == {**records[0].spec.settings, "augment": 1}
    assert same(plain, none)
    assert not same(plain, moved)
    assert same(moved, again)
    assert plain.hidden == moved.hidden


def test_a_control_cannot_see_pictures_moved_by_less_than_nothing(obtained, data, tmp_path):
    said = "^pictures can be moved by 0 pixels or more, not by -1$"
    with pytest.raises(UsageError, match=said):
        obtain_control(*obtained, 800, data, RunStore(tmp_path), augment=-1, epochs=1)
