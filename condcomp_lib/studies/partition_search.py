"""How a run's settings become a partition: each partitioner on a trained target, with a record of its search."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from condcomp_lib.coactivation import firing_patterns
from condcomp_lib.datasets import Dataset
from condcomp_lib.lazy import LazyNetwork, calibrated, evaluate
from condcomp_lib.partitioners import Partitioner, search
from condcomp_lib.partitioners.bandits import Bandits
from condcomp_lib.partitioners.clustering import (
    activation_partition,
    always_on_partition,
    spectral_partition,
    weight_partition,
)
from condcomp_lib.partitioners.contextual import ContextualBandits, contexts_of, falling
from condcomp_lib.partitioners.gumbel import Gumbel, train_gumbel
from condcomp_lib.partitioners.local import LocalSearch
from condcomp_lib.partitions import Partition
from condcomp_lib.policies import Policy, Sample
from condcomp_lib.policy_training import PolicyCurve, train_policy
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import partitioning
from condcomp_lib.targets import MLP
from condcomp_lib.training import CACHE_BYTES, first_layer, shelf

RECIPE = 1
# What a partition depends on. The policy that is trained on it afterwards is not among it: "search" has its own.
MADE_BY = (
    "target", "dataset", "architecture", "partitioner", "groups", "scope", "rescale", "search", "target_seed",
    "partition_seed", "policy_seed",
)  # fmt: skip
CLUSTERINGS = {
    "coactivation": activation_partition,
    "spectral": spectral_partition,
    "always-on": always_on_partition,
}


def obtain_partition(
    settings: Mapping[str, Any], target: MLP, data: Dataset, artefacts: RunStore
) -> tuple[Partition, Record | None]:
    """The partition that these settings ask for, searched now or from the artefact cache, and its record (None for a
    random one, which is drawn at once). `settings["search"]` says how the partitioner is used."""
    if settings["partitioner"] == "random":
        return partitioning.drawn(settings, target), None
    spec = RunSpec("partitions", RECIPE, {key: settings[key] for key in MADE_BY})

    def compute(_: RunSpec) -> Outcome:
        partition, found = searched(settings, target, data)
        arrays = {f"layer{number}": np.asarray(groups) for number, groups in enumerate(partition.membership, 1)}
        return Outcome(found, arrays, {"note": data.note, "checksum": data.checksum})

    record = shelf(artefacts, data).obtain(spec, compute)
    arrays = record.arrays()
    membership = tuple(torch.from_numpy(arrays[f"layer{n}"]) for n in range(1, len(target.hidden) + 1))
    return Partition(membership, settings["groups"], settings["scope"]), record


def searched(settings: Mapping[str, Any], target: MLP, data: Dataset) -> tuple[Partition, dict[str, Any]]:
    """Search the partition of these settings; what is recorded beside it: `trials`, one row each, or a curve."""
    how, scope, groups = settings["search"], settings["scope"], settings["groups"]
    generator = drawing(settings)
    if "cluster" in how:
        if how["cluster"] == "k-means":
            return weight_partition(target, groups, generator, scope), {}
        patterns = firing_patterns(target, torch.from_numpy(data.train.x[: how["examples"]]))
        return CLUSTERINGS[how["cluster"]](patterns, target.hidden, groups, generator, scope), {}
    if "gumbel" in how:
        return _by_gumbel(settings, target, data, generator)
    if "swaps" in how:
        return _by_swaps(settings, target, data, generator)
    worth = Trials(settings, target, data)
    partitioner = _bandits(how, target, groups, scope)
    search(partitioner, worth, how["trials"], generator)
    return partitioner.best(), {"trials": worth.rows}


def _bandits(how: Mapping[str, Any], target: MLP, groups: int, scope: str) -> Partitioner:
    if "rule" in how:
        return Bandits(target.hidden, groups, how["rule"], scope=scope)
    contexts = contexts_of(target, how["context"])
    return ContextualBandits(contexts, groups, ridge=how["ridge"], epsilon=falling(*how["epsilon"]), scope=scope)


class Trials:
    """The worth of a partition as in Algorithm 1: the validation accuracy of a lazy network whose policy starts anew
    and is trained until an epoch no longer raises it. Each call adds a row to `rows`."""

    def __init__(self, settings: Mapping[str, Any], target: MLP, data: Dataset) -> None:
        self.settings, self.target, self.data = settings, target, data
        self.rows: list[dict[str, Any]] = []
        self.first = first_layer(target, torch.from_numpy(data.train.x), CACHE_BYTES)
        self.first_valid = first_layer(target, torch.from_numpy(data.valid.x), CACHE_BYTES)

    def __call__(self, partition: Partition) -> float:
        """Train a policy for `partition`; its accuracy with sampled masks."""
        settings = self.settings
        seed = 1000 * settings["target_seed"] + settings["policy_seed"] + 1_000_000 * (3 + len(self.rows))
        drawing = torch.Generator().manual_seed(seed)
        policy = Policy(partition, self.data.train.x.shape[1], generator=drawing)
        lazy = LazyNetwork(self.target, partition, policy, Sample(drawing), settings["rescale"])
        shuffling = torch.Generator().manual_seed(seed)
        curve = train_policy(lazy, self.data, settings["search"]["policy"], shuffling, first=self.first)
        found = evaluate(lazy, torch.from_numpy(self.data.valid.x), self.first_valid)
        sizes = partition.sizes.double()
        self.rows.append(
            {
                "worth": curve.accuracy[-1],
                "activity": curve.activity[-1],
                "sd_of_activity_by_group": found.mask.double().mean(0).std(correction=0).item(),
                "mean_size": sizes.mean().item(),
                "sd_of_size": sizes.std(correction=0).item(),
                "largest_share": partition.largest_share,
                "epochs": len(curve.accuracy),
            }
        )
        return curve.accuracy[-1]


def _by_gumbel(
    settings: Mapping[str, Any], target: MLP, data: Dataset, generator: torch.Generator
) -> tuple[Partition, dict[str, Any]]:
    how = settings["search"]
    gumbel, _, curve = joint(settings, {**how["policy"], "gumbel": how["gumbel"]}, target, data, generator)
    # The chance that a neuron's draw is its preferred group: how settled the partition is.
    settled = torch.cat([mu.detach().softmax(1).max(1).values for mu in gumbel.preferences]).mean().item()
    found = {"joint_accuracy_curve": curve.accuracy, "joint_activity_curve": curve.activity, "settled": settled}
    return gumbel.best(), found


def drawing(settings: Mapping[str, Any]) -> torch.Generator:
    """What is random in the search for the partition of these settings."""
    return torch.Generator().manual_seed(2_000_000 + 1000 * settings["target_seed"] + settings["partition_seed"])


def joint(
    settings: Mapping[str, Any], plan: Mapping[str, Any], target: MLP, data: Dataset, generator: torch.Generator
) -> tuple[Gumbel, LazyNetwork, PolicyCurve]:
    """Partition and policy trained together by Gumbel-Softmax as `plan` says: the preferences, the lazy network with
    each neuron in the group it prefers at last, and the curve of its training, with partitions drawn."""
    gumbel = Gumbel(target.hidden, settings["groups"], generator, settings["scope"])
    lazy = partitioning.untrained(settings, target, data, gumbel.best())
    first = first_layer(target, torch.from_numpy(data.train.x), CACHE_BYTES)
    curve = train_gumbel(gumbel, lazy, data, plan, generator, first=first)
    return gumbel, LazyNetwork(target, gumbel.best(), lazy.policy, lazy.decision, lazy.rescale), curve


def _by_swaps(
    settings: Mapping[str, Any], target: MLP, data: Dataset, generator: torch.Generator
) -> tuple[Partition, dict[str, Any]]:
    how, start = settings["search"], partitioning.drawn(settings, target)
    lazy = partitioning.untrained(settings, target, data, start)
    train_policy(lazy, data, how["policy"], torch.Generator().manual_seed(settings["policy_seed"]))
    lazy = calibrated(lazy, torch.from_numpy(data.valid.x), how["policy"]["tau"])
    rows = torch.randperm(len(data.train), generator=generator)[: how["examples"]]
    x, y = torch.from_numpy(data.train.x)[rows], torch.from_numpy(data.train.y)[rows]
    worth = functools.partial(_fixed_worth, lazy, x, y, evaluate(lazy, x).mask, target.linears[0](x).detach())
    local = LocalSearch(start, swaps=how["swaps"], temperature=how["temperature"], span=how["trials"],
                        generator=torch.Generator().manual_seed(settings["partition_seed"]))  # fmt: skip
    done = search(local, worth, how["trials"], generator)
    return local.best(), {"first_worth": done[0].worth, "best_worth": max(trial.worth for trial in done),
                          "accepted": local.accepted}  # fmt: skip


@torch.inference_mode()
def _fixed_worth(lazy: LazyNetwork, x: Tensor, y: Tensor, mask: Tensor, first: Tensor, partition: Partition) -> float:
    """Minus the loss on fixed examples under fixed masks (bool, examples x bits), for another partition."""
    network = LazyNetwork(lazy.target, partition, lazy.policy, lambda *_: mask, lazy.rescale)
    return -cross_entropy(network.evaluate(x, first).scores, y).item()
