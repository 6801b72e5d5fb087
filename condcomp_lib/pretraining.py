"""Ways to train a target with lazy evaluation in mind (*partitions*, section 4): dropout, fixed or at random rates,
penalties of the activations (that of class flow: `flow`), and moved pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.targets import MLP

# Names as in `published.csv` where it has them; "dropout-uniform-literal" is the other reading of the paper's sentence.
DROPOUT = (
    "dropout-0.5",
    "dropout-uniform",
    "dropout-uniform-literal",
    "dropout-uniform-example",
    "dropout-uniform-layer",
)
ACTIVATION = ("l1", "hoyer")  # penalties of the hidden activations
PENALTIES = ("flow", *ACTIVATION)
FLOW_OPTIONS = ("form", "normalised")  # see `flow.Flow`
PRETRAINING = ("none", *DROPOUT, *PENALTIES)
LITERAL_LEAST_KEEP = 0.05

Keep = float | Tensor  # of a layer, or of each example in it (float32, examples x 1)
KeepRates = Callable[[int, int], list[Keep]]


def check(pretraining: str, eps: float | None, penalty: Mapping[str, Any] | None = None) -> None:
    """Raise UsageError unless `pretraining` is known, `eps` is given exactly where rates are random, and a `penalty`
    exactly where there is one: its coefficient, of at least 0, and for "flow" its form."""
    if pretraining not in PRETRAINING:
        raise unknown("pretraining", pretraining, PRETRAINING)
    if not pretraining.startswith("dropout-uniform"):
        if eps is not None:
            raise UsageError(f"eps={eps} goes with random dropout rates only, not with {pretraining!r}")
    elif eps is None or not 0 < eps <= 1:
        raise UsageError(f"{pretraining} needs eps, the least rate, in (0, 1], not {eps}")
    if (penalty is None) == (pretraining in PENALTIES):
        raise UsageError(f"a penalty with its coefficient goes with {', '.join(PENALTIES)}, and only there; not "
                         f"{penalty} with {pretraining!r}")  # fmt: skip
    if penalty is None:
        return
    coefficient, known = penalty.get("coefficient"), ("coefficient", *(FLOW_OPTIONS if pretraining == "flow" else ()))
    if not isinstance(coefficient, float | int) or not 0 <= coefficient < math.inf:
        raise UsageError(f"the penalty's coefficient must be a number of at least 0, not {coefficient}")
    for name in penalty:
        if name not in known:
            raise unknown(f"setting of the penalty {pretraining!r}", name, known)


def keep_rates(pretraining: str, eps: float | None, generator: torch.Generator) -> KeepRates | None:
    """A function that gives the keep probabilities of the next minibatch, one for each of so many layers, from the
    numbers of examples and layers; None where nothing is dropped.

    - "dropout-0.5": always 0.5.
    - "dropout-uniform": U[eps, 1], our reading of *partitions*, section 4.1: the rate drawn for each minibatch is the
      probability to *keep* a neuron.
    - "dropout-uniform-layer", "dropout-uniform-example": drawn for each layer of a minibatch, or each example of it.
    - "dropout-uniform-literal": the rate drawn from U[eps, 1] is the probability to *drop*; a rate of 1 would leave
      nothing, so at least LITERAL_LEAST_KEEP is kept.

    >>> keep_rates("dropout-0.5", None, torch.Generator())(128, 2)
    [0.5, 0.5]
    """
    if pretraining in PENALTIES:
        return None
    check(pretraining, eps)
    if pretraining == "none":
        return None
    if pretraining == "dropout-0.5":
        return lambda examples, layers: [0.5] * layers  # noqa: ARG005
    least = eps or 0.0

    def draw() -> float:
        return least + (1 - least) * torch.rand((), generator=generator).item()

    ways: dict[str, KeepRates] = {
        "dropout-uniform": lambda examples, layers: [draw()] * layers,  # noqa: ARG005
        "dropout-uniform-literal": lambda examples, layers: [max(1 - draw(), LITERAL_LEAST_KEEP)] * layers,  # noqa: ARG005
        "dropout-uniform-layer": lambda examples, layers: [draw() for _ in range(layers)],  # noqa: ARG005
        "dropout-uniform-example": lambda examples, layers: (
            [least + (1 - least) * torch.rand(examples, 1, generator=generator)] * layers
        ),
    }
    return ways[pretraining]


def dropped(h: Tensor, keep: Keep, generator: torch.Generator) -> Tensor:
    """Activations with each entry kept with probability `keep` and divided by it (inverted scaling), else zero.

    Arguments: `h` float32 (examples x neurons); `keep` in (0, 1], one number or one for each example (examples x 1).
    At 1 nothing is drawn and `h` itself comes back.
    """
    if isinstance(keep, Tensor):
        return h * torch.bernoulli(keep.expand_as(h), generator=generator) / keep
    if not 0 < keep <= 1:
        raise UsageError(f"keep probability {keep} is outside (0, 1]")
    if keep == 1:
        return h
    return h * torch.empty_like(h).bernoulli_(keep, generator=generator).div_(keep)


def activation_penalty(hidden: Sequence[Tensor], kind: str) -> Tensor:
    """A penalty that is small where few neurons fire, summed over the hidden layers (float32).

    "l1": the mean of |h|. "hoyer": the square Hoyer measure (sum_i |h_i|)^2 / sum_i h_i^2 of each example over the
    layer's width, between 1 / width (one neuron fires) and 1 (all fire alike), averaged; it leaves the scale alone.

    Arguments: `hidden` activations of each hidden layer (float32, examples x neurons).

    >>> activation_penalty([torch.tensor([[1.0, 0.0, 0.0, 1.0]])], "hoyer")
    tensor(0.5000)
    """
    if kind not in ACTIVATION:
        raise unknown("activation penalty", kind, ACTIVATION)
    if kind == "l1":
        return torch.stack([h.abs().mean() for h in hidden]).sum()
    tiny = torch.finfo(hidden[0].dtype).tiny  # an example for which no neuron fires counts as zero
    shares = [h.abs().sum(1).square() / h.square().sum(1).clamp(min=tiny) / h.shape[1] for h in hidden]
    return torch.stack([share.mean() for share in shares]).sum()


def shifted(x: Tensor, shape: tuple[int, int, int], most: int, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to `most` pixels each way, drawn uniformly; the border is repeated.

    Arguments: `x` float32 (examples x features) of pictures of `shape` (channels, height, width).
    """
    if most < 0:
        raise UsageError(f"pictures can be moved by 0 pixels or more, not by {most}")
    channels, height, width = shape
    if x.shape[1] != channels * height * width:
        raise UsageError(f"pictures of {list(shape)} have {channels * height * width} features, these {x.shape[1]}")
    wide = pad(x.reshape(-1, *shape), (most,) * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, len(x), 1), generator=generator)
    rows, columns = (down + torch.arange(height))[:, None, :, None], (right + torch.arange(width))[:, None, None, :]
    return wide[
        torch.arange(len(x))[:, None, None, None], torch.arange(channels)[:, None, None], rows, columns
    ].flatten(1)


def scores_with_dropout(target: MLP, x: Tensor, keep: Keep | Sequence[Keep], generator: torch.Generator) -> Tensor:
    """Scores (float32, examples x classes) of `x` with dropout on every hidden layer, never on the input; `keep` one
    probability for all of them or one for each."""
    rates = [keep] * len(target.hidden) if isinstance(keep, float | int | Tensor) else keep
    for layer, rate in zip(target.linears[:-1], rates, strict=True):
        x = dropped(target.activation(layer(x)), rate, generator)
    return target.linears[-1](x)


def scores_and_hidden(target: MLP, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Scores (float32, examples x classes) of `x`, and the activations of each hidden layer (examples x neurons)."""
    hidden = []
    for layer in target.linears[:-1]:
        x = target.activation(layer(x))
        hidden.append(x)
    return target.linears[-1](x), hidden
