"""The class-flow penalty: the factorised form equals the paper's four-dimensional one in value and gradient."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from condcomp_lib.errors import UsageError
from condcomp_lib.flow import FORMS, Flow, members, naive_flow, scores_with_flow
from condcomp_lib.targets import MLP

FLOWS = [Flow(form, normalised) for form in FORMS for normalised in (False, True)]


def network(widths, classes, seed=0, activation="relu"):
    return MLP(widths[0], widths[1:], classes, activation, torch.Generator().manual_seed(seed)).double()


def naive(target, x, y, flow):
    """Scores and penalty by the reference, layer by layer, with torch's own gradients."""
    total = torch.zeros((), dtype=x.dtype)
    for layer in target.linears:
        h = x if layer is target.linears[0] else x.relu()
        total = total + naive_flow(h, layer.weight, y, target.linears[-1].out_features, flow)
        x = layer(h)
    return x, total


def gradients(target, x, loss):
    """Of `loss`, in the input and in the weights."""
    target.zero_grad()
    x.grad = None
    loss.backward()
    zeros = torch.zeros_like
    return [zeros(part) if part.grad is None else part.grad.clone() for part in (x, *target.parameters())]


def compare(target, x, y, flow):
    """Value and gradient by both ways; the penalty's gradient by itself, taken to the size of one."""
    scores, value = scores_with_flow(target, x, y, flow)
    reference, expected = naive(target, x, y, flow)
    torch.testing.assert_close(scores, reference)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-300)
    silent = any(part == 0 for part in by_layer(target, x, y, flow))
    if value == 0 or (flow.form == "root" and silent):
        return  # the root has no slope at zero; ours is then none
    ours = gradients(target, x, value / value.detach())
    for own, other in zip(ours, gradients(target, x, expected / expected.detach()), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-7, atol=1e-9)


def labels(classes, examples, generator):
    """Every class once, the rest at random."""
    return torch.cat([torch.arange(classes), torch.randint(classes, (examples - classes,), generator=generator)])


@settings(deadline=None, max_examples=40)
@given(
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=3), classes=st.integers(2, 20),
    more=st.integers(0, 12), seed=st.integers(0, 1000), flow=st.sampled_from(FLOWS), zeros=st.floats(0, 0.5),
)  # fmt: skip
@example(widths=[600, 3], classes=3, more=2, seed=0, flow=Flow("product"), zeros=0.0)
@example(widths=[5, 40, 40], classes=17, more=5, seed=1, flow=Flow("root", True), zeros=0.0)
def test_factorised_equals_naive_in_value_and_gradient(widths, classes, more, seed, flow, zeros):
    generator = torch.Generator().manual_seed(seed)
    target = network(widths, classes, seed)
    y = labels(classes, classes + more, generator)
    x = torch.randn(len(y), widths[0], generator=generator, dtype=torch.float64)
    with torch.no_grad():
        x *= torch.rand(x.shape, generator=generator) >= zeros
        for layer in target.linears:
            layer.weight *= torch.rand(layer.weight.shape, generator=generator) >= zeros
            layer.bias += 1  # most neurons fire for some example of each class
    x.requires_grad_()
    compare(target, x, y, flow)


@pytest.mark.parametrize("flow", [flow for flow in FLOWS if flow.form != "product"], ids=str)
@pytest.mark.parametrize("present", [[2], [0, 3], [0, 1, 4]])
def test_they_are_equal_where_classes_are_missing_down_to_a_single_one(flow, present):
    target = network([6, 8, 7], 5)
    x = torch.rand(12, 6, dtype=torch.float64, requires_grad=True)
    compare(target, x, torch.tensor(present * 12)[:12], flow)


def test_scores_and_penalty_share_one_backward_pass():
    target, y = network([6, 8], 3), torch.arange(9) % 3
    x = torch.rand(9, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for scores, value in (scores_with_flow(target, x, y, Flow()), naive(target, x, y, Flow())):
        found.append(gradients(target, x, scores.square().sum() + 3 * value))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)


def test_a_row_that_is_quite_another_than_those_looked_at_does_not_leave_the_number_format():
    target = network([40], 10).float()
    with torch.no_grad():
        target.linears[0].weight[:, :] = 1e-6
        target.linears[0].weight[1] = 1.0  # powers of ten of their ratio are 1e60
    x, y = torch.rand(20, 40), torch.arange(20) % 10
    value = scores_with_flow(target, x, y, Flow("product"))[1]
    exact = scores_with_flow(target.double(), x.double(), y, Flow("product"))[1]
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)


def by_layer(target, x, y, flow):
    h, found = x.detach(), []
    for layer in target.linears:
        found.append(naive_flow(h, layer.weight.detach(), y, target.linears[-1].out_features, flow).item())
        h = layer(h).relu().detach()
    return found


