"""Which neurons fire together, in networks trained with dropout, with the class-flow penalty or plainly (*partitions*,
sections 5.4 and 5.5)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condcomp_lib import coactivation, studies
from condcomp_lib.datasets import Dataset
from condcomp_lib.partitioners.clustering import activation_partition
from condcomp_lib.partitions import make_partition
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import coactivation_results, targets
from condcomp_lib.studies import pretraining as pretraining_study
from condcomp_lib.studies.coactivation_results import FLOW, PLAIN, PRODUCT
from condcomp_lib.targets import MLP
from condcomp_lib.training import accuracy, obtain_target, snapshot

RECIPE = 1
SEEDS = 3
GROUPS = 16  # of the partitions that are held against the coactivation
SIDE = 200  # blocks a side of the matrices that are kept, of the first target seed
INGOING_SIDE = 100
EXAMPLES = 10_000  # test examples at most
SPLIT_EXAMPLES = 4000  # training examples that the split is made from
EPOCHS = (1, 4, 8, 12)  # whose coactivation is kept: figures 2 and 3 show how it comes about
# Coefficients chosen by hand on target seed 0 of 2x200, in three or four epochs of 20,000 examples: roots from 0.01 to
# 4, of which 1.5 takes a fifth to a third of the loss at no lower validation accuracy; products from 10 to 1e7, the
# largest tried, which takes two hundredths.
COEFFICIENTS = {"svhn": {FLOW: 1.5, PRODUCT: 1e7}, "digits": {FLOW: 0.3, PRODUCT: 1e5}}
HOYER = 0.3


def kinds(profile: str) -> list[dict[str, Any]]:
    """Every network of the run table but for its seed: how it is called, and the settings of its target."""
    dataset, sizes = ("digits", ("2x64",)) if profile == "quick" else ("svhn", ("2x200", "2x500"))
    epochs = {"digits": {"batch": 32, "epochs": 20, "learning_rate": 1e-3}}.get(dataset, targets.TRAINING["svhn"])
    found = []
    for architecture in sizes:
        same = {"dataset": dataset, "architecture": architecture, "dropout_eps": None}
        own = COEFFICIENTS[dataset]
        for name, form in ((PLAIN, None), (FLOW, "root"), (PRODUCT, "product")):
            training = {**epochs, "balanced": True, "snapshots": EPOCHS}
            if form:
                training["penalty"] = {"coefficient": own[name], "form": form}
            pretraining = "flow" if form else "none"
            found.append({**same, "network": name, "pretraining": pretraining, "target_training": training})
    if profile == "paper":
        found += _more(epochs)
    return found


def _more(epochs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Targets of the tables of study `pretraining`, figure 1's among them, and other ways to pretrain the network of
    figure 3, with the same minibatches."""
    same = {"dataset": "svhn", "dropout_eps": None}
    found: list[dict[str, Any]] = []
    for pretraining, eps in (("none", None), ("dropout-0.5", None), ("dropout-uniform", 0.5)):
        found.append({**same, "architecture": "3x800", "network": targets.label(pretraining, eps),
                      "pretraining": pretraining, "dropout_eps": eps})  # fmt: skip
    for pretraining, own in pretraining_study.PENALTY.items():
        found.append({**same, "architecture": "3x800", "network": targets.label(pretraining, None),
                      "pretraining": pretraining, "target_training": {**epochs, **own}})  # fmt: skip
    balanced = {**epochs, "balanced": True}
    for pretraining in ("hoyer", "dropout-uniform", "dropout-uniform-layer", "dropout-uniform-example"):
        eps = 0.5 if pretraining != "hoyer" else None
        own = {**balanced, "penalty": {"coefficient": HOYER}} if eps is None else balanced
        found.append({**same, "architecture": "2x500", "network": targets.label(pretraining, eps),
                      "pretraining": pretraining, "dropout_eps": eps, "target_training": own})  # fmt: skip
    return found


