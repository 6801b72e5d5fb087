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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.files import cached, inlined
from condcomp_lib.targets import MLP

FORMS = ("product", "root", "pairwise")
HIGH = 16  # exponents below it are made of four squares at most
SOME = 16  # of so many rows of weights one is looked at for a size to take powers relative to
MOST = 709.0  # whose exponential is still a number


@inlined
def _raised(v, power):  # type: ignore[no-untyped-def]
    """v^power for whole exponents from 0 to below HIGH, by squares and without a branch: loops over it take a vector at
    a time."""
    one = type(v)(1)
    v2 = v * v
    v4 = v2 * v2
    low = (v if power & 1 else one) * (v2 if power & 2 else one)
    return low * ((v4 if power & 4 else one) * (v4 * v4 if power & 8 else one))


@inlined
def _highly_raised(v, power):  # type: ignore[no-untyped-def]
    """v^power for whole exponents below HIGH^3."""
    v4 = v * v * v * v
    v16 = v4 * v4 * v4 * v4
    v64 = v16 * v16 * v16 * v16
    return _raised(v, power) * _raised(v16, power >> 4) * _raised(v64 * v64 * v64 * v64, power >> 8)


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
    labels = y.numpy()
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise UsageError(f"labels must be numbers from 0 to {classes - 1}, for at least one example")
    counts = np.bincount(labels, minlength=classes)
    occur = counts > 0
    if flow.form == "product" and not occur.all():
        raise UsageError(f"class {occur.argmin()} has no example in this minibatch, so its mean flow is 0/0; draw "
                         'minibatches class-balanced, or take the form "root", which skips such classes')  # fmt: skip
    return Members((occur.cumsum() - 1)[labels], 1 / counts[labels], int(occur.sum()))


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
                found.add_below(slope, h, ctx.by_label, coefficient)
                if layer:
                    slope = slope * (h > 0)
        return (slope if ctx.needs_input_grad[0] else None, None, None, *reversed(gradients))


def _measured(h: Tensor, weight: Tensor, by_label: Members, flow: Flow) -> "_Measured":
    """The penalty of one layer that reads `h` (examples x inputs), and what its gradient takes."""
    place, share, count = by_label
    by_class = torch.zeros(count, h.shape[1], dtype=h.dtype)  # a_i^c
    _add_means(by_class.numpy(), h.numpy(), place, share)
    pairwise = flow.form == "pairwise"
    level, power = (by_class.sum(0), 2) if pairwise else (by_class.log().mean(0).exp(), count)
    columns, sizes = torch.zeros(2, len(level), dtype=h.dtype)
    top, total = (_powers if power < HIGH else _high_powers)(weight.numpy(), level.numpy(), power, columns.numpy())
    mean = 1.0
    if flow.normalised:
        _add_sizes(sizes.numpy(), weight.numpy())
        mean = (by_class.sum(0) @ sizes).item() / (weight.numel() * count)
    return _Measured(flow, power, by_class, level, columns, sizes, top, total, mean, weight.numel())


@dataclass(frozen=True, eq=False)
class _Measured:
    """What one pass over a layer's weights found.

    `by_class` a_i^c (classes that occur x inputs), `level` g_i, `columns` the sum over the outputs of
    (g_i |w_ij| / top)^power, `sizes` that of |w_ij| (both by input), `total` the sum of `columns`; `mean` the layer's
    mean flow over its `count` connections, 1 where flows are not divided by it.
    """

    flow: Flow
    power: int
    by_class: Tensor
    level: Tensor
    columns: Tensor
    sizes: Tensor
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
        spread = self.mean * self.count * len(self.by_class)
        return -self._rate * self.power / spread if self.flow.normalised and self.total else 0.0

    def add_to_weights(self, slope: Tensor, weight: Tensor, coefficient: float) -> None:
        """Add `coefficient` times the gradient in the weights to `slope` (outputs x inputs), in place."""
        if not self.total:
            return
        steep = coefficient * self._rate * self.power / (self.top * self.total)
        if self.power == 1:  # a single class occurs: its flows themselves
            _add_signs(slope.numpy(), weight.numpy(), self.level.numpy(), steep)
        else:
            add = _add_gradient if self.power < HIGH else _add_high_gradient
            add(slope.numpy(), weight.numpy(), self.level.numpy(), self.power, 1 / self.top, steep)
        if self._flat:
            _add_signs(slope.numpy(), weight.numpy(), self.by_class.sum(0).numpy(), coefficient * self._flat)

    def add_below(self, slope: Tensor, h: Tensor, by_label: Members, coefficient: float) -> None:
        """Add `coefficient` times the gradient in what the layer reads to `slope` (examples x inputs), in place."""
        if not self.total:
            return
        over = (self.level / 2).expand_as(self.by_class) if self.flow.form == "pairwise" else self.by_class
        by_mean = self.columns * (coefficient * self._rate / self.total) / over
        by_mean[:, self.columns == 0] = 0
        by_mean += coefficient * self._flat * self.sizes
        _add_below(slope.numpy(), h.numpy(), by_mean.numpy(), by_label.place, by_label.share)


