"""Target networks: the trained networks that do the task, evaluated in full (plain modules; training is elsewhere)."""

import itertools
import re
from collections.abc import Sequence

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

    def forward(self, x: Tensor) -> Tensor:
        """Scores (float32, examples x classes) of inputs `x` (float32, examples x features)."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer with torch's usual initialisation, U(-1/sqrt(inputs), 1/sqrt(inputs)), from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def start_glorot(network: MLP, generator: torch.Generator | None = None) -> None:
    """Draw the weights anew by the heuristic of Glorot and Bengio (2010), and set the biases to zero, in place."""
    for layer in network.linears:
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)


def hidden_widths(architecture: str) -> tuple[int, ...]:
    """The hidden widths that an architecture's name stands for.

    >>> hidden_widths("3x800"), hidden_widths("288-928"), hidden_widths("500")
    ((800, 800, 800), (288, 928), (500,))
    """
    if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", architecture):
        return (int(match[2]),) * int(match[1])
    if re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", architecture):
        return tuple(int(width) for width in architecture.split("-"))
    raise UsageError(f"unknown architecture {architecture!r}; write it as '3x800', '288-928' or '500'")


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
