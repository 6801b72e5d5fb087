"""What `lazify` decides: partition, the layers' shares, and a policy (and weights) trained within a time."""

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from condcomp_lib.coactivation import firing_patterns
from condcomp_lib.conversion.examples import Examples
from condcomp_lib.errors import UsageError
from condcomp_lib.lazy import Evaluation, LazyNetwork, calibrated, decided_by, evaluate
from condcomp_lib.oracle import Oracle
from condcomp_lib.partitioners.clustering import activation_partition, weight_partition
from condcomp_lib.partitions import Partition
from condcomp_lib.policies import Budget, Policy, Pool, Sample, spread_over
from condcomp_lib.policy_training import PolicyTraining, policy_plan
from condcomp_lib.targets import MLP, multiply_adds
from condcomp_lib.training import CACHE_BYTES

POLICY_SHARE = 0.06  # of the target's multiply-adds that the policy may take
LEAST_GROUPS, MOST_GROUPS, NARROWEST = 25, 100, 4  # groups of each layer, whatever they cost, and neurons of a group
POOLED = 256  # numbers of a picture that the first gate reads, at most
JUDGED = 1000  # examples on which an oracle judges what is to be chosen
SPREADS = (0.0, 0.3, -0.3)  # how much more of the first hidden layer than of the last is evaluated
FIRING = 0.5  # ... or shares in proportion to this power of how often a layer fires
WARM, LATER = 2, 10  # epochs at most, after the oracle and then by the model's own answers; more of them, up to
STEPS = 1500  # so many steps, where examples are few
RATE, TUNING_RATE = 2e-3, 4e-4
CLOSE = 0.005  # how far a budget's activity may lie from what is asked


@dataclass(frozen=True)
class Chosen:
    """A lazy network, the share of each layer that it is to evaluate, and what else was chosen on the way."""

    lazy: LazyNetwork
    rates: list[float]
    told: dict[str, Any]


