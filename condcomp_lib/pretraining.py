"""Ways to train a target with lazy evaluation in mind (*partitions*, section 4): dropout, fixed or at random rates,
and moved pictures."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.targets import MLP

# Names as in `published.csv`; "dropout-uniform-literal" is the other reading of the paper's sentence.
PRETRAINING = ("none", "dropout-0.5", "dropout-uniform", "dropout-uniform-literal")
LITERAL_LEAST_KEEP = 0.05

KeepRate = Callable[[], float]


def check(pretraining: str, eps: float | None) -> None:
    """Raise UsageError unless `pretraining` is known and `eps` is given exactly where rates are random."""
    if pretraining not in PRETRAINING:
        raise unknown("pretraining", pretraining, PRETRAINING)
    if not pretraining.startswith("dropout-uniform"):
        if eps is not None:
            raise UsageError(f"eps={eps} goes with random dropout rates only, not with {pretraining!r}")
    elif eps is None or not 0 < eps <= 1:
        raise UsageError(f"{pretraining} needs eps, the least rate, in (0, 1], not {eps}")


def keep_rates(pretraining: str, eps: float | None, generator: torch.Generator) -> KeepRate | None:
    """A function that gives the keep probability of the next minibatch; None where nothing is dropped.

    - "dropout-0.5": always 0.5.
    - "dropout-uniform": U[eps, 1], our reading of *partitions*, section 4.1: the rate drawn for each minibatch is the
      probability to *keep* a neuron.
    - "dropout-uniform-literal": the rate drawn from U[eps, 1] is the probability to *drop*; a rate of 1 would leave
      nothing, so at least LITERAL_LEAST_KEEP is kept.

    >>> keep_rates("dropout-0.5", None, torch.Generator())()
    0.5
    """
    check(pretraining, eps)
    if pretraining == "none":
        return None
    if pretraining == "dropout-0.5":
        return lambda: 0.5
    least = eps or 0.0

    def draw() -> float:
        return least + (1 - least) * torch.rand((), generator=generator).item()

    return draw if pretraining == "dropout-uniform" else lambda: max(1 - draw(), LITERAL_LEAST_KEEP)


def dropped(h: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """Activations with each entry kept with probability `keep` and divided by it (inverted scaling), else zero.

    Arguments: `h` float32 (examples x neurons); `keep` in (0, 1]. At 1 nothing is drawn and `h` itself comes back.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep probability {keep} is outside (0, 1]")
    if keep == 1:
        return h
    return h * torch.empty_like(h).bernoulli_(keep, generator=generator).div_(keep)


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


def scores_with_dropout(target: MLP, x: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """Scores (float32, examples x classes) of `x` with dropout on every hidden layer, never on the input."""
    for layer in target.linears[:-1]:
        x = dropped(target.activation(layer(x)), keep, generator)
    return target.linears[-1](x)
