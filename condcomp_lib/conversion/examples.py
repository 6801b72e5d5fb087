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

MOST_ROWS = 40_000  # that are kept: a few epochs of them are all that a time budget allows
HELD_OUT = 5000  # examples for thresholds, and as many for the report, at most; a fifth of all each
AGREES = {torch.float16: 0.05, torch.bfloat16: 0.2}  # largest difference of scores, as a share; float32: 1e-3
LEAST = 5  # examples


@dataclass(frozen=True, eq=False)
class Examples:
    """What a block sees: `data` split into train, valid and test, labels included; `scores` whether its outputs are
    scores of classes, `labelled` whether the labels are the user's own (else they are what the model answers)."""

    data: Dataset
    scores: bool
    labelled: bool


def collect(model: nn.Module, block: Block, data: Any, seed: int) -> Examples:
    """The user's examples, at most MOST_ROWS of them, as the block sees them.

    Arguments: `data` inputs alone (a tensor or an array), a pair of inputs and labels, or an iterable of minibatches of
    either (a DataLoader); a torch Dataset of pairs. Labels are the numbers of classes.

    Raises UsageError where they do not fit the model, or the model's outputs are not those of its chain of layers.
    """
    x, y = _tensors(data)
    if len(x) < LEAST:
        raise UsageError(f"at least {LEAST} examples are needed to calibrate on, not {len(x)}")
    if y is not None and (y.ndim != 1 or len(y) != len(x)):
        raise UsageError(f"labels must be one number for each of {len(x)} examples, not of shape {list(y.shape)}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
    x, y = x[order], None if y is None else y[order].long()
    rows, outputs = _seen(model, block, x)
    if len(rows) != len(x):  # tokens: more rows than examples
        kept = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
        rows, outputs, y = rows[kept], outputs[kept], None
    classes = outputs.shape[1]
    scores = not block.path and classes > 1
    if y is not None and scores and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise UsageError(f"labels must be from 0 to {classes - 1}, the model's scores, not from {int(y.min())} to "
                         f"{int(y.max())}")  # fmt: skip
    labelled = y is not None and scores
    shape = tuple(x.shape[1:]) if x.ndim == 4 and not block.path else (1, 1, rows.shape[1])
    wanted = y if labelled and y is not None else outputs.argmax(1)
    return Examples(_split(rows, wanted, shape, classes), scores, labelled)


def _tensors(data: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(data, Tensor | np.ndarray):
        return torch.as_tensor(data), None
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(p, Tensor | np.ndarray) for p in data):
        return torch.as_tensor(data[0]), torch.as_tensor(data[1])
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, tuple | list):
        data = torch.utils.data.DataLoader(data, batch_size=256)
    if not isinstance(data, Iterable):
        raise UsageError(f"data are inputs, a pair (inputs, labels), a Dataset or a DataLoader; not a "
                         f"{type(data).__name__}")  # fmt: skip
    xs, ys, count = [], [], 0
    for part in data:
        x, y = part if isinstance(part, tuple | list) and len(part) == 2 else (part, None)
        xs.append(torch.as_tensor(x))
        ys += [] if y is None else [torch.as_tensor(y)]
        count += len(xs[-1])
        if count >= MOST_ROWS:
            break
    if not xs:
        raise UsageError("data hold no example")
    return torch.cat(xs), torch.cat(ys) if ys else None


@torch.inference_mode()
def _seen(model: nn.Module, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (float32, rows x features) that reach the block and what it makes of them, with the check that its chain of
    layers gives what the model gives."""
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
    try:
        for part in x.split(1024):
            moved = part.to(where.device, where.dtype) if part.is_floating_point() else part.to(where.device)
            twin[id(model)](moved)
            if sum(map(len, rows)) >= 2 * MOST_ROWS:
                break
    except (RuntimeError, ValueError, TypeError) as error:
        told = str(error).strip().splitlines()[0]
        raise UsageError(f"the model does not take these data ({list(x.shape)} {x.dtype}): {told}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for hook in hooks:
            hook.remove()
    inputs, outputs = torch.cat(rows), torch.cat(found)
    own = torch.cat([block.target(part) for part in inputs.split(2048)])
    off = float((own - outputs).abs().max() / outputs.abs().max().clamp(min=1e-12))
    if not off <= AGREES.get(where.dtype, 1e-3):
        raise UsageError(f"the model's outputs differ from those of its layers in a chain by {off:.0%} of the largest: "
                         "its forward does more than its layers say")  # fmt: skip
    return inputs, own


def _flat(given: Tensor, features: int) -> Tensor:
    """What reaches the first layer as rows of its features."""
    wide = given.shape[-1] == features or math.prod(given.shape[1:]) != features
    return given.detach().reshape(-1, features).float().cpu() if wide else given.detach().flatten(1).float().cpu()


def _split(x: Tensor, y: Tensor, shape: Any, classes: int) -> Dataset:
    """A fifth each, at most HELD_OUT, to calibrate and to report; the rest to learn from."""
    held = max(1, min(HELD_OUT, len(x) // 5))
    sizes = [len(x) - 2 * held, held, held]
    learn, valid, test = (Split(a.contiguous().numpy(), b.contiguous().numpy())
                          for a, b in zip(x.split(sizes), y.split(sizes), strict=True))  # fmt: skip
    checksum = hashlib.sha256(x[:100].numpy().tobytes()).hexdigest()[:16]
    return Dataset("yours", learn, valid, test, shape, classes, "the user's own", checksum)
