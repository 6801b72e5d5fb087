"""One training loop for targets, controls and policies: optimiser, schedule, early stopping, and what a NaN does."""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from condcomp_lib.errors import CondcompError, UsageError, unknown

# Factor of the learning rate at each step, for the number of steps in all epochs.
SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {
    "constant": lambda _: lambda _: 1.0,
    "cosine": lambda steps: lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)),
}
# Fused: one pass over the weights instead of a dozen, which halves the time of a step of 128 examples.
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda weights, lr: torch.optim.Adam(weights, lr=lr, fused=True),
    "rmsprop": lambda weights, lr: torch.optim.RMSprop(weights, lr=lr),
    "sgd": lambda weights, lr: torch.optim.SGD(weights, lr=lr, fused=True),
    "momentum": lambda weights, lr: torch.optim.SGD(weights, lr=lr, momentum=0.9, nesterov=True, fused=True),
}
State = dict[str, Tensor]
# The minibatches of an epoch over so many examples: their numbers (int64), drawn from the generator.
Minibatches = Callable[[int, torch.Generator], Iterable[Tensor]]


class TrainingError(CondcompError):
    """Training cannot go on: the loss is no longer a number. `state` holds the weights of the last good epoch."""

    def __init__(self, message: str, state: State | None = None) -> None:
        super().__init__(message)
        self.state = state or {}


@dataclass(frozen=True)
class Fitted:
    """What `fit` returns: the kept weights, the score after each epoch, and the epoch (from 1) they come from."""

    state: State
    curve: list[float]
    epoch: int


def plan(
    *,
    epochs: int = 20,
    patience: int | None = None,
    batch: int = 128,
    optimiser: str = "adam",
    learning_rate: float = 1e-3,
    schedule: str = "cosine",
    epoch_examples: int | None = None,
) -> dict[str, Any]:
    """The settings of a training loop, checked.

    Arguments: `epochs` at most, fewer when the score has not risen for `patience` epochs (None: never stop early);
    `batch` examples a step; `optimiser` one of OPTIMISERS ("momentum" is SGD with Nesterov momentum 0.9); `schedule` of
    the learning rate, "constant" or "cosine" (falling to zero over all epochs); `epoch_examples` how many examples an
    epoch passes over, drawn anew each time (None: all of them).

    >>> plan(epochs=3)["max_epochs"]
    3
    """
    if epochs < 1 or batch < 1:
        raise UsageError(f"epochs and batch must be at least 1, not {epochs} and {batch}")
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if optimiser not in OPTIMISERS:
        raise unknown("optimiser", optimiser, OPTIMISERS)
    if not 0 < learning_rate < math.inf:
        raise UsageError(f"the learning rate must be a number above 0, not {learning_rate}")
    if epoch_examples is not None and epoch_examples < 1:
        raise UsageError(f"an epoch must pass over at least one example, or all (None), not {epoch_examples}")
    if patience is not None and patience < 1:
        raise UsageError(f"patience must be at least one epoch, or None, not {patience}")
    return {
        "optimiser": optimiser,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "batch": batch,
        "max_epochs": epochs,
        "patience": patience,
        **({} if epoch_examples is None else {"epoch_examples": epoch_examples}),
    }


