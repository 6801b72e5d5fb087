"""Convolutional policies (*slides*): a policy for each layer switches whole filters.

Every row of the slides' table trained their way, from the start and from a trained net, and by today's means, beside
dense nets that learn at least as long; on CIFAR-10 and SVHN.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from condcomp_lib import studies
from condcomp_lib.datasets import Dataset
from condcomp_lib.joint_training import joint_plan, joint_spec, obtain_jointly
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import conv_results, joint
from condcomp_lib.studies.conv_results import AFTER, DENSE, JOINT, LONGER, LONGEST, OURS, PAPER
from condcomp_lib.targets import build_target, hidden_widths

RECIPE = 1
SEEDS = {"quick": 1, "paper": 2}
# The slides' N = 4 and N = 2, read as layers. 96 filters each as in their code, which has 50 epochs; with strides of 2
# in the first two layers and a quarter of the epochs a run takes minutes instead of hours.
DEEP, SHALLOW = "conv 96/2-96/2-96-96", "conv 96/2-96/2"
NETS: dict[str, dict[str, tuple[tuple[str, float], ...]]] = {  # by data set: architectures and sparsity targets
    "quick": {"digits": (("conv 16-32/2", 0.5),)},
    "paper": {
        "cifar10": ((DEEP, 0.5), (DEEP, 0.3), (DEEP, 0.2), (SHALLOW, 0.5), (DEEP, 0.65)),
        "svhn": ((DEEP, 0.5), (DEEP, 0.65)),
    },
}
POOL = {"digits": 2}  # pixels a side that the first gate reads as one, by today's means; elsewhere 4
BRIEF = {"digits": {"batch": 32, "network_rate": 1e-2, "learning_rate": 1e-2}}
DENSE_EPOCHS = {"digits": 12, "cifar10": 12, "svhn": 5}
EPOCHS = {"digits": 12, "cifar10": 6, "svhn": 4}  # with the policy, from the start
MORE = {"digits": 6, "cifar10": 6, "svhn": 3}  # with the policy, from a trained net
# On CIFAR-10 nets that keep more than half of their filters still learn after that, and so may dense ones.
LONG, HALF = {"cifar10": 12}, 0.5
ALONE: dict[str, Any] = {"estimator": "dense", "network_rate": 2e-3}
# Their code: Adam at 0.003 for both, probabilities kept within [0.1, 0.75]; the weights of the losses are not known.
REINFORCE: dict[str, Any] = {"estimator": "reinforce", "network_rate": 3e-3, "learning_rate": 3e-3, "lambda_s": 0.2,
                             "lambda_v": 0.03, "keep": "last"}  # fmt: skip
LIMITS, MOST_TAU = [0.1, 0.75], 0.5
THROUGH: dict[str, Any] = {"estimator": "threshold-through", "network_rate": 2e-3, "learning_rate": 3e-3,
                           "sparsity": "rate", "lambda_s": 0.3}  # fmt: skip
TAUGHT: dict[str, Any] = {"distil": 1.0, "labels": 0.5}  # from a trained net, which is then also the teacher
# Nets with more than half of their filters learn from labels alone: a teacher that has learned for as short a time
# holds them back (validation accuracy at 0.65, first seeds: CIFAR-10 73.1% against 72.5%, SVHN 91.5% against 90.8%).
FREE: dict[str, Any] = {"labels": 1.0}
CONTROLLED = 0.5  # least tau with a dense net of equal compute


def specs(profile: str) -> list[RunSpec]:
    """One run per data set, network, sparsity target, way to train and seed."""
    rows: list[tuple[str, str, float, str]] = []
    for dataset, nets in NETS[profile].items():
        for architecture in dict.fromkeys(own for own, _ in nets):
            rows += [(dataset, architecture, 1.0, method) for method in (DENSE, LONGER)]
            rows += [(dataset, architecture, 1.0, LONGEST)] if dataset in LONG and architecture == DEEP else []
        rows += [(dataset, *net, OURS) for net in nets]
        # 0.65, what fits into two thirds of the time, is not in the slides, nor is SVHN: one row is trained their way.
        theirs = nets[:1] if dataset == "svhn" else [net for net in nets if net[1] <= MOST_TAU]
        rows += [(dataset, *net, PAPER) for net in theirs]
        rows += [(dataset, *nets[0], method) for method in ((AFTER, JOINT) if dataset != "svhn" else ())]
    return [_spec(*row, seed) for row in rows for seed in range(SEEDS[profile])]


def _spec(dataset: str, architecture: str, tau: float, method: str, seed: int) -> RunSpec:
    brief = BRIEF.get(dataset, {"batch": 128})
    alone = {**ALONE, **brief, "epochs": DENSE_EPOCHS[dataset]}
    free = method == OURS and tau > HALF
    long = free or method == LONGEST
    later = {"epochs": (LONG if long else MORE).get(dataset, MORE[dataset]), "trained": alone}
    paper = {**REINFORCE, **brief, "tau": tau, "limits": LIMITS}
    ours = {**THROUGH, **brief, "tau": tau, "rates": [tau] * architecture.count("-") + [tau]}
    ours["pool"] = POOL.get(dataset, 4)
    ways: dict[str, dict[str, Any]] = {
        DENSE: alone,
        LONGER: {**alone, **later},
        LONGEST: {**alone, **later},
        PAPER: {**paper, "epochs": EPOCHS[dataset]},
        AFTER: {**paper, **later},
        JOINT: {**ours, "epochs": EPOCHS[dataset]},
        OURS: {**ours, **later, **(FREE if free else TAUGHT)},
    }
    training = ways[method]
    network = {key: training.pop(key) for key in ("pool", "limits", "trained") if key in training}
    joint_plan(**training)  # a table with a bad setting fails here, not after hours
    kind = {"dataset": dataset, "architecture": architecture, "tau": tau, "method": method}
    seeds = {"target_seed": seed, "policy_seed": seed}
    return RunSpec("conv", RECIPE, {**kind, "network": network, "training": training, **seeds})


def network_spec(settings: Mapping[str, Any]) -> RunSpec:
    """The run that trains the network of a record with these settings."""
    return joint_spec(settings["dataset"], settings["architecture"], 1, seed=settings["target_seed"],
                      **settings["network"], **settings["training"])  # fmt: skip


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train (or fetch) one conv net and its policy, and measure error, activity and compute on test data."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    lazy, result, mask, cited = joint.trained(network_spec(settings), data, artefacts)
    if settings["method"] == OURS and settings["tau"] >= CONTROLLED:
        smaller = control_spec(settings, result["multiply_adds"], data)
        control, equal = obtain_jointly(smaller, data, artefacts)
        result["control_error"] = joint.tested(control, data, dense=True)[0]["error"]
        result["control_filters"], cited["control"] = list(control.target.hidden), equal.cite()
    arrays = None
    if settings["target_seed"] == 0 and settings["method"] == OURS:
        arrays = {"set": used_by_class(lazy, mask, data.test.y, data.classes)}
    return Outcome(result, arrays, {"note": data.note, "checksum": data.checksum}, cited)


def control_spec(settings: Mapping[str, Any], adds: float, data: Dataset) -> RunSpec:
    """The run that trains a dense net of `adds` multiply-adds, all layers narrower by the same factor, for as many
    epochs as the conditional one and the net that it began with."""
    marks = [part[len(part.removesuffix("/2")) :] for part in settings["architecture"].split("-")]
    full = hidden_widths(settings["architecture"])

    def narrowed(factor: float) -> str:
        widths = [max(1, round(factor * width)) for width in full]
        return "conv " + "-".join(f"{width}{mark}" for width, mark in zip(widths, marks, strict=True))

    def off(factor: float) -> float:
        target = build_target(narrowed(factor), data.shape, data.classes)
        sides = itertools.pairwise([*target.reads, target.hidden[-1], data.classes])
        spent = sum(a * b * products for (a, b), products in zip(sides, target.products, strict=True))
        return abs(spent + target.hidden[-1] * target.positions[-1] - adds)

    best = min((step / 200 for step in range(1, 301)), key=off)
    training = {**settings["training"], **settings["network"]["trained"]}
    epochs = settings["training"]["epochs"] + settings["network"]["trained"]["epochs"]
    alone = {key: training[key] for key in (*ALONE, "batch")}
    return joint_spec(settings["dataset"], narrowed(best), 1, seed=settings["target_seed"], **alone, epochs=epochs)


def used_by_class(lazy: LazyNetwork, mask: torch.Tensor, y: np.ndarray, classes: int) -> np.ndarray:
    """How often each filter is evaluated for each class (float16, classes x filters of all layers)."""
    own = torch.cat(lazy.partition.by_gate(mask), 1).float()
    labels = torch.from_numpy(y)
    return torch.stack([own[labels == label].mean(0) for label in range(classes)]).to(torch.float16).numpy()


STUDY = studies.Study(
    name="conv",
    title="Convolutional policies",
    notebook="06_joint_training",
    specs=specs,
    compute=compute,
    answers=conv_results.answers,
    claims=conv_results.claims,
    promises=conv_results.promises,
    audited=("error", "activity"),
)
