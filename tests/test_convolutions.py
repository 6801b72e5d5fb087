"""Conv nets whose filters are switched: masked evaluation, costs and compiled kernels against plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condcomp_lib import datasets
from condcomp_lib.errors import UsageError
from condcomp_lib.estimators import Minibatch
from condcomp_lib.estimators.sum_and_sample import SumAndSample
from condcomp_lib.joint_training import activity_by_layer, joint_spec, obtain_jointly
from condcomp_lib.kernels import compile, timing
from condcomp_lib.lazy import RESCALES, LazyNetwork, calibrated, decided_by, evaluate
from condcomp_lib.partitions import cut_into_blocks, make_partition
from condcomp_lib.policies import Budget, Given, Policy, Pool, Sample, Shared, Threshold
from condcomp_lib.runs import RunStore
from condcomp_lib.targets import ConvNet, build_target, hidden_widths
from condcomp_lib.training import first_layer

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 11), st.integers(1, 11))
LAYERS = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 2])), min_size=1, max_size=3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def lazy_conv(shape=(3, 7, 6), filters=(5, 7), strides=(1, 2), *, decision=None, pool=None, limits=None,
              always_on=False, rescale="none"):  # fmt: skip
    """An untrained conv net whose logits vary much by example, a bit for each filter."""
    target = ConvNet(shape, filters, 4, strides, seeded(1))
    partition = cut_into_blocks(filters, 1)
    policy = Policy(partition, target.inputs if pool else shape[0], pool, seeded(2), always_on, limits)
    with torch.no_grad():
        for gate in policy.gates:
            gate.weight.mul_(8)
        for layer in target.linears:
            layer.bias.normal_(0, 0.3, generator=seeded(3))
    return LazyNetwork(target, partition, policy, decision or Threshold((0.0,) * len(filters)), rescale)


def images(lazy, count, seed=4):
    return torch.randn(count, lazy.target.inputs, generator=seeded(seed))


def used(lazy, mask):
    """For each layer the bits of its own filters (bool, examples x filters)."""
    return [bits.bool() for bits in lazy.partition.by_gate(mask)]


@torch.no_grad()
def with_filters_zeroed(target, picture, kept):
    """Scores of one picture by plain convolutions of a copy in which the filters that are left out are zero."""
    h = picture.reshape(1, *target.shape)
    for layer, own in zip(target.linears[:-1], kept, strict=True):
        weight, bias = layer.weight * own[:, None, None, None], layer.bias * own
        h = nn.functional.conv2d(h, weight, bias, layer.stride, 1).relu()
    return target.linears[-1](h.mean((2, 3)))[0]


@given(SHAPES, LAYERS, st.data())
@settings(deadline=None)
def test_gated_output_is_the_dense_nets_with_those_filters_zeroed(shape, layers, draw):
    filters, strides = zip(*layers, strict=True)
    lazy = lazy_conv(shape, filters, strides)
    x = images(lazy, 3)
    mask = torch.tensor(draw.draw(st.lists(st.booleans(), min_size=lazy.partition.bits, max_size=lazy.partition.bits)))
    mask = mask.expand(3, -1)
    expected = [with_filters_zeroed(lazy.target, row, [own[0] for own in used(lazy, mask)]) for row in x]
    torch.testing.assert_close(lazy.masked_scores(x, mask), torch.stack(expected), rtol=1e-4, atol=1e-5)
    found = lazy.evaluate(x, None, Given(mask))
    torch.testing.assert_close(found.scores, torch.stack(expected), rtol=1e-4, atol=1e-5)


def products_of(target, kept, x):
    """Multiply-adds of one picture, one by one: nine for every output of a kept filter and every kept channel below."""
    total, below, (height, width) = 0, range(target.shape[0]), target.shape[1:]
    for number, stride in enumerate(target.strides):
        height, width = len(range(0, height, stride)), len(range(0, width, stride))
        chosen = kept[number].nonzero()[:, 0].tolist()
        total += sum(1 for _ in itertools.product(chosen, below, range(height * width), range(9)))
        below = chosen
    return total + len(below) * (height * width + target.linears[-1].out_features)


@given(SHAPES, LAYERS, st.integers(0, 99), st.booleans())
@settings(deadline=None)
def test_multiply_adds_are_those_of_a_brute_force_count(shape, layers, seed, pooled):
    filters, strides = zip(*layers, strict=True)
    lazy = lazy_conv(shape, filters, strides, pool=Pool(shape, 1) if pooled else None)
    mask = torch.rand(4, lazy.partition.bits, generator=seeded(seed)) < 0.5
    rows = []
    for row in range(4):
        kept = [own[row] for own in used(lazy, mask)]
        read = [math.prod(shape) if pooled else shape[0], *(int(own.sum()) for own in kept[:-1])]
        averaged = [math.prod(shape), *(read[i + 1] * h * w for i, (h, w) in enumerate(lazy.target.sides[:-1]))]
        gates = sum(r * f + a for r, f, a in zip(read, filters, averaged, strict=True))
        rows.append(products_of(lazy.target, kept, row) + gates)
    assert lazy.cost(mask).total_multiply_adds == pytest.approx(np.mean(rows))
    full = lazy.target_cost().total_multiply_adds
    assert full == products_of(lazy.target, [torch.ones(count) for count in filters], None)
    torch.testing.assert_close(lazy.computes(mask) * full, torch.tensor(rows, dtype=torch.float64))


def test_a_gate_reads_the_means_of_what_was_kept_below():
    lazy, gate = lazy_conv(), 1
    x = images(lazy, 6)
    found = lazy.evaluate(x)
    first = nn.functional.conv2d(x.reshape(6, 3, 7, 6), *lazy.target.layers[0].parameters(), 1, 1).relu()
    kept = first * used(lazy, found.mask)[0][:, :, None, None]
    torch.testing.assert_close(lazy.partition.by_gate(found.logits)[1], lazy.policy.gates[gate](kept.mean((2, 3))))
    torch.testing.assert_close(lazy.partition.by_gate(found.logits)[0],
                               lazy.policy.gates[0](x.reshape(6, 3, -1).mean(2)))  # fmt: skip


def test_probabilities_stay_within_their_limits_where_these_are_given():
    lazy = lazy_conv(limits=(0.1, 0.75))
    sigma = torch.cat(lazy.partition.by_gate(lazy.evaluate(100 * images(lazy, 20)).logits), 1).sigmoid()
    torch.testing.assert_close(torch.stack([sigma.min(), sigma.max()]), torch.tensor([0.1, 0.75]))


# the kernels


@given(SHAPES, LAYERS, st.integers(1, 5), st.booleans(), st.sampled_from(["none", "activity"]), st.booleans(),
       st.booleans(), st.sampled_from(["threshold", "budget"]))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_compiled_scores_and_masks_are_the_references(
    shape, layers, count, pooled, rescale, always_on, limited, decide
):
    filters, strides = zip(*layers, strict=True)
    counts = [max(1, own // 2) for own in filters]
    decision = Threshold((0.0,) * len(filters)) if decide == "threshold" else Budget(tuple(counts))
    lazy = lazy_conv(shape, filters, strides, decision=decision, pool=Pool(shape, 1) if pooled else None,
                     limits=(0.1, 0.75) if limited and decide == "threshold" else None, always_on=always_on,
                     rescale=rescale)  # fmt: skip
    fast, x = compile(lazy), images(lazy, count)
    scores, mask = fast.evaluate(x)
    with torch.no_grad():
        found = lazy.evaluate(x, None, Given(mask))
        own = evaluate(lazy, x)
    torch.testing.assert_close(scores, found.scores, rtol=1e-4, atol=1e-5)
    near = (found.logits.abs() < 1e-4) if decide == "threshold" else torch.zeros_like(mask)
    assert ((mask == own.mask) | near).all() or decide == "budget"
    if decide == "budget":
        assert [set(bits.sum(1).tolist()) for bits in used(lazy, mask)] == [{own} for own in counts]
    assert torch.equal(fast(x), scores)
    assert torch.equal(compile(lazy, "one")(x), scores)


def test_with_every_filter_off_the_net_still_answers_its_last_bias():
    lazy = lazy_conv(decision=Threshold((math.inf, math.inf)))
    expected = lazy.target.linears[-1].bias.detach().expand(3, -1)
    x = images(lazy, 3)
    scores, mask = compile(lazy).evaluate(x)
    assert not mask.any()
    assert torch.equal(scores, expected)
    torch.testing.assert_close(lazy(x).detach(), expected)


def test_filters_that_are_off_are_neither_computed_nor_read():
    lazy, kept = lazy_conv(filters=(6, 9), strides=(2, 1)), [torch.arange(6) % 2 == 0, torch.arange(9) % 3 == 0]
    x, mask = images(lazy, 5), torch.zeros(5, 18, dtype=torch.bool)
    for own, bits in zip(kept, lazy.partition.by_gate(mask), strict=True):
        bits[:] = own
    before = compile(lazy).evaluate(x, mask)[0]
    with torch.no_grad():  # numbers that would spoil every sum they took part in
        for number, own in enumerate(kept):
            lazy.target.layers[number].weight[~own] = math.inf
            lazy.target.layers[number].bias[~own] = math.nan
        lazy.target.layers[1].weight[:, ~kept[0]] = math.nan
    sound = lazy_conv(filters=(6, 9), strides=(2, 1))
    fast = compile(sound)  # which refuses such weights; they are put in afterwards
    for number in range(len(kept)):
        _overwrite(fast.packed.floats, lazy.target.layers[number].weight, sound.target.layers[number].weight)
    assert not np.isfinite(fast.packed.floats).all()
    assert torch.equal(fast.evaluate(x, mask)[0], before)


def _overwrite(numbers, spoilt, sound):
    """Put the spoilt weights of a layer where the kernel keeps the sound ones."""
    wanted = sound.detach().numpy().ravel()
    starts = [
        at for at in range(len(numbers) - len(wanted) + 1) if np.array_equal(numbers[at : at + len(wanted)], wanted)
    ]
    assert len(starts) == 1
    numbers[starts[0] : starts[0] + len(wanted)] = spoilt.detach().numpy().ravel()


def test_an_input_that_is_no_number_gives_none():
    lazy = lazy_conv()
    x = images(lazy, 3)
    x[1, 5] = math.nan
    scores = compile(lazy)(x)
    assert scores[1].isnan().all()
    torch.testing.assert_close(scores[[0, 2]], lazy(x).detach()[[0, 2]], rtol=1e-4, atol=1e-5)


def test_the_dense_engines_agree_on_a_conv_net():
    target = build_target("conv 5-8/2", (3, 7, 6), 4, seeded())
    x = torch.randn(6, 126, generator=seeded(1))
    engines, _ = timing.dense_engines(target, 1, ("eager", "onnxruntime"))
    assert set(engines) >= {"eager"}
    for engine in engines.values():
        torch.testing.assert_close(torch.from_numpy(engine(x.numpy())), target(x).detach(), rtol=1e-4, atol=1e-5)


# training


@pytest.mark.parametrize("how", [
    {"estimator": "reinforce", "limits": [0.1, 0.75]},
    {"estimator": "threshold-through", "rates": [0.5, 0.5], "pool": 2,
     "trained": {"estimator": "dense", "epochs": 1, "batch": 32}},
    {"estimator": "budget-through", "rates": [0.5, 0.5]},
])  # fmt: skip
def test_filters_learn_to_be_switched(how, tmp_path):
    data = datasets.load("digits")
    spec = joint_spec("digits", "conv 8-16/2", 1, seed=0, epochs=10, batch=32, network_rate=2e-2, learning_rate=3e-3,
                      tau=0.5, lambda_s=0.3, **how)  # fmt: skip
    lazy, record = obtain_jointly(spec, data, RunStore(tmp_path))
    assert record.result["accuracy"][-1] > 0.3
    assert isinstance(lazy.target, ConvNet)
    x = torch.from_numpy(data.test.x)
    found = evaluate(lazy, x)
    shares = activity_by_layer(lazy, found)
    assert all(0.2 < share < 0.9 for share in shares)
    again, _ = obtain_jointly(spec, data, RunStore(tmp_path))
    assert torch.equal(evaluate(again, x).scores, found.scores)


def test_training_that_starts_from_a_trained_net_starts_from_its_weights(tmp_path):
    data, store = datasets.load("digits"), RunStore(tmp_path)
    alone = {"estimator": "dense", "epochs": 2, "batch": 32}
    before, _ = obtain_jointly(joint_spec("digits", "conv 6", 1, seed=0, **alone), data, store)
    spec = joint_spec("digits", "conv 6", 1, seed=0, trained=alone, estimator="reinforce", network_rate=1e-12,
                      epochs=1, batch=32)  # fmt: skip
    after, _ = obtain_jointly(spec, data, store)
    for old, new in zip(before.target.parameters(), after.target.parameters(), strict=True):
        torch.testing.assert_close(old, new)


def test_a_teacher_is_the_network_as_it_was_trained_alone(tmp_path):
    data, store = datasets.load("digits"), RunStore(tmp_path)
    alone = {"estimator": "dense", "epochs": 2, "batch": 32}
    how = {"estimator": "threshold-through", "rates": [1.0], "tau": 1.0, "lambda_s": 0.0, "epochs": 1, "batch": 32}
    with pytest.raises(UsageError, match="has the network as it was trained alone for its teacher"):
        joint_spec("digits", "conv 6", 1, seed=0, distil=1.0, **how)
    spec = joint_spec("digits", "conv 6", 1, seed=0, trained=alone, distil=1.0, labels=0.0, **how)
    lazy, _ = obtain_jointly(spec, data, store)
    teacher, _ = obtain_jointly(joint_spec("digits", "conv 6", 1, seed=0, **alone), data, store)
    x = torch.from_numpy(data.test.x)
    # With every filter on and no labels there is nothing to learn but what it knows.
    torch.testing.assert_close(evaluate(lazy, x).scores, teacher.target(x), rtol=0.1, atol=0.1)


def test_calibrated_filters_meet_the_asked_activity():
    lazy = lazy_conv((3, 9, 9), (12, 16))
    x = images(lazy, 300)
    shares = activity_by_layer(calibrated(lazy, x, [0.5, 0.25]), evaluate(calibrated(lazy, x, [0.5, 0.25]), x))
    assert shares == pytest.approx([0.5, 0.25], abs=0.01)


# bad input


def sequential(*body, classes=4, filters=6):
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, classes))


def test_a_sequential_net_is_taken_over_with_its_weights():
    model = sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, 2, 1), nn.ReLU())
    net, x = ConvNet.of(model, (3, 7, 6)), torch.randn(4, 126, generator=seeded())
    torch.testing.assert_close(net(x), model(x.reshape(4, 3, 7, 6)))
    with torch.no_grad():
        model[0].weight.zero_()
    assert net.layers[0].weight.abs().sum() > 0


@pytest.mark.parametrize(("body", "named"), [
    ([nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)], "layer 2 is MaxPool2d"),
    ([nn.Conv2d(3, 6, 5, padding=2), nn.ReLU()], "layer 0 is Conv2d(3, 6, kernel_size=(5, 5)"),
    ([nn.Conv2d(3, 6, 3, 3, 1), nn.ReLU()], "layer 0 is Conv2d"),
    ([nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.ReLU()], "layer 0 is Conv2d"),
    ([nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()], "layer 1 is BatchNorm2d"),
    ([nn.Conv2d(3, 6, 3, padding=1), nn.Tanh()], "layer 1 is Tanh"),
])  # fmt: skip
def test_a_net_with_a_layer_that_cannot_be_gated_is_refused_by_name(body, named):
    with pytest.raises(UsageError) as error:
        ConvNet.of(sequential(*body), (3, 7, 6))
    assert named in str(error.value)
    assert "which cannot be gated; a conv net must be Conv2d (3 x 3" in str(error.value)


@pytest.mark.parametrize(("model", "message"), [
    (nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(252, 4)), "layer 1 is ReLU"),
    (sequential(), "this one has 3 layers"),
    (sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU()), "does not fit what lies below"),
    (sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.ReLU()), "does not fit what lies below"),
    (sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), filters=7), "does not fit what lies below"),
])  # fmt: skip
def test_a_net_of_another_build_is_refused(model, message):
    with pytest.raises(UsageError, match=message):
        ConvNet.of(model, (3, 7, 6))


@pytest.mark.parametrize("name", ["conv", "conv ", "conv 3x8", "conv 8/3", "conv 0-8", "conv8", "conv 8-/2"])
def test_a_name_that_is_no_conv_net_is_refused(name):
    with pytest.raises(UsageError, match="unknown architecture"):
        hidden_widths(name)


def test_bad_conv_nets_are_refused():
    with pytest.raises(UsageError, match="needs images, filters and classes"):
        ConvNet((3, 8, 8), (4, 0), 4)
    with pytest.raises(UsageError, match="needs images, filters and classes"):
        ConvNet((3, 8, 8), (), 4)
    with pytest.raises(UsageError, match=r"each of 2 layers needs a stride of 1 or 2, not \[1, 3\]"):
        ConvNet((3, 8, 8), (4, 4), 4, (1, 3))
    with pytest.raises(UsageError, match="limits must be two rising probabilities"):
        lazy_conv(limits=(0.75, 0.1))


def test_what_goes_with_fully_connected_nets_only_says_so():
    lazy = lazy_conv()
    with pytest.raises(UsageError, match="fully connected targets only"):
        LazyNetwork(lazy.target, lazy.partition, lazy.policy, lazy.decision, fill=[torch.zeros(5), torch.zeros(7)])
    with pytest.raises(UsageError, match="fully connected targets only, not with a ConvNet"):
        SumAndSample(lambda: (2, 2))(Minibatch(lazy, images(lazy, 2), lambda found: found.scores.sum(1)), seeded())
    assert first_layer(lazy.target, images(lazy, 2), 10**9) is None


@pytest.mark.parametrize(("made", "how", "message"), [
    (lambda: lazy_conv(), {"batch": "shared"}, 'conv net is compiled with batch "one" or "per-example"'),
    (lambda: lazy_conv(), {"dtype": "int8"}, 'dtype "float32"'),
    (lambda: lazy_conv(decision=Sample(seeded())), {}, "decides by Threshold or Budget, not by Sample"),
    (lambda: decided_by(lazy_conv(), Shared(Threshold((0.0, 0.0)))), {}, 'Shared decision goes with batch="shared"'),
])  # fmt: skip
def test_a_conv_net_that_cannot_be_compiled_is_refused(made, how, message):
    with pytest.raises(UsageError, match=message):
        compile(made(), **how)


def test_filters_that_share_a_bit_are_not_compiled():
    target, partition = ConvNet((3, 6, 6), (4, 6), 4), make_partition("contiguous", (4, 6), 2, seeded(), "layer")
    lazy = LazyNetwork(target, partition, Policy(partition, 3), Threshold((0.0, 0.0)))
    with pytest.raises(UsageError, match="switches single filters"):
        compile(lazy)


def test_rescaling_by_activity_keeps_the_mean():
    x = images(lazy_conv(), 4)
    for rescale in RESCALES:
        lazy = lazy_conv(rescale=rescale, decision=Threshold((-math.inf, -math.inf)))
        torch.testing.assert_close(lazy(x), lazy.target(x))
