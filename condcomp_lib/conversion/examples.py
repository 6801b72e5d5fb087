"""Calibration data: a user's examples as what the block to be made lazy sees, split to learn, calibrate and report."""

import copy
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condcomp_lib.conversion.reading import Block
from condcomp_lib.datasets import Dataset, Split
from condcomp_lib.errors import UsageError

MOST_ROWS = 60_000  # that are kept: a few epochs of them are all that a time budget allows
HELD_OUT = 5000  # examples for thresholds, and as many for the report, at most; a fifth of all each
AGREES = {torch.float16: 0.1, torch.bfloat16: 0.5}  # largest difference of an output over its spread; float32: 0.01
LEAST = 5  # examples


@dataclass(frozen=True, eq=False)
class Examples:
    """What a block sees: `data` split into train, valid and test, labels included; `scores` whether its outputs are
    scores of classes, `labelled` whether the labels are the user's own (else they are what the model answers), those of
    `data.test` (`tested`) apart."""

    data: Dataset
    scores: bool
    labelled: bool
    tested: bool


@dataclass(frozen=True, eq=False)
class _Reached:
    """Examples as they reach a block: `x` (float32, rows x features), what the block makes of them (`classes` numbers)
    or the user's own labels as classes `y` (int64, rows), and of which `shape` an input is; an example has `each` rows.
    """

    x: Tensor
    y: Tensor
    labelled: bool
    scores: bool
    classes: int
    each: int
    shape: tuple[int, int, int]