def groups_of(target: MLP, reads: int) -> int:
    """Groups of each layer: as many as the policy may take multiply-adds for, none of fewer than NARROWEST neurons."""
    full = sum(multiply_adds([target.inputs, *target.hidden, target.linears[-1].out_features]))
    affordable = POLICY_SHARE * full / (reads + sum(target.hidden[:-1]) / 2)
    wanted = min(MOST_GROUPS, max(LEAST_GROUPS, affordable))
    return int(max(2, min(wanted, min(target.hidden) // NARROWEST)))


def pool_of(examples: Examples) -> Pool | None:
    """How a picture is made smaller for the first gate; None for what is no picture, or is small."""
    shape = examples.data.shape
    if min(shape[1:]) < 2 or math.prod(shape) <= POOLED:
        return None
    for size in range(2, min(shape[1:]) + 1):
        if not (shape[1] % size or shape[2] % size) and math.prod(shape) // size**2 <= POOLED:
            return Pool(shape, size)
    return None


@torch.no_grad()  # not inference_mode: what is made here is trained later
def prepared(target: MLP, examples: Examples, activity: float, groups: int | None, seed: int) -> Chosen:
    """The lazy network before training: the partition and the spread over layers with which the oracle loses least."""
    pool = pool_of(examples)
    reads = pool.outputs if pool else target.inputs
    count = groups_of(target, reads) if groups is None else groups
    if min(target.hidden) < 2:
        raise UsageError("a hidden layer of one neuron cannot be cut into groups")
    if not isinstance(count, int) or not 2 <= count <= min(target.hidden):
        raise UsageError(
            f"groups must be from 2 to the {min(target.hidden)} neurons of the smallest layer, not {count}"
        )
    x = torch.from_numpy(examples.data.valid.x[:JUDGED])
    wanted, least = target(x), math.inf
    best: tuple[str, Partition, list[float]] | None = None
    factors = _factors(target, x)
    for name, partition in _partitions(target, examples, count, seed).items():
        oracle = Oracle(target, partition, pool)
        for own in factors:
            rates = spread_over(activity, own, target.hidden)
            decided = LazyNetwork(target, partition, oracle, Budget.of(rates, partition, oracle))
            lost = mse_loss(evaluate(decided, x).scores, wanted).item()
            if lost < least or best is None:
                least, best = lost, (name, partition, rates)
    assert best is not None
    name, partition, rates = best
    draws = torch.Generator().manual_seed(seed)
    lazy = LazyNetwork(target, partition, Policy(partition, target.inputs, pool, draws), Sample(draws))
    return Chosen(lazy, rates, {"partition": name, "groups": count, "pool": pool.size if pool else 0})


def _factors(target: MLP, x: Tensor) -> list[list[float]]:
    """Ways to spread an activity over the layers."""
    layers = len(target.hidden)
    places = np.linspace(1, -1, layers) if layers > 1 else np.zeros(1)
    found = [(1 + spread * places).tolist() for spread in SPREADS]
    fired = firing_patterns(target, x).float().mean(0).split(list(target.hidden))
    return [*found, [float(part.mean()) ** FIRING + 1e-3 for part in fired]] if layers > 1 else found[:1]


def _partitions(target: MLP, examples: Examples, groups: int, seed: int) -> dict[str, Partition]:
    draws = torch.Generator().manual_seed(seed)
    patterns = firing_patterns(target, torch.from_numpy(examples.data.train.x[:4000]))
    return {
        "coactivation": activation_partition(patterns, target.hidden, groups, draws, "layer"),
        "k-means": weight_partition(target, groups, draws, "layer"),
    }


class _Training(PolicyTraining):
    """Training on the model's own outputs; those that are no scores of classes are kept in the mean square."""

    scores = True
    scale = 1.0  # the outputs' variance

    def cost(self, found: Evaluation, y: Tensor, wanted: Tensor | None) -> Tensor:
        if self.scores or wanted is None:
            return super().cost(found, y, wanted)
        return (found.scores - wanted).square().mean(1) / self.scale


def trained(
    chosen: Chosen,
    target: MLP,
    examples: Examples,
    finetune: bool,
    seconds: float,
    epochs: int | None,
    seed: int,
    progress: bool,
) -> Chosen:
    """The same lazy network with a trained policy, decided by thresholds or by a budget, whichever keeps more on
    validation data of what `target`, the model as it was, answers; its own is a copy where it is fine-tuned."""
    lazy, data = chosen.lazy, examples.data
    if min(chosen.rates) >= 1:
        every = tuple(lazy.partition.groups_by_gate)
        return Chosen(decided_by(lazy, Budget(every)), chosen.rates, {**chosen.told, "decision": "budget", "epochs": 0})
    if finetune:
        lazy = LazyNetwork(copy.deepcopy(lazy.target), lazy.partition, lazy.policy, lazy.decision)
    done, shuffling = 0, torch.Generator().manual_seed(seed)
    first, wanted = None, None
    for title, settings, share, most in _phases(chosen, examples, finetune):
        started = time.perf_counter()
        training = _made(lazy, examples, settings, shuffling, first, wanted)
        most = max(most, STEPS * most // (LATER * -(-len(data.train) // settings["batch"])))
        planned = _planned(training, settings, len(data.train), seconds * share, epochs and min(epochs, most), most)
        training = _made(lazy, examples, {**settings, **planned}, shuffling, training.first, training.wanted)
        training.run(title if progress else None)
        seconds -= time.perf_counter() - started
        first, wanted, done = (training.first if not finetune else None), training.wanted, done + planned["epochs"]
    name, decided = _decided(lazy, target, examples, chosen.rates)
    return Chosen(decided, chosen.rates, {**chosen.told, "decision": name, "epochs": done, "finetuned": finetune})


def _phases(chosen: Chosen, examples: Examples, finetune: bool) -> list[tuple[str, dict[str, Any], float, int]]:
    """What is trained one after the other: title, settings, share of the time that is left, and epochs at most."""
    data, labelled = examples.data, examples.labelled
    common = {"tau": _tau(chosen), "rates": chosen.rates, "sparsity": "rate", "lambda_s": 1.0, "learning_rate": RATE,
              "distil": 0.25 if labelled else 1.0, "labels": float(labelled),
              "batch": max(1, min(128, len(data.train) // 20))}  # fmt: skip
    own = {**common, "estimator": "threshold-through", **({"finetune": TUNING_RATE} if finetune else {})}
    if finetune and min(data.shape[1:]) >= 16:
        own["augment"] = 1 + min(data.shape[1:]) // 24
    return [
        ("policy, after the oracle", {**common, "estimator": "cross-entropy"}, 0.3, WARM),
        ("policy and weights" if finetune else "policy", own, 1.0, LATER),
    ]


def _tau(chosen: Chosen) -> float:
    """The mean share of the layers' neurons."""
    widths = np.array(chosen.lazy.target.hidden, float)
    return float(np.array(chosen.rates) @ widths / widths.sum())


def _made(
    lazy: LazyNetwork, examples: Examples, settings: dict[str, Any], draws: torch.Generator, first: Tensor | None,
    wanted: Tensor | None,
) -> _Training:  # fmt: skip
    training = _Training(lazy, examples.data, policy_plan(**settings), draws, first, wanted, CACHE_BYTES)
    training.scores = examples.scores
    if not examples.scores and training.wanted is not None:
        training.scale = max(training.wanted.var().item(), 1e-12)
    return training


def _planned(
    training: _Training, settings: dict[str, Any], examples: int, seconds: float, epochs: int | None, most: int
) -> dict[str, Any]:
    """How many epochs, of how many examples, fit into a time; as many as asked for where that is given."""
    if epochs is not None:
        return {"epochs": epochs}
    rows, spent = torch.arange(settings["batch"]), []
    for _ in range(3):
        started = time.perf_counter()
        training.loss(rows).backward()
        spent.append(time.perf_counter() - started)
    steps, whole = seconds / (1.3 * min(spent)), math.ceil(examples / settings["batch"])
    if steps >= whole:
        return {"epochs": int(min(most, steps // whole))}
    return {"epochs": 1, "epoch_examples": int(max(1, steps)) * settings["batch"]}


def _decided(lazy: LazyNetwork, target: MLP, examples: Examples, rates: list[float]) -> tuple[str, LazyNetwork]:
    """By thresholds or by a budget, which keeps more of the model's answers on validation data."""
    x = torch.from_numpy(examples.data.valid.x)
    ways = {
        "calibrated threshold": calibrated(lazy, x, rates),
        "budget": decided_by(lazy, Budget.of(rates, lazy.partition, lazy.policy)),
    }
    asked = _tau(Chosen(lazy, rates, {}))
    found = {}
    for name, own in ways.items():
        evaluated = evaluate(own, x)
        off = abs(own.partition.activity(evaluated.mask).mean().item() - asked)
        if off <= CLOSE or name == "calibrated threshold":
            found[name] = kept(evaluated.scores, examples.data.valid.y, x, target, examples.scores)
    best = max(found, key=lambda name: found[name])
    return best, ways[best]


@torch.inference_mode()
def kept(scores: Tensor, y: np.ndarray, x: Tensor, target: MLP, classes: bool) -> float:
    """Share of right answers, or of the outputs' variance that is kept."""
    if classes:
        return (scores.argmax(1) == torch.from_numpy(y)).double().mean().item()
    wanted = target(x)
    return 1 - (mse_loss(scores, wanted) / wanted.var().clamp(min=1e-12)).item()
