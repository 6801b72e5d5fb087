"""The class-flow penalty (*partitions*, section 4.2), by two passes over the weights.

The flow of class c through a connection is f_ij^c, the mean of |h_i w_ij| over the examples of that class, and the
penalty of a layer is large where all classes use the same connections. Since |h_i w_ij| = |h_i| |w_ij|, with a_i^c the
mean of |h_i| over class c both forms of the paper are sums over (g_i |w_ij|)^p:

- product, sum_ij prod_c f_ij^c: g_i is the geometric mean of the a_i^c, and p the number of classes;
- pairwise, sum_ij sum_{c1,c2} f_ij^c1 f_ij^c2: g_i is their sum, and p is 2.

So no tensor of classes x examples x neurons x neurons is needed: one pass over the weights finds the value, another
adds the gradient to the layer's own.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from condcomp_lib import flow_passes
from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.flow_passes import COLUMNS, EXTRA, HIGH, LEVEL, SIZES
from condcomp_lib.targets import MLP

FORMS = ("product", "root", "pairwise")
MOST = 709.0  # whose exponential is still a number


@dataclass(frozen=True)
class Flow:
    """Which class-flow penalty: its `form` and whether flows are divided by their layer's mean flow first.

    - "product": sum_ij prod_c f_ij^c, the paper's; it spans many orders of magnitude, and every class must occur.
    - "root": (sum_ij prod_c f_ij^c)^(1/C), of the size of a flow; C are the classes that occur in the minibatch.
    - "pairwise": sum_ij (sum_c f_ij^c)^2, which is not zero where a single class does not use a connection.

    `normalised` takes f_ij^c / (mean of all f_ij^c of the layer) instead, and the mean over connections in place of the
    sum: layers count the same whatever their width, and shrinking all weights of a layer changes nothing. (The paper
    wishes for it in section 6.)
    """

    form: str = "root"
    normalised: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form of the class-flow penalty", self.form, FORMS)


class Members(NamedTuple):
    """The classes of a minibatch: of each example the number of its class among those that occur (int64) and one over
    the examples of that class (float64); how many classes occur."""

    place: np.ndarray
    share: np.ndarray
    present: int


def members(y: Tensor, classes: int, flow: Flow) -> Members:
    """Which examples belong together, from their labels `y` (int64, examples) below `classes`.

    Raises UsageError for fewer than two classes, and for a class without examples in the form "product", whose value
    then depends on which classes occur.

    >>> members(torch.tensor([0, 1, 0, 0]), 2, Flow()).present
    2
    """
    if not 2 <= classes < HIGH**3:
        raise UsageError(f"the class-flow penalty compares classes: there must be at least two, and fewer than "
                         f"{HIGH**3}, not {classes}")  # fmt: skip
    place, share = np.empty(len(y), dtype=np.int64), np.empty(len(y))
    present, missing = flow_passes.find_members(y.numpy(), np.zeros(classes, dtype=np.int64), place, share)
    if not present:
        raise UsageError(f"labels must be numbers from 0 to {classes - 1}, for at least one example")
    if flow.form == "product" and missing >= 0:
        raise UsageError(f"class {missing} has no example in this minibatch, so its mean flow is 0/0; draw "
                         'minibatches class-balanced, or take the form "root", which skips such classes')  # fmt: skip
    return Members(place, share, present)


def scores_with_flow(target: MLP, x: Tensor, y: Tensor, flow: Flow) -> tuple[Tensor, Tensor]:
    """Scores (float32, examples x classes) of `x`, and the class-flow penalty summed over all weight layers, the
    input's included (float64).

    Arguments: `x` float32 (examples x features), `y` int64 (examples) their labels. On the CPU, with ReLU.

    >>> net = MLP(4, (3,), 2, generator=torch.Generator().manual_seed(0))
    >>> (scores_with_flow(net, torch.ones(2, 4), torch.tensor([0, 1]), Flow())[1] > 0).item()
    True
    """
    check_relu(target)
    if len(y) != len(x) or x.dtype != target.linears[0].weight.dtype or y.dtype != torch.int64:
        raise UsageError(f"examples must come as {target.linears[0].weight.dtype}, each with an int64 label; not "
                         f"{len(x)} as {x.dtype} with {len(y)} labels as {y.dtype}")  # fmt: skip
    by_label = members(y, target.linears[-1].out_features, flow)
    parameters = [part for layer in target.linears for part in (layer.weight, layer.bias)]
    scores, value = _FlowLayers.apply(x, by_label, flow, *parameters)
    if math.isnan(value.item()) and not x.isfinite().all():
        raise UsageError("inputs hold a number that is not finite; the class-flow penalty would be NaN")
    return scores, value


def check_relu(target: MLP) -> None:
    """Raise UsageError unless the hidden activations are ReLU."""
    if not isinstance(target.activation, torch.nn.ReLU):
        raise UsageError("the class-flow penalty needs ReLU: with another activation the flow through a connection "
                         f"changes its sign from example to example, here with {target.activation}")  # fmt: skip


def naive_flow(h: Tensor, weight: Tensor, y: Tensor, classes: int, flow: Flow) -> Tensor:
    """The penalty of one layer as the paper computes it: a tensor of classes x examples x inputs x outputs.

    It is the reference for `scores_with_flow`, and what its cost is compared with.
    """
    place, share, count = members(y, classes, flow)
    means = torch.zeros(count, len(y), dtype=h.dtype)
    means[torch.from_numpy(place), torch.arange(len(y))] = torch.from_numpy(share).to(h.dtype)
    f = (means[:, :, None, None] * (h[:, :, None] * weight.T).abs()).sum(1)
    if flow.normalised:
        f = f / (f.mean() if f.any() else 1.0)
    found = f.sum(0).square() if flow.form == "pairwise" else f.prod(0)
    total = found.mean() if flow.normalised else found.sum()
    return total ** (1 / len(f)) if flow.form == "root" else total


class _FlowLayers(torch.autograd.Function):
    """Linear layers with ReLU between them, whose backward pass adds the penalty's gradient to that of the weights and
    of the activations as these are found."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, by_label: Members, flow: Flow, *parameters: Tensor) -> Any:
        read: list[Tensor] = []
        ctx.found = []
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            h = h.relu_() if read else h
            read.append(h)
            ctx.found.append(_measured(h, weight, by_label, flow))
            h = torch.addmm(bias, h, weight.T)
        ctx.save_for_backward(*read, *parameters[::2])
        ctx.by_label = by_label
        return h, torch.tensor(sum(found.value for found in ctx.found), dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, outer: Tensor) -> Any:
        depth, gradients = len(ctx.found), []
        read, weights, coefficient = ctx.saved_tensors[:depth], ctx.saved_tensors[depth:], outer.item()
        for layer in reversed(range(depth)):
            h, weight, found = read[layer], weights[layer], ctx.found[layer]
            by_weight = slope.T @ h
            gradients += [slope.sum(0), by_weight]
            found.add_to_weights(by_weight, weight, coefficient)
            if layer or ctx.needs_input_grad[0]:
                slope = slope @ weight
                found.add_below(slope, h, ctx.by_label, coefficient, relu=layer > 0)
        return (slope if ctx.needs_input_grad[0] else None, None, None, *reversed(gradients))