def fit(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    score: Callable[[], float],
    examples: int,
    settings: Mapping[str, Any],
    generator: torch.Generator,
    *,
    keep: str = "best",
    rates: Sequence[tuple[nn.Module, float]] = (),
    minibatches: Minibatches | None = None,
    progress: str | None = None,
) -> Fitted:
    """Train the parameters of `model` that require gradients, and leave the kept weights in it.

    Arguments: `loss(rows)` of the examples with these numbers (int64); `score()` after each epoch, higher is better;
    `settings` as from `plan`; `generator` shuffles; `keep` the "best" epoch's weights or the "last" one's; `rates`
    parts of `model` with a learning rate of their own (the schedule is the same); `minibatches` of each epoch (None:
    all examples, shuffled); `progress` the title of a progress bar (None: no bar).

    Raises TrainingError, with the step named and the last good epoch's weights in it, when the loss is no number.
    """
    if keep not in ("best", "last"):
        raise unknown("epoch to keep", keep, ("best", "last"))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = OPTIMISERS[settings["optimiser"]](_with_rates(weights, rates), settings["learning_rate"])
    size = min(examples, settings.get("epoch_examples", examples))
    steps = settings["max_epochs"] * math.ceil(size / settings["batch"])
    if minibatches is None:
        minibatches = functools.partial(_shuffled, examples, settings["batch"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, SCHEDULES[settings["schedule"]](steps))
    good = copy.deepcopy(model.state_dict())
    best, best_epoch, curve = good, 0, []
    for epoch in tqdm(range(1, settings["max_epochs"] + 1), desc=progress, unit="epoch", disable=progress is None):
        for step, rows in enumerate(minibatches(size, generator)):
            value = loss(rows)
            if not math.isfinite(value.item()):
                model.load_state_dict(good)
                raise _stopped(f"the loss became {value.item()} at epoch {epoch}, step {step}", epoch, settings, good)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            optimiser.step()
            schedule.step()
        if not all(weight.isfinite().all() for weight in weights):  # the last step's loss was still a number
            model.load_state_dict(good)
            raise _stopped(f"a weight is no number after epoch {epoch}", epoch, settings, good)
        good = copy.deepcopy(model.state_dict())
        curve.append(score())
        if not best_epoch or curve[-1] > curve[best_epoch - 1]:
            best, best_epoch = good, epoch
        elif settings["patience"] is not None and epoch - best_epoch >= settings["patience"]:
            break
    state, chosen = (best, best_epoch) if keep == "best" else (good, len(curve))
    model.load_state_dict(state)
    return Fitted(state, curve, chosen)


def _shuffled(examples: int, batch: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    return torch.randperm(examples, generator=generator)[:size].split(batch)


class Balanced:
    """Class-balanced minibatches: as many examples of each class, as far as `batch` can be divided, the remaining ones
    from classes drawn without repetition. Each class is passed through in an order of its own, again and again.

    Arguments: `y` (int64, examples) labels below `classes`.
    Raises UsageError for a class without examples, and for minibatches that cannot hold every class.
    """

    def __init__(self, y: Tensor, classes: int, batch: int) -> None:
        if batch < classes:
            raise UsageError(f"class-balanced minibatches hold every class: batch must be at least {classes}, not "
                             f"{batch}")  # fmt: skip
        self.rows = [(y == label).nonzero()[:, 0] for label in range(classes)]
        for label, rows in enumerate(self.rows):
            if not len(rows):
                raise UsageError(f"class {label} has no training example, so minibatches cannot be class-balanced")
        self.batch, self.left = batch, [rows[:0] for rows in self.rows]

    def __call__(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The minibatches of an epoch of `size` examples, see Minibatches."""
        each, more = divmod(self.batch, len(self.rows))
        for _ in range(math.ceil(size / self.batch)):
            extra = set(torch.randperm(len(self.rows), generator=generator)[:more].tolist())
            parts = [self._take(label, each + (label in extra), generator) for label in range(len(self.rows))]
            yield torch.cat(parts)

    def _take(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        while len(self.left[label]) < count:
            rows = self.rows[label]
            self.left[label] = torch.cat([self.left[label], rows[torch.randperm(len(rows), generator=generator)]])
        taken, self.left[label] = self.left[label][:count], self.left[label][count:]
        return taken


def _with_rates(weights: Sequence[nn.Parameter], rates: Sequence[tuple[nn.Module, float]]) -> list[dict[str, Any]]:
    """The optimiser's groups of parameters: those of each part with a rate of its own, and all others."""
    groups: list[dict[str, Any]] = []
    for part, rate in rates:
        groups.append({"params": [weight for weight in part.parameters() if weight.requires_grad], "lr": rate})
    taken = {id(weight) for group in groups for weight in group["params"]}
    return [{"params": [weight for weight in weights if id(weight) not in taken]}, *groups]


def _stopped(what: str, epoch: int, settings: Mapping[str, Any], good: State) -> TrainingError:
    remedy = f"lower the learning rate ({settings['learning_rate']}) or check the inputs"
    return TrainingError(f"{what}; the weights after epoch {epoch - 1} are kept; {remedy}", good)
