"""How one lazy network is measured: the same numbers in every study of lazy networks."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from condcomp_lib.datasets import Dataset, Split
from condcomp_lib.lazy import LazyNetwork, calibrated, decided_by, evaluate
from condcomp_lib.policies import Blind, Sample
from condcomp_lib.runs import Record, RunStore
from condcomp_lib.studies import targets
from condcomp_lib.targets import MLP, multiply_adds
from condcomp_lib.training import CACHE_BYTES, control_width, first_layer, obtain_control

DRAWS = 3  # of the masks of every test example, where they are sampled
CONTROL_STEP = {"svhn": 64, "mnist": 64, "digits": 8}  # between the widths of the controls that are trained
CONTROL_WIDEST = {"svhn": 320}  # above it the target itself is the next


def deciding(lazy: LazyNetwork, settings: Mapping[str, Any], data: Dataset) -> LazyNetwork:
    """`lazy` with the way to decide that a run's settings ask for: sampled, or calibrated on validation data."""
    if settings["decision"] == "calibrated":
        return calibrated(lazy, torch.from_numpy(data.valid.x), settings["activity_asked"])
    return decided_by(lazy, Sample(torch.Generator().manual_seed(settings["policy_seed"])))


def measure(lazy: LazyNetwork, settings: Mapping[str, Any], data: Dataset, trained: Record) -> dict[str, Any]:
    """What a run records of a lazy network whose target is `trained`: accuracies, activity and cost on test data, with
    "multiply_adds" one example's; "blind" is the same when every group is drawn as often, whatever the input."""
    draws = settings["decision_draws"]
    first = first_layer(lazy.target, torch.from_numpy(data.test.x), CACHE_BYTES)
    valid, test = measured(lazy, data.valid, draws), measured(lazy, data.test, draws, first)
    cost = lazy.cost(test[1])
    rates = valid[1].float().mean(0).split(lazy.partition.groups)
    blind_lazy = decided_by(lazy, Blind(rates, torch.Generator().manual_seed(settings["policy_seed"])))
    blind = measured(blind_lazy, data.test, settings.get("blind_draws", DRAWS), first)
    full = trained.result["test_accuracy"]
    return {
        "target_accuracy": full,
        "accuracy": test[0],
        "accuracy_ratio": test[0] / full,
        "valid_accuracy": valid[0],
        "blind_accuracy": blind[0],
        "blind_ratio": blind[0] / full,
        "blind_activity": lazy.partition.activity(blind[1]).mean().item(),
        "target_valid_accuracy": trained.result["valid_accuracy"],
        "activity": lazy.partition.activity(test[1]).mean().item(),
        "valid_activity": lazy.partition.activity(valid[1]).mean().item(),
        "activity_by_layer": [n / width for n, width in zip(cost.neurons, lazy.target.hidden, strict=True)],
        "compute": cost.total_multiply_adds / lazy.target_cost().total_multiply_adds,
        "bytes_share": cost.total_bytes / lazy.target_cost().total_bytes,
        "group_sizes": lazy.partition.sizes.tolist(),
        "group_firing": test[1].double().mean(0).tolist(),
        "multiply_adds": cost.total_multiply_adds,
    }


def measured(lazy: LazyNetwork, split: Split, draws: int, first: Tensor | None = None) -> tuple[float, Tensor]:
    """Accuracy on `split`, a mean over `draws` evaluations, and all their masks (bool, draws * examples x bits).

    `first` are the first layer's pre-activations where known already.
    """
    x, y = torch.from_numpy(split.x), torch.from_numpy(split.y)
    found = [evaluate(lazy, x, first) for _ in range(draws)]
    hits = torch.stack([evaluation.scores.argmax(1) == y for evaluation in found])
    return hits.double().mean().item(), torch.cat([evaluation.mask for evaluation in found])


def control_of(
    target: MLP, trained: Record, wanted: float, data: Dataset, artefacts: RunStore, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The equal-compute control of a lazy network that takes `wanted` multiply-adds: what a run records of it, and the
    controls it cites by role.

    Dense nets are trained at multiples of CONTROL_STEP and shared by all lazy networks of a target; between the two
    next to `wanted` accuracy is interpolated linearly in multiply-adds. Accuracy rises ever more slowly with width, so
    the true control is, if anything, a little better. Above CONTROL_WIDEST the upper of the two is the target itself.
    """
    step, depth = CONTROL_STEP[data.name], len(target.hidden)
    inputs, classes = target.linears[0].in_features, target.linears[-1].out_features

    def cost(width: int) -> float:
        return sum(multiply_adds([inputs, *[width] * depth, classes]))

    least = step
    widest = CONTROL_WIDEST.get(data.name, math.inf)
    while cost(least + step) <= wanted and least < widest:
        least += step
    above = least + step if least < widest else max(target.hidden)
    weight = min(1.0, max(0.0, (wanted - cost(least)) / (cost(above) - cost(least))))

    def trained_at(width: int) -> Record:
        if width == above and least == widest:
            return trained
        training = targets.TRAINING[data.name]
        return obtain_control(target, trained, cost(width), data, artefacts, seed=seed, **training)[1]

    found = [trained_at(least), trained_at(above)]
    accuracies = [record.result["test_accuracy"] for record in found]
    accuracy = (1 - weight) * accuracies[0] + weight * accuracies[1]
    result = {
        "control_width": control_width(target, wanted),
        "control_accuracy": accuracy,
        "control_ratio": accuracy / trained.result["test_accuracy"],
    }
    return result, {"control_below": found[0].cite(), "control_above": found[1].cite()}
