"""Training of target networks. A trained target lies in the artefact cache under its spec and is trained once."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from condcomp_lib.datasets import Dataset, Split
from condcomp_lib.errors import CondcompError, UsageError, unknown
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.targets import MLP, hidden_widths

RECIPE = 1

# Factor of the learning rate at each step, for the number of steps in all epochs.
SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {
    "constant": lambda _: lambda _: 1.0,
    "cosine": lambda steps: lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)),
}


class TrainingError(CondcompError):
    """Training cannot go on (the loss is no longer a number)."""


def target_spec(
    dataset: str,
    architecture: str,
    *,
    target_seed: int,
    epochs: int = 20,
    patience: int | None = None,
    batch: int = 128,
    learning_rate: float = 1e-3,
    schedule: str = "cosine",
    activation: str = "relu",
) -> RunSpec:
    """The run that trains one target: Adam, cross-entropy, the weights of the epoch with the best validation accuracy.

    Arguments: `dataset` and `architecture` by name ("svhn", "3x800"); `epochs` at most, fewer when validation accuracy
    has not risen for `patience` epochs (None: never stop early); `batch` examples a step; `schedule` of the learning
    rate, "constant" or "cosine" (falling to zero over all epochs).

    >>> target_spec("digits", "2x64", target_seed=0).settings["learning_rate"]
    0.001
    """
    if epochs < 1 or batch < 1:
        raise UsageError(f"epochs and batch must be at least 1, not {epochs} and {batch}")
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    settings = {
        "dataset": dataset,
        "architecture": architecture,
        "activation": activation,
        "pretraining": "none",
        "optimiser": "adam",
        "learning_rate": learning_rate,
        "schedule": schedule,
        "batch": batch,
        "max_epochs": epochs,
        "patience": patience,
        "target_seed": target_seed,
    }
    return RunSpec("targets", RECIPE, settings)


def obtain_target(spec: RunSpec, data: Dataset, artefacts: RunStore) -> tuple[MLP, Record]:
    """The trained target of `spec` in evaluation mode, from the artefact cache or trained now, and its record.

    The cache keeps what was trained on each copy of the data apart (by `data.checksum`), so that weights from an
    unofficial copy are never taken for those from the official files.
    """
    artefacts = RunStore(artefacts.folder / data.checksum, artefacts.made_by)
    artefacts.clean()
    record = artefacts.obtain(spec, lambda wanted: train_target(wanted, data))
    model = build(spec, data)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in record.arrays().items()})
    return model.eval(), record


def build(spec: RunSpec, data: Dataset) -> MLP:
    """The untrained target of `spec` for the width and classes of `data`, initialised from its seed."""
    widths = hidden_widths(spec.settings["architecture"])
    generator = torch.Generator().manual_seed(spec.settings["target_seed"])
    return MLP(data.train.x.shape[1], widths, data.classes, spec.settings["activation"], generator)


def train_target(spec: RunSpec, data: Dataset) -> Outcome:
    """Train the target of `spec`; the arrays are the weights of the epoch with the best validation accuracy."""
    settings = spec.settings
    model = build(spec, data)
    generator = torch.Generator().manual_seed(settings["target_seed"])
    optimiser = torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])
    steps = settings["max_epochs"] * math.ceil(len(data.train) / settings["batch"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, SCHEDULES[settings["schedule"]](steps))
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    best: dict[str, Any] = {"accuracy": -1.0, "epoch": 0, "state": {}}
    curve = []
    for epoch in range(1, settings["max_epochs"] + 1):
        for step, rows in enumerate(torch.randperm(len(x), generator=generator).split(settings["batch"])):
            loss = cross_entropy(model(x[rows]), y[rows])
            if not math.isfinite(loss.item()):
                what = f"the loss became {loss.item()} at epoch {epoch}, step {step}"
                raise TrainingError(f"{what}; lower the learning rate ({settings['learning_rate']})")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        curve.append(accuracy(model, data.valid))
        if curve[-1] > best["accuracy"]:
            best = {"accuracy": curve[-1], "epoch": epoch, "state": copy.deepcopy(model.state_dict())}
        elif settings["patience"] is not None and epoch - best["epoch"] >= settings["patience"]:
            break
    model.load_state_dict(best["state"])
    result = {
        "epochs": len(curve),
        "best_epoch": best["epoch"],
        "valid_accuracy": best["accuracy"],
        "test_accuracy": accuracy(model, data.test),
        "learning_curve": curve,
    }
    weights = {name: np.asarray(tensor) for name, tensor in best["state"].items()}
    return Outcome(result, weights, {"note": data.note, "checksum": data.checksum})


@torch.inference_mode()
def predict(model: torch.nn.Module, x: Tensor, batch: int = 2048) -> Tensor:
    """Predicted classes (int64, examples) of inputs `x` (float32, examples x features), in minibatches."""
    return torch.cat([model(part).argmax(1) for part in x.split(batch)])


def accuracy(model: torch.nn.Module, split: Split) -> float:
    """Share of the examples of `split` that `model` classifies correctly."""
    hits = predict(model, torch.from_numpy(split.x)) == torch.from_numpy(split.y)
    return hits.double().mean().item()