def collect(
    model: nn.Module, block: Block, data: Any, seed: int, scores: bool | None = None, test: Any = None
) -> Examples:
    """The user's examples, at most MOST_ROWS of them, as the block sees them.

    Arguments: `data` inputs alone (a tensor or an array), a pair of inputs and labels, or an iterable of minibatches of
    either (a DataLoader); a torch Dataset of pairs. Labels are the numbers of classes. `scores` whether the model's
    outputs are scores of classes (None: those of a whole model with more than one). `test` as `data`, to report on
    (None: a part of `data`).

    Raises UsageError where they do not fit the model, or the model's outputs are not those of its chain of layers.
    """
    own = _reached(model, block, data, seed, scores)
    other = None if test is None else _reached(model, block, test, seed, scores, test=True)
    held = own.each * max(1, min(HELD_OUT // own.each, len(own.x) // own.each // 5))
    sizes = [len(own.x) - 2 * held, held, held] if other is None else [len(own.x) - held, held]
    parts = list(zip(own.x.split(sizes), own.y.split(sizes), strict=True))
    parts += [] if other is None else [(other.x, other.y)]
    learn, valid, last = (Split(x.contiguous().numpy(), y.contiguous().numpy()) for x, y in parts)
    checksum = hashlib.sha256(own.x[:100].numpy().tobytes()).hexdigest()[:16]
    kept = Dataset("yours", learn, valid, last, own.shape, own.classes, "the user's own", checksum)
    return Examples(kept, own.scores, own.labelled, own.labelled if other is None else other.labelled)


def _reached(model: nn.Module, block: Block, data: Any, seed: int, scores: bool | None, test: bool = False) -> _Reached:
    x, y = _tensors(data, seed)
    if len(x) < (1 if test else LEAST):
        wanted = "one example is needed to report" if test else f"{LEAST} examples are needed to calibrate"
        raise UsageError(f"at least {wanted} on, not {len(x)}")
    if y is not None and len(y) != len(x):
        raise UsageError(f"labels must be one number for each of {len(x)} examples, not of shape {list(y.shape)}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
    x, y = x[order], None if y is None else y[order]
    rows, outputs, seen = _seen(model, block, x)
    if not test and len(rows) == len(outputs):
        _check_chain(model, block, rows, outputs)
    each, rest = divmod(len(rows), seen)  # tokens: more rows than examples, those of one example together
    if rest or len(outputs) != len(rows):
        raise UsageError(f"{seen} examples reach the layers as {len(rows)} rows and leave as {len(outputs)}: the model "
                         "mixes examples")  # fmt: skip
    most = MOST_ROWS // each * each
    rows, outputs = rows[:most], outputs[:most]
    classes, whole = outputs.shape[1], not block.path and not isinstance(block.place, nn.TransformerEncoderLayer)
    own = (whole and classes > 1) if scores is None else scores
    y = _labels(y)[:most] if y is not None and own and each == 1 else None
    if y is not None and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise UsageError(f"labels must be from 0 to {classes - 1}, the model's scores, not from {int(y.min())} to "
                         f"{int(y.max())}")  # fmt: skip
    picture = x.ndim == 4 and whole and math.prod(x.shape[1:]) == rows.shape[1]
    side = x.shape[1:] if picture else (1, 1, rows.shape[1])
    shape = (side[0], side[1], side[2])
    return _Reached(rows, outputs.argmax(1) if y is None else y, y is not None, own, classes, each, shape)


def _labels(y: Tensor) -> Tensor:
    """The numbers of classes (int64, examples)."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise UsageError(f"labels must be one number for each of {len(y)} examples, not of shape {list(y.shape)}")
    if y.is_floating_point() and not torch.equal(y, y.round()):
        raise UsageError("labels must be whole numbers of classes; for other outputs give inputs alone, scores=False")
    return y.long()


def _tensors(data: Any, seed: int) -> tuple[Tensor, Tensor | None]:
    """All inputs and labels as tensors; of a Dataset at most MOST_ROWS examples, drawn at random."""
    if isinstance(data, Tensor | np.ndarray):
        return torch.as_tensor(data), None
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(p, Tensor | np.ndarray) for p in data):
        return torch.as_tensor(data[0]), torch.as_tensor(data[1])
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, tuple | list | dict):
        drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
        data = torch.utils.data.DataLoader(torch.utils.data.Subset(data, drawn.tolist()), batch_size=256)
    if not isinstance(data, Iterable):
        raise UsageError(f"data are inputs, a pair (inputs, labels), a Dataset or a DataLoader; not a "
                         f"{type(data).__name__}")  # fmt: skip
    xs, ys, count = [], [], 0
    for part in data:
        x, y = _pair(part)
        xs.append(x)
        ys += [] if y is None else [y]
        count += len(x)
        if count >= MOST_ROWS:
            break
    if not xs:
        raise UsageError("data hold no example")
    return torch.cat(xs), torch.cat(ys) if len(ys) == len(xs) else None


def _pair(part: Any) -> tuple[Tensor, Tensor | None]:
    """Inputs and labels of a minibatch: a tensor, or one or two of them."""
    parts = part if isinstance(part, tuple | list) else (part,)
    if len(parts) not in (1, 2) or not all(isinstance(one, Tensor | np.ndarray) for one in parts):
        raise UsageError("a minibatch is a tensor of inputs, or inputs and labels; not "
                         f"{type(part).__name__} of {', '.join(type(one).__name__ for one in parts)}")  # fmt: skip
    x, *y = (torch.as_tensor(one) for one in parts)
    return x, y[0] if y else None


@torch.inference_mode()
def _seen(model: nn.Module, block: Block, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows (float32, rows x features) that reach the block, what it makes of them, and how many examples they are."""
    where = next(iter(model.parameters()), torch.zeros(()))
    place = block.place.linear1 if isinstance(block.place, nn.TransformerEncoderLayer) else block.place
    end = block.place.linear2 if isinstance(block.place, nn.TransformerEncoderLayer) else block.place
    rows: list[Tensor] = []
    found: list[Tensor] = []
    # A copy in evaluation mode, so that the user's is not touched; hooks see what passes.
    twin = {id(module): own for module, own in zip(model.modules(), copy.deepcopy(model).eval().modules(), strict=True)}
    features = block.target.inputs
    hooks = [
        twin[id(place)].register_forward_pre_hook(lambda _, given: rows.append(_flat(given[0], features))),
        twin[id(end)].register_forward_hook(lambda _, __, out: found.append(out.detach().flatten(0, -2).float().cpu())),
    ]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a transformer's fused path calls no layer, so no hook
    seen = 0
    try:
        for part in x.split(1024):
            moved = part.to(where.device, where.dtype) if part.is_floating_point() else part.to(where.device)
            given = twin[id(model)](moved)
            seen += len(part)
            if not isinstance(given, Tensor) or len(given) != len(part):
                raise UsageError(f"the model makes no tensor of {len(part)} answers of {len(part)} examples: it mixes "
                                 "them, or returns something else")  # fmt: skip
            if sum(map(len, rows)) >= 2 * MOST_ROWS:
                break
    except (RuntimeError, ValueError, TypeError) as error:
        told = str(error).strip().splitlines()[0]
        raise UsageError(f"the model does not take these data ({list(x.shape)} {x.dtype}): {told}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for hook in hooks:
            hook.remove()
    return torch.cat(rows), torch.cat(found), seen


@torch.inference_mode()
def _check_chain(model: nn.Module, block: Block, inputs: Tensor, outputs: Tensor) -> None:
    """Raise UsageError unless the block's chain of layers makes of `inputs` what the model makes."""
    kind = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    own = torch.cat([block.target(part) for part in inputs.split(2048)])
    spread = outputs.std(0) + 1e-3 * outputs.abs().amax(0) + 1e-12  # of each output, whatever the others' size
    off = float(((own - outputs).abs() / spread).max())
    if not off <= AGREES.get(kind, 0.01):
        raise UsageError(f"the model's outputs differ from those of its layers in a chain, by {off:.2g} of their "
                         "spread: its forward does more than its layers say")  # fmt: skip


def _flat(given: Tensor, features: int) -> Tensor:
    """What reaches the first layer as rows of its features."""
    wide = given.shape[-1] == features or math.prod(given.shape[1:]) != features
    return given.detach().reshape(-1, features).float().cpu() if wide else given.detach().flatten(1).float().cpu()
