"""The small networks that the notebooks' explorers play with: trained once, kept with weights of 8 bits.

No paper's number is theirs. Each run has one target, a policy for each split of it, and how accuracy falls with
activity by three ways to decide; the first seed's also carry the rounded weights, so that explorers need no training.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condcomp_lib import studies
from condcomp_lib.datasets import Dataset
from condcomp_lib.kernels.pack import quantised
from condcomp_lib.lazy import LazyNetwork, calibrated, decided_by, evaluate
from condcomp_lib.partitions import Partition
from condcomp_lib.policies import Budget, Policy, Pool, Sample, spread_over
from condcomp_lib.policy_training import policy_plan
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import policies
from condcomp_lib.studies.policy_results import no_answers
from condcomp_lib.targets import MLP, hidden_widths

RECIPE = 2
ARCHITECTURE, GROUPS, TAU = "2x200", 50, 0.15  # policies are trained at this activity, and asked for others
PARTITIONERS = ("coactivation", "random")
SAMPLED, CALIBRATED, BUDGETED = DECISIONS = ("sample", "calibrated threshold", "budget")
SEEDS = {"quick": 1, "paper": 3}
DATASETS = {"quick": ("digits",), "paper": ("digits", "mnist")}
PRETRAINING: dict[str, tuple[tuple[str, float | None], ...]] = {
    "quick": (("none", None),),
    "paper": (("none", None), ("dropout-uniform", 0.5)),
}
POOL = {"digits": 0, "mnist": 2}
TARGET: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 40, "learning_rate": 1e-3},
    "mnist": {"epochs": 12, "learning_rate": 1e-3},
}
POLICY: dict[str, dict[str, Any]] = {
    "digits": {"batch": 32, "epochs": 8, "learning_rate": 5e-3},
    "mnist": {"epochs": 4, "learning_rate": 2e-3},
}
# Of the stored curves: every percent where they are steep.
ACTIVITIES = tuple(percent / 100 for percent in (*range(2, 21), *range(22, 41, 2), *range(45, 101, 5)))
EXAMPLES = 2000  # validation examples at most
HALVINGS = 30  # of the interval in which a gate's shift is searched


def specs(profile: str) -> list[RunSpec]:
    """One run per data set, pretraining and target seed."""
    return [
        RunSpec("explorer", RECIPE, {"dataset": dataset, "pretraining": pretraining, "dropout_eps": eps,
                                     "architecture": ARCHITECTURE, "groups": GROUPS, "split": "valid",
                                     "target_training": TARGET[dataset], "policy": _training(dataset),
                                     "pool": POOL[dataset], "target_seed": seed})
        for dataset in DATASETS[profile]
        for pretraining, eps in PRETRAINING[profile]
        for seed in range(SEEDS[profile])
    ]  # fmt: skip


def _training(dataset: str) -> dict[str, Any]:
    rates = policies.rates_for(TAU, hidden_widths(ARCHITECTURE))
    own = {**policies.COMMON, **policies.WARM_START, **POLICY[dataset]}
    return policy_plan(tau=TAU, rates=rates, **own)


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train (or fetch) the target and a policy for each split; measure what they keep of the accuracy."""
    settings, curves, nets, cited = spec.settings, {}, {}, {}
    data = studies.dataset(settings["dataset"])
    for partitioner in PARTITIONERS:
        seeds = {"partition_seed": settings["target_seed"], "policy_seed": settings["target_seed"]}
        own = {**settings, **settings["policy"], **seeds, "partitioner": partitioner, "scope": "layer",
               "rescale": "none", "method": "explorer"}  # fmt: skip
        lazy, policy, trained = policies.learned(own, data, artefacts)
        nets[partitioner], cited[partitioner] = lazy, policy.cite()
        curves[partitioner] = {decision: _curve(lazy, decision, data) for decision in DECISIONS}
    result = {"accuracy": trained.result["valid_accuracy"], "activities": list(ACTIVITIES), "curves": curves}
    arrays = rounded(nets) if settings["target_seed"] == 0 else None
    return Outcome(result, arrays, {"note": data.note, "checksum": data.checksum}, {"target": trained.cite(), **cited})


def _curve(lazy: LazyNetwork, decision: str, data: Dataset) -> dict[str, list[float]]:
    """Accuracy on validation examples, activity and compute at each of ACTIVITIES."""
    found: dict[str, list[float]] = {"accuracy": [], "activity": [], "compute": []}
    x, wanted = examples(data)
    for asked in ACTIVITIES:
        own = decided(lazy, decision, asked, x)
        evaluated = evaluate(own, x)
        found["accuracy"].append((evaluated.scores.argmax(1) == wanted).double().mean().item())
        found["activity"].append(lazy.partition.activity(evaluated.mask).mean().item())
        found["compute"].append(own.compute(evaluated.mask))
    return found


def examples(data: Dataset) -> tuple[Tensor, Tensor]:
    """The validation examples (float32, examples x features) that explorers look at, and their labels (int64)."""
    return torch.from_numpy(data.valid.x[:EXAMPLES]), torch.from_numpy(data.valid.y[:EXAMPLES])


