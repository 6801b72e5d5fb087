"""Study `start`: how much of a dense network is at work on one example, and what skipping the rest would save.

No policy yet: the neurons to keep are chosen by an oracle that has seen all activations ("best"), or blindly
("random"). The two are landmarks for a policy, not bounds: the oracle is a greedy rule of magnitudes that sees what no
policy sees, and a learned choice could still beat it; the random choice is not rescaled, as dropout would.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condcomp_lib import stats, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.datasets import Dataset
from condcomp_lib.published import Answer
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies.targets import NO_EXTRA, files, firing_rates, target_of
from condcomp_lib.targets import MLP, multiply_adds
from condcomp_lib.training import accuracy, obtain_target

RECIPE = 1
SHARES = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0)  # of the neurons of every hidden layer
NETWORKS = {
    "quick": (("digits", "2x64"),),
    "paper": (("mnist", "32"), ("mnist", "256"), ("mnist", "500"), ("svhn", "2x200"), ("svhn", "3x800")),
}
SEEDS = {"quick": 3, "paper": 5}


def specs(profile: str) -> list[RunSpec]:
    """One run per network and target seed. The name of the target's own run is a setting, so it is part of the name."""
    found = []
    for dataset, architecture in NETWORKS[profile]:
        for seed in range(SEEDS[profile]):
            settings = {
                "dataset": dataset,
                "architecture": architecture,
                "pretraining": "none",
                "split": "test",
                "target_seed": seed,
            }
            found.append(RunSpec("start", RECIPE, {**settings, "target": target_of(settings).name}))
    return found


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train (or fetch) the target, then measure on the test split what happens when neurons are skipped."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    target, trained = obtain_target(target_of(settings), data, artefacts)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(settings["target_seed"])
    dense = skipped_accuracy(target, data, 1.0, "best")
    firing = firing_rates(target, data.test)
    widths = (data.train.x.shape[1], *target.hidden, data.classes)
    full = sum(multiply_adds(widths))
    result: dict[str, Any] = {
        "accuracy": dense,
        "valid_accuracy": trained.result["valid_accuracy"],
        "epochs": trained.result["epochs"],
        "activity": float(np.concatenate(firing).mean()),
        "activity_by_layer": [float(rates.mean()) for rates in firing],
        "never_firing": float((np.concatenate(firing) == 0).mean()),
        "shares": list(SHARES),
        "compute_by_share": [sum(multiply_adds(widths, kept_shares(target.hidden, share))) / full for share in SHARES],
        "best_ratio": [skipped_accuracy(target, data, share, "best") / dense for share in SHARES],
        "random_ratio": [skipped_accuracy(target, data, share, "random", generator) / dense for share in SHARES],
    }
    source = {"note": data.note, "checksum": data.checksum}
    return Outcome(result, None, source, {"target": trained.cite()}, time.perf_counter() - started)


def kept_shares(hidden: Sequence[int], share: float) -> list[float]:
    """The share really kept in each layer: whole neurons, at least one."""
    return [max(1, round(share * width)) / width for width in hidden]


@torch.inference_mode()
def skipped_scores(target: MLP, x: Tensor, share: float, rule: str, generator: torch.Generator | None = None) -> Tensor:
    """Scores (float32, examples x classes) when only `share` of each hidden layer's neurons is evaluated.

    `rule` "best" keeps, for each example, the neurons that contribute most to the next layer, |h_i| times the norm of
    the outgoing weights; "random" keeps as many at random. Skipped neurons count as zero; nothing is rescaled.
    """
    for layer, following in itertools.pairwise(target.linears):
        x = target.activation(layer(x))
        worth = x.abs() * following.weight.norm(dim=0) if rule == "best" else torch.rand(x.shape, generator=generator)
        kept = worth.topk(max(1, round(share * x.shape[1])), dim=1).indices
        x = torch.zeros_like(x).scatter(1, kept, x.gather(1, kept))
    return target.linears[-1](x)


def skipped_accuracy(
    target: MLP, data: Dataset, share: float, rule: str, generator: torch.Generator | None = None
) -> float:
    """Test accuracy when only `share` of each hidden layer's neurons is evaluated (rules as in `skipped_scores`)."""
    return accuracy(lambda x: skipped_scores(target, x, share, rule, generator), data.test)