def specs(profile: str) -> list[RunSpec]:
    """One run per network and target seed."""
    found = []
    for kind in kinds(profile):
        for seed in range(SEEDS):
            settings = {**kind, "split": "test", "examples": EXAMPLES, "groups": GROUPS, "scope": "network",
                        "target_seed": seed}  # fmt: skip
            settings["target"] = targets.target_of(settings).name
            found.append(RunSpec("coactivation", RECIPE, settings))
    return found


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train (or fetch) the network and measure which of its neurons fire together, at the end and on the way."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    target, trained = obtain_target(targets.target_of(settings), data, artefacts)
    x = torch.from_numpy(data.test.x[: settings["examples"]])
    c = coactivation.network_coactivation(target, x)
    rates = [part.mean().item() for part in c.diagonal().split(list(target.hidden))]
    result: dict[str, Any] = {
        "accuracy": trained.result["test_accuracy"],
        **{key: trained.result[key] for key in ("valid_accuracy", "learning_curve", "best_epoch", "epochs")},
        "firing_by_layer": rates,
        "measures": dataclasses.asdict(coactivation.measures(c)),
        "explained": explained(settings, c, target, data),
        "on_the_way": [],
    }
    if "penalty_share" in trained.result:
        result["penalty_share"] = trained.result["penalty_share"]
    arrays = matrices(settings, c, target, data) if settings["target_seed"] == 0 else None
    for epoch in settings.get("target_training", {}).get("snapshots", ()):
        earlier = snapshot(trained, data, epoch)
        then = coactivation.network_coactivation(earlier, x)
        found = {"epoch": epoch, "test_accuracy": accuracy(earlier, data.test)}
        result["on_the_way"].append(found | dataclasses.asdict(coactivation.measures(then)))
        if arrays is not None:
            arrays[f"epoch{epoch}"] = drawn(then, coactivation.ordering(then, "mean"))
    return Outcome(result, arrays, {"note": data.note, "checksum": data.checksum}, {"target": trained.cite()})


def split_of(settings: Mapping[str, Any], target: MLP, data: Dataset) -> Tensor:
    """The group of each hidden neuron by a coactivation split made from training examples (int64, neurons)."""
    patterns = coactivation.firing_patterns(target, torch.from_numpy(data.train.x[:SPLIT_EXAMPLES]))
    generator = torch.Generator().manual_seed(settings["target_seed"])
    split = activation_partition(patterns, target.hidden, settings["groups"], generator, settings["scope"])
    return torch.cat(split.membership)


def explained(settings: Mapping[str, Any], c: Tensor, target: MLP, data: Dataset) -> dict[str, float]:
    """How much of the coactivation three splits into as many groups explain, of all of it and of what is beyond firing
    rates: the one made from coactivation, one by firing rate alone, and a random one."""
    generator = torch.Generator().manual_seed(settings["target_seed"])
    chance = make_partition("balanced", target.hidden, settings["groups"], generator, settings["scope"])
    ranks = c.diagonal().argsort().argsort()
    splits = {
        "coactivation": split_of(settings, target, data),
        "rates": ranks * settings["groups"] // len(c),
        "random": torch.cat(chance.membership),
    }
    beyond = coactivation.beyond_rates(c)
    found = {name: coactivation.explained(c, split) for name, split in splits.items()}
    return found | {f"{name}, beyond": coactivation.explained(beyond, split) for name, split in splits.items()}


def matrices(settings: Mapping[str, Any], c: Tensor, target: MLP, data: Dataset) -> dict[str, np.ndarray]:
    """What the figures show: coactivation in each order, and for each class how flows go into neurons together."""
    found = {how: drawn(c, coactivation.ordering(c, how)) for how in coactivation.ORDERINGS}
    found["partition"] = drawn(c, split_of(settings, target, data).argsort(stable=True))
    found["layers"] = drawn(c, torch.arange(len(c)))
    x, y = (torch.from_numpy(part[: settings["examples"]]) for part in (data.test.x, data.test.y))
    for label in range(data.classes):
        layers = coactivation.ingoing_flow(target, x[y == label]).split(list(target.hidden), 1)
        flow = torch.cat([part / part.mean() for part in layers], 1)
        both = coactivation.block_means(flow.T @ flow / len(flow), INGOING_SIDE)
        found[f"ingoing{label}"] = both.to(torch.float16).numpy()
    return found


def drawn(c: Tensor, order: Tensor) -> np.ndarray:
    """Block means of `c` in an order, in 255ths (uint8)."""
    return (255 * coactivation.block_means(c[order][:, order], SIDE)).round().to(torch.uint8).numpy()


STUDY = studies.Study(
    name="coactivation",
    title="Coactivation",
    notebook="04_coactivation",
    specs=specs,
    compute=compute,
    answers=coactivation_results.answers,
    claims=coactivation_results.claims,
    promises=coactivation_results.promises,
    audited=("accuracy", "valid_accuracy"),
)