def decided(
    lazy: LazyNetwork, decision: str, activity: float, x: Tensor, first: Tensor | None = None, seed: int = 0
) -> LazyNetwork:
    """`lazy` at an activity in (0, 1], spread over layers as in study `policies`: by a budget of groups, by thresholds
    calibrated on `x` (`first` its first pre-activations where known), or by sampling with `seed` from probabilities
    whose logits are shifted, by as much for every example and group of a gate."""
    hidden = lazy.target.hidden
    rates = spread_over(activity, policies.SPREAD[len(hidden)], hidden)
    if decision == BUDGETED:
        return decided_by(lazy, Budget.of(rates, lazy.partition, lazy.policy))
    if decision == CALIBRATED:
        return calibrated(lazy, x, rates, first)
    shifts: list[float] = []
    for gate, rate in enumerate(rates):
        drawing = Shifted((*shifts, *[0.0] * (len(rates) - gate)), torch.Generator().manual_seed(seed))
        logits = evaluate(decided_by(lazy, drawing), x, first).logits
        shifts.append(shift_for(lazy.partition.by_gate(logits)[gate], rate))
    return decided_by(lazy, Shifted(tuple(shifts), torch.Generator().manual_seed(seed)))


@dataclass(frozen=True)
class Shifted:
    """Bits drawn with the probability of a logit that is raised by the gate's own shift: a policy asked for another
    activity than the one it was trained at."""

    shifts: tuple[float, ...]
    generator: torch.Generator

    def __call__(self, logits: Tensor, gate: int) -> Tensor:
        """See `policies.Decision`."""
        return Sample(self.generator)(logits + self.shifts[gate], gate)


def shift_for(logits: Tensor, rate: float) -> float:
    """What to add to `logits` (float32, examples x groups) so that their mean probability is `rate`.

    >>> round(shift_for(torch.zeros(1, 1), 0.9), 3)
    2.197
    """
    low, high = -60.0 - logits.max().item(), 60.0 - logits.min().item()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if (logits + middle).sigmoid().mean() < rate else (low, middle)
    return (low + high) / 2


def rounded(nets: Mapping[str, LazyNetwork]) -> dict[str, np.ndarray]:
    """The weights of lazy networks with one target, in 8 bits (one scale a neuron), and their splits, as arrays."""
    found: dict[str, np.ndarray] = {}
    target = next(iter(nets.values())).target
    for index, layer in enumerate(target.linears):
        found |= _in_8_bits(f"target.{index}", layer)
    for name, lazy in nets.items():
        for index, gate in enumerate(lazy.policy.gates):
            found |= _in_8_bits(f"{name}.{index}", gate)
        for index, groups in enumerate(lazy.partition.membership):
            found[f"{name}.groups{index}"] = groups.to(torch.uint8).numpy()
    return found


def _in_8_bits(name: str, layer: torch.nn.Linear) -> dict[str, np.ndarray]:
    codes, scale = quantised(layer.weight.detach().numpy().T, "int8")
    return {name: codes.T, f"{name}.scale": scale, f"{name}.bias": layer.bias.detach().numpy()}


def network(record: Record, partitioner: str, shape: tuple[int, int, int]) -> LazyNetwork:
    """The lazy network of a record with rounded weights, split by `partitioner`; it evaluates every group until it is
    `decided`. `shape` of its pictures (channels, height, width)."""
    arrays, settings = record.arrays(), record.spec.settings
    inputs, classes = arrays["target.0"].shape[1], len(arrays["target.2"])
    target = MLP(inputs, hidden_widths(settings["architecture"]), classes)
    groups = tuple(torch.from_numpy(arrays[f"{partitioner}.groups{i}"]).long() for i in range(len(target.hidden)))
    partition = Partition(groups, settings["groups"], "layer")
    policy = Policy(partition, inputs, Pool(shape, settings["pool"]) if settings["pool"] else None)
    with torch.no_grad():
        for name, layers in (("target", target.linears), (partitioner, policy.gates)):
            for index, layer in enumerate(layers):
                scale = torch.from_numpy(arrays[f"{name}.{index}.scale"])
                layer.weight.copy_(torch.from_numpy(arrays[f"{name}.{index}"]).float() * scale[:, None])
                layer.bias.copy_(torch.from_numpy(arrays[f"{name}.{index}.bias"]))
    target.requires_grad_(False)
    return LazyNetwork(target, partition, policy, Budget((settings["groups"],) * len(target.hidden)))


@functools.cache
def available() -> tuple[Record, ...]:
    """The records that explorers can use: the stored ones, or where there are none those of digits, trained now."""
    stored = studies.records("explorer", "paper", partial=True)
    if any(record.arrays_file for record in stored):
        return tuple(stored)
    return tuple(studies.run("explorer", "quick", backend="sequential", progress=False))


STUDY = studies.Study(
    name="explorer",
    title="Networks to explore",
    notebook="00_start_here",
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=lambda _: [],
    promises=lambda _: {},
    audited=("accuracy",),
)