@cached
def _add_means(by_class, h, place, share):  # type: ignore[no-untyped-def]
    """by_class[place of the example] += its share |h|, over all examples."""
    for row in range(len(h)):
        one, out, part = h[row], by_class[place[row]], h.dtype.type(share[row])
        for k in range(len(one)):
            out[k] += part * abs(one[k])


@cached
def _add_below(below, h, by_mean, place, share):  # type: ignore[no-untyped-def]
    """below += its share of by_mean[place of the example] sign(h), in place."""
    zero = h.dtype.type(0)
    for row in range(len(h)):
        one, rate, out, part = h[row], by_mean[place[row]], below[row], h.dtype.type(share[row])
        for k in range(len(one)):
            change = part * rate[k]
            out[k] += change if one[k] > zero else -change if one[k] < zero else zero


def _summing(raised: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function that adds up powers, with exponents that `raised` can do."""

    @cached
    def powers(weight, level, power, columns):  # type: ignore[no-untyped-def]
        """Add to `columns` (inputs) the sum over the rows of `weight` of (level |w| / top)^power; returns top, a size
        of level |w| that keeps powers inside the number format, and the sum over all.

        For few classes the largest of some rows will do; where a row that was not looked at is quite another, all are.
        """
        top, total = weight.dtype.type(0), 0.0
        for step in (SOME if power < HIGH else 1, 1):
            most = np.zeros_like(level)
            for row in range(0, len(weight), step):
                w = weight[row]
                for k in range(len(w)):
                    size = level[k] * abs(w[k])
                    most[k] = size if size > most[k] else most[k]
            top = most.max()
            if top > 0:
                scale = weight.dtype.type(1 / top)
                for row in range(len(weight)):
                    w = weight[row]
                    for k in range(len(w)):
                        columns[k] += raised(scale * level[k] * abs(w[k]), power)
                total = columns.astype(np.float64).sum()
                if 0 < total < np.inf:
                    break
                columns[:] = 0
        return top, total

    return powers


_powers, _high_powers = _summing(_raised), _summing(_highly_raised)


def _steep(raised: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function that adds the gradient of a sum of powers, with exponents that `raised` can do."""

    @cached
    def add(gradient, weight, level, power, scale, steep):  # type: ignore[no-untyped-def]
        """gradient += steep level (scale level |w|)^(power - 1) sign(w), in place."""
        scale, steep = weight.dtype.type(scale), weight.dtype.type(steep)
        for row in range(len(weight)):
            w, out = weight[row], gradient[row]
            for k in range(len(w)):
                v = scale * level[k] * w[k]
                out[k] += steep * level[k] * v * raised(abs(v), power - 2)

    return add


_add_gradient, _add_high_gradient = _steep(_raised), _steep(_highly_raised)


@cached
def _add_sizes(sizes, weight):  # type: ignore[no-untyped-def]
    """sizes += |w|, summed over the rows of `weight`."""
    for row in range(len(weight)):
        w = weight[row]
        for k in range(len(w)):
            sizes[k] += abs(w[k])


@cached
def _add_signs(gradient, weight, sums, flat):  # type: ignore[no-untyped-def]
    """gradient += flat sums sign(w), in place; `sums` by input."""
    flat, zero = weight.dtype.type(flat), weight.dtype.type(0)
    for row in range(len(weight)):
        w, out = weight[row], gradient[row]
        for k in range(len(w)):
            change = flat * sums[k]
            out[k] += change if w[k] > zero else -change if w[k] < zero else zero