@pytest.mark.parametrize("flow", FLOWS, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 10, 15, 16, 17, 100])
def test_single_precision_is_finite_from_two_to_a_hundred_classes_and_as_in_double(flow, classes):
    generator = torch.Generator().manual_seed(classes)
    target = network([30, 40], classes, classes)
    y = labels(classes, 2 * classes, generator)
    x = torch.randn(len(y), 30, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    exact = scores_with_flow(target, x, y, flow)[1]
    slopes = gradients(target, x, exact / exact.detach() if exact > 0 else exact)
    single, short = target.float(), x.detach().float().requires_grad_()
    value = scores_with_flow(single, short, y, flow)[1]
    assert math.isfinite(value.item())
    assert value.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-300)
    for own, other in zip(
        gradients(single, short, value / value.detach() if exact > 0 else value), slopes, strict=True
    ):
        assert own.isfinite().all()
        torch.testing.assert_close(own.double(), other, rtol=1e-2, atol=1e-3 * other.abs().max().item() + 1e-30)


def test_a_class_that_does_not_use_a_connection_makes_the_product_zero_but_not_the_pairs():
    target = network([2], 2)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    assert scores_with_flow(target, x, y, Flow("product"))[1].item() == 0
    assert scores_with_flow(target, x, y, Flow("root"))[1].item() == 0
    assert scores_with_flow(target, x, y, Flow("pairwise"))[1].item() > 0


def test_the_root_is_comparable_when_a_class_is_missing():
    target = network([6, 8], 3)
    x = torch.rand(300, 6, dtype=torch.float64)
    y = torch.arange(300) % 3
    few = y < 2
    every, two = (scores_with_flow(target, x[rows], y[rows], Flow())[1].item() for rows in (y < 3, few))
    assert 0.5 < two / every < 2


def test_normalised_flows_do_not_feel_the_size_of_a_layer_s_weights():
    target = network([6, 8, 9], 4)
    x, y = torch.rand(12, 6, dtype=torch.float64), torch.arange(12) % 4
    for form in FORMS:
        before = scores_with_flow(target, x, y, Flow(form, True))[1].item()
        with torch.no_grad():
            target.linears[-1].weight *= 7
        assert scores_with_flow(target, x, y, Flow(form, True))[1].item() == pytest.approx(before)


def test_training_on_the_penalty_lowers_it():
    target = network([6, 8], 3)
    x, y = torch.rand(30, 6, dtype=torch.float64), torch.arange(30) % 3
    optimiser = torch.optim.SGD(target.parameters(), lr=0.01)
    values = []
    for _ in range(20):
        value = scores_with_flow(target, x, y, Flow())[1]
        values.append(value.item())
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert values[-1] < 0.9 * values[0]


def test_without_a_penalty_in_the_loss_gradients_are_the_plain_ones():
    target = network([6, 8], 3)
    x, y = torch.rand(9, 6, dtype=torch.float64), torch.arange(9) % 3
    scores, value = scores_with_flow(target, x, y, Flow())
    (torch.nn.functional.cross_entropy(scores, y) + 0.0 * value).backward()
    ours = [weight.grad.clone() for weight in target.parameters()]
    target.zero_grad()
    torch.nn.functional.cross_entropy(target(x), y).backward()
    for own, weight in zip(ours, target.parameters(), strict=True):
        torch.testing.assert_close(own, weight.grad)


@pytest.mark.parametrize("classes", [1, 4096])
def test_one_class_only_and_thousands_are_refused(classes):
    said = f"^the class-flow penalty compares classes: there must be at least two, and fewer than 4096, not {classes}$"
    with pytest.raises(UsageError, match=said):
        members(torch.tensor([0, 0]), classes, Flow())


@pytest.mark.parametrize("y", [[], [0, 3], [-1, 0]])
def test_labels_outside_the_classes_are_refused(y):
    with pytest.raises(UsageError, match=r"^labels must be numbers from 0 to 2, for at least one example$"):
        members(torch.tensor(y, dtype=torch.int64), 3, Flow())


def test_a_class_without_examples_is_refused_in_the_product():
    with pytest.raises(UsageError, match=r"^class 1 has no example in this minibatch.*class-balanced.*\"root\""):
        members(torch.tensor([0, 2, 0]), 3, Flow("product"))


def test_another_activation_is_refused():
    target = network([4, 5], 2, activation="tanh")
    with pytest.raises(UsageError, match=r"^the class-flow penalty needs ReLU.*Tanh"):
        scores_with_flow(target, torch.rand(4, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1]), Flow())


def test_examples_and_labels_that_do_not_fit_are_refused_before_anything_is_read():
    target, x = network([4, 5], 2), torch.rand(6, 4, dtype=torch.float64)
    for wrong, y in ((x, torch.tensor([0, 1])), (x.float(), torch.arange(6) % 2), (x, torch.zeros(6))):
        with pytest.raises(
            UsageError, match=r"^examples must come as torch.float64, each with an int64 label; not 6 as "
        ):
            scores_with_flow(target, wrong, y, Flow())


def test_another_form_is_refused():
    with pytest.raises(UsageError, match="class-flow"):
        Flow("sum")


def test_inputs_that_are_no_numbers_are_refused():
    x = torch.rand(4, 4, dtype=torch.float64)
    x[1, 2] = math.nan
    with pytest.raises(
        UsageError, match=r"^inputs hold a number that is not finite; the class-flow penalty would be NaN$"
    ):
        scores_with_flow(network([4, 5], 2), x, torch.tensor([0, 1, 0, 1]), Flow())
