"""What the sparsity explorer knows: networks to play with, and what each state of its controls comes to."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from condcomp_lib import datasets, paths, stats, studies
from condcomp_lib.lazy import LazyNetwork, evaluate
from condcomp_lib.policies import Given
from condcomp_lib.runs import Record, RunSpec, RunStore
from condcomp_lib.studies import explorer, policies, targets
from condcomp_lib.studies.explorer import CALIBRATED, DECISIONS
from condcomp_lib.widgets import State

LARGE = "svhn"  # from the artefact cache, where a study has left it there
DATASETS = {"digits, 2x200": "digits", "MNIST, 2x200": "mnist", "SVHN, 3x800": LARGE}


@dataclass(frozen=True)
class Network:
    """A lazy network to play with, examples that it was not trained on, and what is known of both beforehand.

    `shape` of a picture, `x` (float32, examples x features), `y` (int64, examples), `first` the first layer's
    pre-activations, `answers` of the full network; `front` by decision: activity (points), accuracy of the stored runs
    (runs x points).
    """

    lazy: LazyNetwork
    shape: tuple[int, int, int]
    classes: int
    x: Tensor
    y: Tensor
    first: Tensor
    answers: Tensor
    front: Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Explored:
    """What one state comes to: shares of the examples and of the target, and what happens to the chosen example.

    `by_class` how often each group is evaluated for each class (float, classes x bits); `fires` the example's
    activations (float32, neurons) by layer, `on` which of them are evaluated (bool); `stored` the interval over seeds.
    """

    accuracy: float
    full: float
    stored: stats.Interval | None
    activity: float
    compute: float
    by_class: np.ndarray
    picture: np.ndarray
    fires: list[np.ndarray]
    on: list[np.ndarray]
    own_activity: float
    label: int
    answer: int
    full_answer: int


def pretrainings(dataset: str) -> dict[str, Record]:
    """The stored networks of a data set that carry weights, by pretraining."""
    return {
        record.spec.settings["pretraining"]: record
        for record in explorer.available()
        if record.spec.settings["dataset"] == dataset and record.arrays_file
    }


def large_spec() -> RunSpec:
    """The trained SVHN network that may lie in the artefact cache: the best policy on a target left as it was."""
    wanted = {"method": policies.WARM, "part": "best", "target_seed": 0, "policy_seed": 0}
    specs = policies.specs("paper")
    return next(spec for spec in specs if wanted.items() <= spec.settings.items())


def networks() -> dict[str, str | None]:
    """The data sets to choose from, each with the reason why it cannot be chosen here, or None."""
    found: dict[str, str | None] = {}
    for name, dataset in DATASETS.items():
        reason = None
        if not datasets.present(dataset):
            reason = f"needs the pictures; condcomp data fetch {dataset}"
        elif dataset == LARGE and not _cached():
            reason = "needs trained weights in the cache; condcomp run policies (hours)"
        elif dataset != LARGE and not pretrainings(dataset):
            reason = "needs the stored runs; condcomp run explorer"
        found[name] = reason
    return found


def _cached() -> bool:
    """Whether the large network's target and policy are trained already."""
    settings, folder = large_spec().settings, paths.artefacts("paper")
    wanted = (targets.target_of(settings), policies.policy_of(settings))
    return all(any(folder.glob(f"*/{spec.study}/{spec.name}.json")) for spec in wanted)


@functools.lru_cache(maxsize=4)
def network(dataset: str, pretraining: str, partitioner: str) -> Network:
    """The network that these choices name, with its examples and its stored curves."""
    data = datasets.load(dataset, download=False)  # a slider must not start a download
    x, y = explorer.examples(data)
    if dataset == LARGE:
        artefacts = RunStore(paths.artefacts("paper"))
        lazy, front = policies.learned(large_spec().settings, data, artefacts)[0], _large_front()
    else:
        lazy = explorer.network(pretrainings(dataset)[pretraining], partitioner, data.shape)
        front = _front(dataset, pretraining, partitioner)
    lazy.requires_grad_(False)
    first = lazy.target.linears[0](x)
    return Network(lazy, data.shape, data.classes, x, y, first, lazy.target(x).argmax(1), front)


Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def _front(dataset: str, pretraining: str, partitioner: str) -> Curves:
    """Of the small networks, by decision: the activities asked for, and the accuracy of each run at each of them."""
    wanted = {"dataset": dataset, "pretraining": pretraining}
    runs = [record.result for record in explorer.available() if wanted.items() <= record.spec.settings.items()]
    at = np.array(runs[0]["activities"])
    return {how: (at, np.array([run["curves"][partitioner][how]["accuracy"] for run in runs])) for how in DECISIONS}


def _large_front() -> Curves:
    """The large network's, from study `policies`: calibrated thresholds, a policy trained for each point."""
    by_tau: dict[float, list[Record]] = {}
    for record in studies.records("policies", "paper", partial=True):
        settings = record.spec.settings
        if settings["method"] == policies.WARM and not settings["policy_seed"] and settings["groups"] == 100:
            by_tau.setdefault(settings["tau"], []).append(record)
    found = [by_tau[tau] for tau in sorted(by_tau)]
    activity = np.array([np.mean([record.result["valid_activity"] for record in group]) for group in found])
    return {CALIBRATED: (activity, np.array([[r.result["valid_accuracy"] for r in group] for group in found]).T)}


def explored(state: State) -> Explored:
    """What the state comes to: "dataset", "pretraining", "partitioner", "decision", "activity" (percent), "example"."""
    net = network(*names(state))
    own = explorer.decided(net.lazy, state["decision"], state["activity"] / 100, net.x, net.first)
    found, row = evaluate(own, net.x, net.first), state["example"] % len(net.x)
    right, chosen = found.scores.argmax(1) == net.y, net.x[row : row + 1]
    firing = net.lazy.evaluate(chosen, None, Given(found.mask[row : row + 1]))
    on = [found.mask[row, columns].numpy() for columns in net.lazy.partition.columns]
    share = net.lazy.partition.activity(found.mask)
    by_class = [found.mask[net.y == label].float().mean(0).numpy() for label in range(net.classes)]
    return Explored(
        accuracy=right.double().mean().item(),
        full=(net.answers == net.y).double().mean().item(),
        stored=_stored(net, state),
        activity=share.mean().item(),
        compute=own.compute(found.mask),
        by_class=np.array(by_class),
        picture=chosen.view(net.shape).mean(0).numpy(),
        fires=[part[0].numpy() for part in firing.hidden],
        on=on,
        own_activity=share[row].item(),
        label=int(net.y[row]),
        answer=int(found.scores[row].argmax()),
        full_answer=int(net.answers[row]),
    )


def names(state: State) -> tuple[str, str, str]:
    """Data set, pretraining and partitioner, by which a network is known."""
    return DATASETS[state["dataset"]], state["pretraining"], state["partitioner"]


def _stored(net: Network, state: State) -> stats.Interval | None:
    """The accuracy of the stored runs at this activity, between their points in a straight line; None for the large
    network, whose points are of other policies than the one at hand."""
    if state["decision"] not in net.front or DATASETS[state["dataset"]] == LARGE:
        return None
    at, runs = net.front[state["decision"]]
    return stats.interval([np.interp(state["activity"] / 100, at, run) for run in runs])