def _measured(h: Tensor, weight: Tensor, by_label: Members, flow: Flow) -> "_Measured":
    """The penalty of one layer that reads `h` (examples x inputs), and what its gradient takes."""
    pairwise, count = flow.form == "pairwise", by_label.present
    sums = torch.zeros(count + EXTRA, h.shape[1], dtype=h.dtype).numpy()
    flow_passes.add_levels(sums, h.numpy(), by_label.place, by_label.share, pairwise)
    power, w = 2 if pairwise else count, weight.numpy()
    top, total = flow_passes.sum_powers(w, sums[LEVEL], power, sums[COLUMNS])
    mean = 1.0
    if flow.normalised:
        flow_passes.add_sizes(sums[SIZES], w)
        mean = float(sums[:-EXTRA].sum(0) @ sums[SIZES]) / (w.size * count)
    return _Measured(flow, power, sums, top, total, mean, w.size)


@dataclass(frozen=True, eq=False)
class _Measured:
    """What one pass over a layer's weights found.

    `sums` has a number for each input in every row: a_i^c for the classes that occur, then g_i (LEVEL), the sum over
    the outputs of (g_i |w_ij| / top)^power (COLUMNS) and, where flows are normalised, that of |w_ij| (SIZES). `total`
    is the sum of the COLUMNS; `mean` the layer's mean flow over its `count` connections, 1 where flows are not
    normalised.
    """

    flow: Flow
    power: int
    sums: np.ndarray
    top: float
    total: float
    mean: float
    count: int

    @functools.cached_property
    def value(self) -> float:
        """The penalty, by way of its logarithm: products of a hundred small numbers leave every number format."""
        if self.total == 0:
            return 0.0
        size = self.power * math.log(self.top / self.mean) + math.log(self.total)
        size -= math.log(self.count) if self.flow.normalised else 0.0
        size = size / self.power if self.flow.form == "root" else size
        return math.inf if size >= MOST else math.exp(size)

    @property
    def _rate(self) -> float:
        """d value / d log(total)."""
        return self.value / self.power if self.flow.form == "root" else self.value

    @property
    def _flat(self) -> float:
        """d value / d f of every f_ij^c alike: through the mean that flows are divided by."""
        spread = self.mean * self.count * (len(self.sums) - EXTRA)
        return -self._rate * self.power / spread if self.flow.normalised and self.total else 0.0

    def add_to_weights(self, slope: Tensor, weight: Tensor, coefficient: float) -> None:
        """Add `coefficient` times the gradient in the weights to `slope` (outputs x inputs), in place."""
        if not self.total:
            return
        steep = coefficient * self._rate * self.power / (self.top * self.total)
        g, w, level = slope.numpy(), weight.numpy(), self.sums[LEVEL]
        if self.power == 1:  # a single class occurs: its flows themselves
            flow_passes.add_signs(g, w, level, steep)
        else:
            flow_passes.add_gradient(g, w, level, self.power, 1 / self.top, steep)
        if self._flat:
            flow_passes.add_signs(g, w, self.sums[:-EXTRA].sum(0), coefficient * self._flat)

    def add_below(self, slope: Tensor, h: Tensor, by_label: Members, coefficient: float, relu: bool) -> None:
        """Add `coefficient` times the gradient in what the layer reads to `slope` (examples x inputs), in place; then
        take what `relu` has cut off out of it."""
        rate = coefficient * self._rate / self.total if self.total else 0.0
        pairwise, flat = self.flow.form == "pairwise", coefficient * self._flat
        place, share = by_label.place, by_label.share
        flow_passes.add_below(slope.numpy(), h.numpy(), self.sums, place, share, rate, flat, pairwise, relu)
