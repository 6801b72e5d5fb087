"""Training of targets and of equal-compute controls (policies: `policy_training`).

A trained target or control lies in the artefact cache under its spec and is trained once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from condcomp_lib import flow
from condcomp_lib import pretraining as dropout
from condcomp_lib.datasets import Dataset, Split
from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.fitting import Balanced, Fitted, fit, plan
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.targets import ACTIVATIONS, MLP, ConvNet, hidden_widths, multiply_adds

RECIPE = 1
CONTROL_RECIPE = 1
CACHE_BYTES = 2**30  # most that the frozen first layer's pre-activations may take
TEMPERATURE = 2.0  # of both networks' scores in distillation


def target_spec(
    dataset: str,
    architecture: str,
    *,
    target_seed: int,
    activation: str = "relu",
    pretraining: str = "none",
    eps: float | None = None,
    penalty: Mapping[str, Any] | None = None,
    balanced: bool = False,
    snapshots: Sequence[int] = (),
    **training: Any,
) -> RunSpec:
    """The run that trains one target on cross-entropy: the weights of the epoch with the best validation accuracy.

    Arguments: `dataset` and `architecture` by name ("svhn", "3x800"); `activation` "relu" or "tanh"; `pretraining` one
    of `pretraining.PRETRAINING`, with `eps` where dropout rates are random, or with a `penalty`: its "coefficient" and,
    for "flow", "form" and "normalised" as of `flow.Flow`; `balanced` draws class-balanced minibatches; `snapshots` are
    epochs whose weights are kept beside the best one's; `training` as for `plan`.

    >>> target_spec("digits", "2x64", target_seed=0).settings["learning_rate"]
    0.001
    """
    dropout.check(pretraining, eps, penalty)
    hidden_widths(architecture)
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if pretraining == "flow" and activation != "relu":
        raise UsageError(f"the class-flow penalty needs ReLU, under which a connection's flow keeps its sign; not "
                         f"{activation}")  # fmt: skip
    if pretraining == "flow":
        flow.Flow(**{name: value for name, value in (penalty or {}).items() if name != "coefficient"})
    settings = {
        "dataset": dataset,
        "architecture": architecture,
        "activation": activation,
        "pretraining": pretraining,
        "target_seed": target_seed,
        **plan(**training),
    }
    for epoch in snapshots:
        if not 1 <= epoch <= settings["max_epochs"]:
            raise UsageError(f"snapshots are of epochs from 1 to {settings['max_epochs']}, not of {epoch}")
    more = {"dropout_eps": eps, "penalty": dict(penalty) if penalty else None, "snapshots": list(snapshots) or None,
            "balanced": balanced or None}  # fmt: skip
    return RunSpec("targets", RECIPE, settings | {key: value for key, value in more.items() if value is not None})


def obtain_target(spec: RunSpec, data: Dataset, artefacts: RunStore, progress: str | None = None) -> tuple[MLP, Record]:
    """The trained target of `spec` in evaluation mode, from the artefact cache or trained now, and its record.

    The cache keeps what was trained on each copy of the data apart (by `data.checksum`), so that weights from an
    unofficial copy are never taken for those from the official files.
    """
    record = shelf(artefacts, data).obtain(spec, lambda wanted: train_target(wanted, data, progress))
    return _restored(build(spec, data), record), record


def shelf(artefacts: RunStore, data: Dataset) -> RunStore:
    """The part of the artefact cache for this copy of the data."""
    shelf = RunStore(artefacts.folder / data.checksum, artefacts.made_by)
    shelf.clean()
    return shelf


def _restored(model: MLP, record: Record, epoch: int | None = None) -> MLP:
    """`model` with the weights of `record` (of the best epoch, or of a snapshot), in evaluation mode."""
    start = "" if epoch is None else f"epoch{epoch}."
    arrays = record.arrays()
    model.load_state_dict({name: torch.from_numpy(arrays[start + name]) for name in model.state_dict()})
    return model.eval()


def snapshot(record: Record, data: Dataset, epoch: int) -> MLP:
    """The target of a record as it was after an epoch that its spec names under "snapshots"."""
    kept = [one for one in record.spec.settings.get("snapshots", []) if one <= record.result["epochs"]]
    if epoch not in kept:
        raise UsageError(f"this target kept its weights of epochs {kept}, not of {epoch}")
    return _restored(build(record.spec, data), record, epoch)


def build(spec: RunSpec, data: Dataset) -> MLP:
    """The untrained target of `spec` for the width and classes of `data`, initialised from its seed."""
    widths = hidden_widths(spec.settings["architecture"])
    generator = torch.Generator().manual_seed(spec.settings["target_seed"])
    return MLP(data.train.x.shape[1], widths, data.classes, spec.settings["activation"], generator)


def train_target(spec: RunSpec, data: Dataset, progress: str | None = None) -> Outcome:
    """Train the target of `spec`; the arrays are the weights of the epoch with the best validation accuracy, and of the
    epochs named under "snapshots"."""
    settings = spec.settings
    model = build(spec, data)
    noise = torch.Generator().manual_seed(settings["target_seed"] + 1_000_003)  # apart from the one that shuffles
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    objective = _Objective(model, settings, noise)
    kept: dict[str, np.ndarray] = {}

    def score() -> float:
        epoch = objective.end_epoch()
        if epoch in settings.get("snapshots", ()):
            kept.update({f"epoch{epoch}.{name}": value.numpy().copy() for name, value in model.state_dict().items()})
        return accuracy(model, data.valid)

    shuffling = torch.Generator().manual_seed(settings["target_seed"])
    minibatches = Balanced(y, data.classes, settings["batch"]) if settings.get("balanced") else None
    fitted = fit(model, lambda rows: objective(x[rows], y[rows]), score, len(x), settings, shuffling,
                 minibatches=minibatches, progress=progress)  # fmt: skip
    outcome = _outcome(model, fitted, data)
    more = {"penalty_share": objective.shares} if "penalty" in settings else {}
    return dataclasses.replace(outcome, result={**outcome.result, **more}, arrays={**(outcome.arrays or {}), **kept})


class _Objective:
    """What a target is trained on: cross-entropy, with dropout or with a penalty, as its settings say.

    `shares` holds for each epoch the penalty's mean share of the whole loss.
    """

    def __init__(self, model: MLP, settings: Mapping[str, Any], noise: torch.Generator) -> None:
        self.model, self.noise, self.kind = model, noise, settings["pretraining"]
        self.rates = dropout.keep_rates(self.kind, settings.get("dropout_eps"), noise)
        own = dict(settings.get("penalty", {}))
        self.coefficient = own.pop("coefficient", 0.0)
        self.flow = flow.Flow(**own) if self.kind == "flow" else None
        self.shares: list[float] = []
        self._seen: list[float] = []

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if self.rates is not None:
            keep = self.rates(len(x), len(self.model.hidden))
            return cross_entropy(dropout.scores_with_dropout(self.model, x, keep, self.noise), y)
        if self.kind not in dropout.PENALTIES:
            return cross_entropy(self.model(x), y)
        if self.flow is not None:
            scores, penalty = flow.scores_with_flow(self.model, x, y, self.flow)
        else:
            scores, hidden = dropout.scores_and_hidden(self.model, x)
            penalty = dropout.activation_penalty(hidden, self.kind)
        added = self.coefficient * penalty
        loss = cross_entropy(scores, y) + added
        self._seen.append((added / loss).item())
        return loss

    def end_epoch(self) -> int:
        """To be called after each epoch; returns its number, from 1."""
        self.shares.append(float(np.mean(self._seen)) if self._seen else 0.0)
        self._seen.clear()
        return len(self.shares)


def _outcome(model: MLP, fitted: Fitted, data: Dataset) -> Outcome:
    """What is stored of a trained network: its accuracies, its learning curve and its weights."""
    result = {
        "epochs": len(fitted.curve),
        "best_epoch": fitted.epoch,
        "valid_accuracy": fitted.curve[fitted.epoch - 1],
        "test_accuracy": accuracy(model, data.test),
        "learning_curve": fitted.curve,
    }
    weights = {name: np.asarray(tensor) for name, tensor in fitted.state.items()}
    return Outcome(result, weights, {"note": data.note, "checksum": data.checksum})


@torch.inference_mode()
def predict(model: Callable[[Tensor], Tensor], x: Tensor, batch: int = 2048) -> Tensor:
    """Predicted classes (int64, examples) of inputs `x` (float32, examples x features), in minibatches.

    `model` is a network, or any other function from inputs to scores.
    """
    return torch.cat([model(part).argmax(1) for part in x.split(batch)])


def accuracy(model: Callable[[Tensor], Tensor], split: Split) -> float:
    """Share of the examples of `split` that `model` classifies correctly."""
    hits = predict(model, torch.from_numpy(split.x)) == torch.from_numpy(split.y)
    return hits.double().mean().item()


@torch.inference_mode()
def first_layer(target: MLP | ConvNet, x: Tensor, most_bytes: int) -> Tensor | None:
    """The first layer's pre-activations of `x` (float32, examples x neurons); None where they take more bytes, and for
    a conv net, whose are pictures.

    Training a policy on a frozen target needs them in every epoch, and they are most of a target's work on images.
    """
    layer = target.linears[0]
    if isinstance(target, ConvNet) or len(x) * layer.out_features * x.element_size() > most_bytes:
        return None
    found = torch.empty(len(x), layer.out_features)
    for part, out in zip(x.split(2048), found.split(2048), strict=True):
        out.copy_(layer(part))
    return found


def control_width(target: MLP, wanted: float) -> int:
    """The width at which a dense net of as many hidden layers as `target` takes nearest to `wanted` multiply-adds.

    >>> control_width(MLP(3072, (800, 800, 800), 10), 742_000)
    212
    """
    inputs, classes = target.linears[0].in_features, target.linears[-1].out_features

    def error(width: int) -> float:
        return abs(sum(multiply_adds([inputs, *[width] * len(target.hidden), classes])) - wanted)

    most = max(target.hidden)
    while error(2 * most) < error(most):  # a lazy network that evaluates almost everything costs more than its target
        most *= 2
    return min(range(1, 2 * most), key=error)


def obtain_control(
    target: MLP,
    trained: Record,
    wanted: float,
    data: Dataset,
    artefacts: RunStore,
    *,
    seed: int = 0,
    augment: int = 0,
    **training: Any,
) -> tuple[MLP, Record]:
    """The equal-compute control: the dense net of `wanted` multiply-adds distilled from `target`, and its record.

    It learns from labels and from the target's scores in equal parts (softened by TEMPERATURE), and keeps the epoch
    with the best validation accuracy. From the artefact cache, or trained now.

    Arguments: `trained` the record of `target`; `wanted` the lazy network's measured multiply-adds, policy
    included (`LazyNetwork.cost(mask).total_multiply_adds`); `seed` of weights and shuffling; `augment`
    pixels by which pictures are moved; `training` as for `plan`.
    """
    settings = {
        "dataset": data.name,
        "target": trained.name,
        "architecture": f"{len(target.hidden)}x{control_width(target, wanted)}",
        "activation": trained.spec.settings["activation"],
        "target_seed": seed,
        **plan(**training),
    }
    spec = RunSpec("controls", CONTROL_RECIPE, {**settings, "augment": augment} if augment else settings)
    compute = functools.partial(_distil, target=target, trained=trained, data=data)
    record = shelf(artefacts, data).obtain(spec, compute)
    return _restored(build(spec, data), record), record


def _distil(spec: RunSpec, target: MLP, trained: Record, data: Dataset) -> Outcome:
    """Train the control of `spec` on the labels and on the scores of `target`."""
    model = build(spec, data)
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    augment, moving = spec.settings.get("augment"), torch.Generator().manual_seed(spec.settings["target_seed"] + 1)

    @torch.no_grad()
    def soft_labels(pictures: Tensor) -> Tensor:
        return torch.cat([softmax(target(part) / TEMPERATURE, 1) for part in pictures.split(2048)])

    known = None if augment else soft_labels(x)

    def loss(rows: Tensor) -> Tensor:
        pictures = dropout.shifted(x[rows], data.shape, augment, moving) if augment else x[rows]
        scores, wanted = model(pictures), soft_labels(pictures) if known is None else known[rows]
        return distillation(scores, wanted, y[rows])

    shuffling = torch.Generator().manual_seed(spec.settings["target_seed"])
    fitted = fit(model, loss, lambda: accuracy(model, data.valid), len(x), spec.settings, shuffling)
    return dataclasses.replace(_outcome(model, fitted, data), uses={"target": trained.cite()})


def distillation(scores: Tensor, wanted: Tensor, y: Tensor) -> Tensor:
    """The cost of a net that learns in equal parts from labels `y` (int64, examples) and from another net's predictions
    `wanted` (float32, examples x classes), the softmax of its scores over TEMPERATURE."""
    soft = kl_div(log_softmax(scores / TEMPERATURE, 1), wanted, reduction="batchmean")
    return 0.5 * cross_entropy(scores, y) + 0.5 * TEMPERATURE**2 * soft


def hits(scores: Tensor, split: Split) -> float:
    """Share of the examples of `split` for which `scores` (float32, examples x classes) are highest at their class."""
    return (scores.argmax(1) == torch.from_numpy(split.y)).double().mean().item()
