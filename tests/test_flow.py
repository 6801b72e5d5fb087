"""The class-flow penalty: the factorised form equals the paper's four-dimensional one in value and gradient."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from condcomp_lib.flow import FORMS, Flow, naive_flow, scores_with_flow
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


def gradients(target, x, scores, value):
    """Of the penalty together with something of the scores, in the weights and in the input."""
    target.zero_grad()
    x.grad = None
    (value + scores.square().sum()).backward()
    return [x.grad.clone(), *(weight.grad.clone() for weight in target.parameters())]


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
    scores, value = scores_with_flow(target, x, y, flow)
    reference, expected = naive(target, x, y, flow)
    torch.testing.assert_close(scores, reference)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-300)
    silent = any(part == 0 for part in by_layer(target, x, y, flow))
    if flow.form == "root" and silent:
        return  # the root has no slope at zero; ours is then left at none
    ours, theirs = gradients(target, x, scores, value), gradients(target, x, reference, expected)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-7, atol=1e-12)


def by_layer(target, x, y, flow):
    h, found = x.detach(), []
    for layer in target.linears:
        found.append(naive_flow(h, layer.weight.detach(), y, target.linears[-1].out_features, flow).item())
        h = layer(h).relu().detach()
    return found
