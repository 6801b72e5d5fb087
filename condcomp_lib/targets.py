"""Target networks: the trained networks that do the task, evaluated in full (plain modules; training is elsewhere)."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from condcomp_lib.errors import UsageError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """A fully connected classifier: hidden layers with one activation, a linear output layer.

    Arguments: `inputs` features, `hidden` the width of each hidden layer, `classes`, `activation` "relu" or "tanh";
    the weights are drawn from `generator` (torch's global one by default).

    >>> MLP(64, (32, 16), 10)(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        classes: int,
        activation: str = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, classes]
        if min(widths) < 1:
            raise UsageError(f"every width must be at least 1, not {widths}")
        if activation not in ACTIVATIONS:
            raise UsageError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.hidden = tuple(hidden)
        self.layers = nn.ModuleList(linear(a, b, generator) for a, b in itertools.pairwise(widths))
        self.activation = ACTIVATIONS[activation]()

    @property
    def linears(self) -> list[nn.Linear]:
        """The weight layers from input to output."""
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def inputs(self) -> int:
        """Features of an input."""
        return self.linears[0].in_features

    @property
    def reads(self) -> list[int]:
        """Numbers that a gate of each hidden layer reads of what lies below it."""
        return [self.inputs, *self.hidden[:-1]]

    @property
    def products(self) -> list[int]:
        """Multiply-adds of each weight, by weight layer."""
        return [1] * len(self.layers)

    @property
    def weights(self) -> list[int]:
        """Weights between a unit and one of the layer below, by weight layer."""
        return [1] * len(self.layers)

    @property
    def positions(self) -> list[int]:
        """Numbers that have to be averaged to read a unit of each hidden layer; none."""
        return [0] * len(self.hidden)

    def shaped(self, x: Tensor) -> Tensor:
        """Inputs as the first layer takes them."""
        return x

    def read(self, h: Tensor) -> Tensor:
        """A layer (float32, examples x units) as a gate and the last layer read it: as it is."""
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Scores (float32, examples x classes) of inputs `x` (float32, examples x features)."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class ConvNet(nn.Module):
    """A small convolutional classifier: layers of 3 x 3 filters with ReLU, of which each has a stride, 1 or 2; then a
    linear layer that reads the mean of every filter's output. A filter is what a neuron is in an `MLP`.

    Arguments: `shape` (channels, height, width) of the images, which come flattened; `filters` of each layer;
    `classes`; `strides` of each layer (None: 1). The weights are drawn from `generator` by the heuristic of He et al.
    (2015).

    >>> ConvNet((3, 8, 8), (16, 32), 10, (1, 2))(torch.zeros(5, 192)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        filters: Sequence[int],
        classes: int,
        strides: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        channels = [shape[0], *filters]
        if min(*channels, *shape, classes, len(filters)) < 1:
            raise UsageError(f"a conv net needs images, filters and classes, not {list(shape)}, {list(filters)} and "
                             f"{classes}")  # fmt: skip
        strides = tuple(strides or (1,) * len(filters))
        if len(strides) != len(filters) or not set(strides) <= {1, 2}:
            raise UsageError(f"each of {len(filters)} layers needs a stride of 1 or 2, not {list(strides)}")
        self.shape, self.hidden, self.strides = tuple(shape), tuple(filters), strides
        convs = [conv(a, b, stride, generator) for (a, b), stride in zip(itertools.pairwise(channels), strides)]  # noqa: B905
        self.layers = nn.ModuleList([*convs, linear(channels[-1], classes, generator)])
        self.activation = nn.ReLU()

    @classmethod
    def of(cls, model: nn.Sequential, shape: tuple[int, int, int]) -> "ConvNet":
        """The same network as a `ConvNet`, with copies of its weights: Conv2d (3 x 3, padding 1, stride 1 or 2) and
        ReLU in turn, AdaptiveAvgPool2d(1), Flatten, Linear.

        Raises UsageError that names the first layer which cannot be gated.
        """
        layers = list(model)
        body, tail = layers[:-3], layers[-3:]
        convs: list[Any] = body[::2]
        for number, layer in enumerate(body):
            if not (_gateable(layer) if number % 2 == 0 else isinstance(layer, nn.ReLU)):
                raise _cannot_gate(number, layer)
        kinds = (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear)
        for number, (layer, kind) in enumerate(zip(tail, kinds, strict=False), len(body)):
            fits = isinstance(layer, kind) and (kind is not nn.AdaptiveAvgPool2d or layer.output_size in (1, (1, 1)))
            if not fits:
                raise _cannot_gate(number, layer)
        if not body or len(body) % 2:
            raise UsageError(f"a conv net must be {GATEABLE}; this one has {len(layers)} layers")
        last: Any = tail[-1]
        found = cls(shape, [own.out_channels for own in convs], last.out_features, [own.stride[0] for own in convs])
        for own, given in zip(found.linears, [*convs, last], strict=True):
            if given.weight.shape != own.weight.shape or given.bias is None:
                raise UsageError(f"{given} does not fit what lies below it (weights {list(own.weight.shape)} with a "
                                 "bias)")  # fmt: skip
            own.load_state_dict(given.state_dict())
        return found

    @property
    def linears(self) -> list[Any]:
        """The weight layers from input to output."""
        return list(self.layers)

    @property
    def inputs(self) -> int:
        """Numbers of a flattened image."""
        return math.prod(self.shape)

    @property
    def reads(self) -> list[int]:
        """Numbers that a gate of each hidden layer reads of what lies below it: a mean for each channel."""
        return [self.shape[0], *self.hidden[:-1]]

    @property
    def sides(self) -> list[tuple[int, int]]:
        """Height and width of each layer's output."""
        found, (height, width) = [], self.shape[1:]
        for stride in self.strides:
            height, width = -(-height // stride), -(-width // stride)
            found.append((height, width))
        return found

    @property
    def products(self) -> list[int]:
        """Multiply-adds between a filter and a channel below, by weight layer; padding is counted as if it were
        picture."""
        return [*(9 * height * width for height, width in self.sides), 1]

    @property
    def weights(self) -> list[int]:
        """Weights between a filter and a channel below, by weight layer."""
        return [*([9] * len(self.hidden)), 1]

    @property
    def positions(self) -> list[int]:
        """Numbers that are averaged to read a filter of each hidden layer."""
        return [height * width for height, width in self.sides]

    def shaped(self, x: Tensor) -> Tensor:
        """Inputs (float32, examples x features) as images, in the memory layout that convolutions are fastest in."""
        return x.reshape(-1, *self.shape).contiguous(memory_format=torch.channels_last)

    def read(self, h: Tensor) -> Tensor:
        """A layer (float32, examples x filters x height x width) as a gate and the last layer read it: its means."""
        return h.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (float32, examples x classes) of inputs `x` (float32, examples x features)."""
        h = self.shaped(x)
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](self.read(h))


GATEABLE = "Conv2d (3 x 3, padding 1, stride 1 or 2, no groups) and ReLU in turn, AdaptiveAvgPool2d(1), Flatten, Linear"


def _gateable(layer: nn.Module) -> bool:
    """Whether a layer is one of filters that `ConvNet` has."""
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or layer.groups != 1:
        return False
    shape = (layer.kernel_size, layer.padding, layer.dilation)
    return shape == ((3, 3), (1, 1), (1, 1)) and layer.stride in ((1, 1), (2, 2))


def _cannot_gate(number: int, layer: nn.Module) -> UsageError:
    return UsageError(f"layer {number} is {layer}, which cannot be gated; a conv net must be {GATEABLE}")


def conv(inputs: int, outputs: int, stride: int, generator: torch.Generator | None) -> nn.Conv2d:
    """A layer of 3 x 3 filters, zeros around the picture; weights by the heuristic of He et al. (2015), no bias."""
    layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, stride, 1)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def build_target(
    architecture: str, shape: tuple[int, int, int], classes: int, generator: torch.Generator | None = None
) -> MLP | ConvNet:
    """The untrained network of that name for images of this shape: an `MLP` ("3x800", see `hidden_widths`), or after
    "conv" the filters of each layer, with "/2" behind those of stride 2.

    >>> build_target("conv 8-16/2", (3, 8, 8), 10).strides
    (1, 2)
    """
    hidden = hidden_widths(architecture)
    if not architecture.startswith("conv "):
        return MLP(math.prod(shape), hidden, classes, generator=generator)
    strides = [2 if part.endswith("/2") else 1 for part in architecture.removeprefix("conv ").split("-")]
    return ConvNet(shape, hidden, classes, strides, generator)


def linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer with torch's usual initialisation, U(-1/sqrt(inputs), 1/sqrt(inputs)), from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def start_glorot(network: MLP | ConvNet, generator: torch.Generator | None = None) -> None:
    """Draw the weights anew by the heuristic of Glorot and Bengio (2010), and set the biases to zero, in place."""
    for layer in network.linears:
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)


def hidden_widths(architecture: str) -> tuple[int, ...]:
    """The hidden widths that an architecture's name stands for.

    >>> hidden_widths("3x800"), hidden_widths("288-928"), hidden_widths("500"), hidden_widths("conv 32-64/2")
    ((800, 800, 800), (288, 928), (500,), (32, 64))
    """
    if match := re.fullmatch(r"conv ([1-9]\d*(/2)?(-[1-9]\d*(/2)?)*)", architecture):
        return tuple(int(part.removesuffix("/2")) for part in match[1].split("-"))
    if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", architecture):
        return (int(match[2]),) * int(match[1])
    if re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", architecture):
        return tuple(int(width) for width in architecture.split("-"))
    raise UsageError(f"unknown architecture {architecture!r}; write it as '3x800', '288-928', '500', or "
                     "'conv 32-64/2' for filters, those of stride 2 marked")  # fmt: skip


def multiply_adds(widths: Sequence[int], kept: Sequence[float] | None = None) -> list[float]:
    """Multiply-adds of each weight layer for one example, biases left out.

    Arguments: `widths` from input to output; `kept` the share of neurons evaluated in each hidden layer (all of them by
    default). A product between two hidden layers is sparse on both sides; input and output are never sparse.

    >>> full, lazy = multiply_adds([3072, 800, 800, 800, 10]), multiply_adds([3072, 800, 800, 800, 10], [0.25] * 3)
    >>> round(sum(lazy) / sum(full), 3)
    0.186
    """
    shares = [1.0, *(kept if kept is not None else [1.0] * (len(widths) - 2)), 1.0]
    if len(shares) != len(widths):
        raise UsageError(f"{len(widths) - 2} hidden layers need as many shares, not {len(shares) - 2}")
    return [a * s * b * t for a, s, b, t in zip(widths, shares, widths[1:], shares[1:], strict=False)]
