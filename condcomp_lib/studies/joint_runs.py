"""Partition and policy trained together by Gumbel-Softmax, as the tables of *partitions* have it."""

from collections.abc import Mapping
from typing import Any

import torch

from condcomp_lib.datasets import Dataset
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.partitioners.gumbel import Gumbel, train_gumbel
from condcomp_lib.policy_training import PolicyCurve
from condcomp_lib.studies import partitioning
from condcomp_lib.targets import MLP
from condcomp_lib.training import CACHE_BYTES, first_layer

ESTIMATORS: dict[str, dict[str, Any]] = {"reinforce": {"estimator": "reinforce"}, "dpg": {"estimator": "dpg"}}


def joint(settings: Mapping[str, Any], target: MLP, data: Dataset) -> tuple[LazyNetwork, PolicyCurve]:
    """The lazy network of these settings, each neuron in the group it prefers at last; the curve of its training, with
    partitions drawn."""
    seed = 1000 * settings["target_seed"] + settings["partition_seed"]
    drawing = torch.Generator().manual_seed(2_000_000 + seed)
    gumbel = Gumbel(target.hidden, settings["groups"], drawing, settings["scope"])
    lazy = partitioning.untrained(settings, target, data, gumbel.best())
    first = first_layer(target, torch.from_numpy(data.train.x), CACHE_BYTES)
    curve = train_gumbel(gumbel, lazy, data, settings, drawing, first=first)
    return LazyNetwork(target, gumbel.best(), lazy.policy, lazy.decision, lazy.rescale), curve