def by_network(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each (data set, architecture), in the run table's order."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.spec.settings["dataset"], record.spec.settings["architecture"]), []).append(record)
    return groups


def values(records: Sequence[Record], field: str, share: float | None = None) -> np.ndarray:
    """One field of each record; for the curves the value at `share`."""
    if share is None:
        return np.array([record.result[field] for record in records])
    return np.array([record.result[field][record.result["shares"].index(share)] for record in records])


def curves(records: Sequence[Record]) -> dict[str, tuple[list[float], np.ndarray]]:
    """For each rule, the shares kept and the accuracy ratios (runs x shares) of one network's records."""
    return {
        label: (records[0].result["shares"], np.array([record.result[field] for record in records]))
        for label, field in (("oracle: best neurons", "best_ratio"), ("blind: random neurons", "random_ratio"))
    }


def activities(groups: Mapping[tuple[str, str], Sequence[Record]]) -> dict[str, np.ndarray]:
    """For each network, the share of neurons that fire (runs x layers)."""
    return {
        f"{dataset}\n{architecture}": np.array([record.result["activity_by_layer"] for record in group])
        for (dataset, architecture), group in groups.items()
    }


def findings(records: Sequence[Record]) -> str:
    """What the runs say, as a Markdown list with its numbers filled in."""
    lines = []
    for (dataset, architecture), group in by_network(records).items():
        active, best, blind = (
            stats.interval(values(group, field, share)).format(2)
            for field, share in (("activity", None), ("best_ratio", 0.25), ("random_ratio", 0.25))
        )
        compute = values(group, "compute_by_share", 0.25)[0]
        lines.append(
            f"- **{architecture} on {dataset}**: the share of hidden neurons that fire on an example is {active}. The "
            f"best quarter of each layer keeps {best} of the accuracy at {compute:.2f} of the multiply-adds; a random "
            f"quarter keeps {blind}."
        )
    return "\n".join(lines)


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The table of targets: one row per network, every number an interquartile mean with its interval over seeds."""
    return [
        {
            "data set": dataset,
            "files": files(group),
            "architecture": architecture,
            "seeds": len(group),
            "accuracy": stats.interval(values(group, "accuracy")),
            "active neurons": stats.interval(values(group, "activity")),
            "ratio, best 25%": stats.interval(values(group, "best_ratio", 0.25)),
            "ratio, random 25%": stats.interval(values(group, "random_ratio", 0.25)),
            "multiply-adds at 25%": float(values(group, "compute_by_share", 0.25)[0]),
        }
        for (dataset, architecture), group in by_network(records).items()
    ]


def answers(records: Sequence[Record]) -> list[Answer]:
    """This study's numbers beside published ids: the dense baselines."""
    groups = by_network(records)
    wanted = [
        ("Ds4.01", ("mnist", "500"), "test_error_percent", "Adam, batch 128, 20 epochs; no weight decay"),
        ("Fs42.02", ("mnist", "256"), "test_error_percent", ""),
        ("Fs42.03", ("mnist", "32"), "test_error_percent", ""),
        ("Ps52.11", ("svhn", "2x200"), "validation_accuracy_percent", NO_EXTRA),
    ]
    place = {"notebook": "00_start_here", "figure": "start_targets"}
    found = []
    for id, network, metric, note in wanted:
        if network in groups:
            group, error = groups[network], metric == "test_error_percent"
            percent = 100 * values(group, "accuracy" if error else "valid_accuracy")
            ours = stats.interval(100 - percent if error else percent)
            found.append(Answer(id, ours, metric, "; ".join(filter(None, [note, _caveat(group)])), **place))
    if ("svhn", "3x800") in groups:
        share = 100 * float(values(groups["svhn", "3x800"], "compute_by_share", 0.25)[0])
        note = "whole 3072-800-800-800-10 net, exact count: 6.25% holds only between two hidden layers"
        found.append(Answer("Send.01", share, "multiply_adds_percent", note, **place))
    return found


def _caveat(group: Sequence[Record]) -> str:
    """What a reader must know of these runs: the data's standing where it is not official, seeds still to come."""
    standing = files(group)
    return "; ".join(
        ([] if standing == "official" else [f"{standing} of the data"])
        + ([] if len(group) >= SEEDS["paper"] else [f"{len(group)} of {SEEDS['paper']} seeds so far"])
    )


def claims(records: Sequence[Record]) -> list[Claim]:
    """For each network: most neurons are idle, few of them suffice, and it matters which."""
    found = []
    for (dataset, architecture), group in by_network(records).items():
        end, net = f"{dataset}.{architecture}", f"{architecture} on {dataset}"
        for id, statement, field, share, bound in (
            ("idle", "fewer than half of the hidden neurons fire on an example", "activity", None, {"below": 0.5}),
            ("oracle", "the best quarter keeps 99% of the accuracy", "best_ratio", 0.25, {"above": 0.99}),
            ("blind", "a random quarter loses a tenth of the accuracy", "random_ratio", 0.25, {"below": 0.9}),
        ):
            interval = stats.interval(values(group, field, share))
            found.append(judge(f"start.{id}.{end}", "ours", f"{net}: {statement}", interval, **bound))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 00: all from all runs of the study."""
    return dict.fromkeys(("start_skipping", "start_activity", "start_targets"), records)


STUDY = studies.Study(
    name="start",
    title="What a dense network leaves idle",
    notebook="00_start_here",
    specs=specs,
    compute=compute,
    answers=answers,
    claims=claims,
    promises=promises,
    audited=("accuracy", "valid_accuracy", "activity", "best_ratio", "random_ratio"),
)
