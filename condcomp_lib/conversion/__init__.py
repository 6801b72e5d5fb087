"""From a user's trained network to a lazy, faster one: `lazify`, and `load` of what its `save` has written."""

import math
import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from condcomp_lib import kernels
from condcomp_lib.conversion import choice, report
from condcomp_lib.conversion.examples import collect
from condcomp_lib.conversion.reading import install, read
from condcomp_lib.conversion.saving import export, load, save
from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.kernels import FastLazy

__all__ = ["export", "install", "lazify", "load", "save"]

BATCHES = ("one", "per-example")  # what is calibrated for single examples is not for a mask that many share


def lazify(
    model: nn.Module,
    data: Any,
    activity: float = 0.25,
    *,
    path: str = "",
    finetune: bool = False,
    moved: int | None = None,
    seconds: float = 150.0,
    epochs: int | None = None,
    groups: int | Sequence[int] | None = None,
    test: Any = None,
    control: bool = True,
    batch: str = "one",
    scores: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FastLazy:
    """A lazy copy of a trained network, compiled, that evaluates the share `activity` of its hidden neurons.

    The partition is the one with which an oracle keeps most, the spread over the layers the one with which a policy
    does after a short training; the policy is trained to follow the oracle and then to keep the right answers, where
    `data` has labels, and those that the model gives. What comes out says in its `report` how accurate and how fast it
    is, on examples held back from all that.

    Arguments: `model` a chain of Linear, ReLU or Tanh, BatchNorm1d, Dropout, Flatten: an nn.Sequential, or a module
    whose forward is one; it is not changed. `data` inputs, a pair of inputs and labels, a Dataset or a DataLoader;
    labels are optional. `path` of the chain inside a larger model, or of a TransformerEncoderLayer, whose feed-forward
    part is meant; see `install`. `finetune` trains a copy of the weights, too, on images `moved` by up to so many
    pixels each way (None: 1 or 2 from 16 pixels a side on; 0: as they are). `seconds` that training may take, or
    `epochs` instead, which makes the result the same on every machine. `groups` of each layer, or one number for all
    (None: by the widths). `test` examples like `data` to report on, from which neither the model nor anything here
    learns (None: a fifth of `data`; where the model has learned from these, it is reported better than it is, and so
    is the lazy network, which has its weights, beside the control). `control`: a dense net of equal compute is trained
    beside. `batch` "one" or "per-example", as for `kernels.compile`. `scores`: whether the outputs are scores of
    classes (None: those of a whole model with more than one), else their mean square counts. `progress` bars.

    Raises UsageError that names a layer which is not supported, or says what does not fit.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> fast = lazify(model, torch.randn(200, 16), 0.5, epochs=1, control=False, progress=False)
    >>> fast(torch.zeros(3, 16)).shape
    torch.Size([3, 4])
    """
    if not isinstance(activity, int | float) or not 0 < activity <= 1:
        raise UsageError(f"activity is a share of the hidden neurons, above 0 up to 1, not {activity}")
    if not 0 < seconds < math.inf or (epochs is not None and epochs < 1):
        raise UsageError(f"give training some time: seconds above 0 or epochs of at least 1, not {seconds}, {epochs}")
    if batch not in BATCHES:
        raise unknown("batch", batch, BATCHES)
    started = time.perf_counter()
    block = read(model, path)
    examples = collect(model, block, data, seed, scores, test)
    pixels = choice.pixels(examples, moved)
    candidates = choice.prepared(block.target, examples, activity, groups, seed)
    left = seconds - (time.perf_counter() - started)
    share = 0.75 if control else 0.95
    trained = choice.trained(candidates, block.target, examples, finetune, pixels, left * share, epochs, seed, progress)
    fast = kernels.compile(trained.lazy, batch)
    left = seconds - (time.perf_counter() - started)
    fast.report = report.written(
        fast, block.target, examples, asked=activity, control_seconds=max(left, 1.0) if control else 0.0,
        epochs=epochs, seed=seed, chosen=trained.told,
    )  # fmt: skip
    fast.report["seconds"] = round(time.perf_counter() - started, 1)
    return fast
