"""What `lazify` decides: partition, the layers' shares, and a policy (and weights) trained within a time."""

import copy
import math
import time
from collections.abc import Callable, Sequence
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
from condcomp_lib.policy_training import PolicyTraining, policy_plan, scores_of
from condcomp_lib.targets import MLP, multiply_adds
from condcomp_lib.training import CACHE_BYTES

POLICY_SHARE = 0.06  # of the target's multiply-adds that the policy may take
LEAST_GROUPS, MOST_GROUPS = 25, 160  # groups of each layer, whatever they cost
SIZES = 16, 8  # neurons of a group: kernels take so many at once, and fewer of them cost no less
LEAST_PICKED = 5  # groups of a layer that are evaluated, if groups are to be of the larger size
NARROWEST = 4  # neurons of a group in narrow layers
GATE_SHARE = 0.2  # of the multiply-adds asked for that the first gate may take, within the bounds of ...
POOLED = 256, 1024  # ... how many numbers of a picture it reads at most
JUDGED = 1000  # examples on which an oracle judges what is to be chosen
SPREADS = (0.0, 0.3, -0.3)  # how much more of the first hidden layer than of the last is evaluated
FIRING = 0.5  # ... or shares in proportion to this power of how often a layer fires
ALIKE = 0.05  # two spreads that differ by less than this share of each layer's are one
WARM, LATER, TUNED = 2, 20, 40  # epochs at most: after the oracle; then by right answers; then if weights learn, too
STEPS = 3000  # ... where examples are few more of them, so that LATER is at least so many steps
RATE, TUNING_RATE = 4e-3, 1e-3
TRIED, TRIAL_SHARE = 8000, 0.15  # examples that each spread is tried on, and share of the time for all of them
SMALLEST_MOVED = 16  # pixels a side
CLOSE = 0.005  # how far a budget's activity may lie from what is asked


Phase = tuple[str, dict[str, Any], float, int]  # title, settings, share of the time that is left, epochs at most


@dataclass(frozen=True)
class Chosen:
    """A lazy network, the share of each layer that it is to evaluate, and what else was chosen on the way."""

    lazy: LazyNetwork
    rates: list[float]
    told: dict[str, Any]


def _multiply_adds(target: MLP) -> float:
    return sum(multiply_adds([target.inputs, *target.hidden, target.linears[-1].out_features]))


def groups_of(target: MLP, reads: int, activity: float) -> tuple[int, ...]:
    """Groups of each layer: of 16 neurons or a multiple of it, or of 8 where that would leave few to be evaluated, as
    many as the policy may take multiply-adds for; narrow layers have smaller ones, so that there are some to choose
    from."""
    affordable = POLICY_SHARE * _multiply_adds(target) / (reads + sum(target.hidden[:-1]) / 2)
    most = min(MOST_GROUPS, max(LEAST_GROUPS, affordable))
    found = []
    for width in target.hidden:
        size = next((size for size in SIZES if activity * width / size >= LEAST_PICKED), SIZES[-1])
        count = math.ceil(width / (size * math.ceil(width / (size * most))))
        found.append(count if count >= LEAST_GROUPS else max(2, min(LEAST_GROUPS, width // NARROWEST)))
    return tuple(found)


def _asked_groups(groups: int | Sequence[int], hidden: Sequence[int]) -> tuple[int, ...]:
    """The groups of each layer that the user asks for."""
    counts = (groups,) * len(hidden) if isinstance(groups, int) else groups
    fits = isinstance(counts, Sequence) and len(counts) == len(hidden)
    if not fits or not all(isinstance(n, int) and 2 <= n <= width for n, width in zip(counts, hidden, strict=True)):
        raise UsageError(f"groups must be from 2 to a layer's neurons ({', '.join(map(str, hidden))}), one number for "
                         f"all layers or one for each, not {groups}")  # fmt: skip
    return tuple(counts)


def pool_of(shape: tuple[int, int, int], most: float) -> Pool | None:
    """How a picture is made smaller, to at most so many numbers; None for what is no picture, or is small."""
    if min(shape[1:]) < 2 or math.prod(shape) <= most:
        return None
    for size in range(2, min(shape[1:]) + 1):
        if not (shape[1] % size or shape[2] % size) and math.prod(shape) // size**2 <= most:
            return Pool(shape, size)
    return None


@torch.no_grad()  # not inference_mode: what is made here is trained later
def prepared(
    target: MLP, examples: Examples, activity: float, groups: int | Sequence[int] | None, seed: int
) -> list[Chosen]:
    """Lazy networks before training, one for each way to spread the activity over the layers, with the partition with
    which an oracle loses least."""
    if min(target.hidden) < 2:
        raise UsageError("a hidden layer of one neuron cannot be cut into groups")
    counts = (
        groups_of(target, min(target.inputs, POOLED[0]), activity)
        if groups is None
        else _asked_groups(groups, target.hidden)
    )
    each = GATE_SHARE * activity * _multiply_adds(target) / counts[0]
    pool = pool_of(examples.data.shape, float(np.clip(each, *POOLED)))
    x = torch.from_numpy(examples.data.valid.x[:JUDGED])
    wanted, found = target(x), []
    partitions = _partitions(target, examples, counts, seed)
    oracles = {name: Oracle(target, partition, pool) for name, partition in partitions.items()}
    for rates in _spreads(target, x, activity):
        lost = {}
        for name, partition in partitions.items():
            ranked = LazyNetwork(target, partition, oracles[name], Budget.of(rates, partition, oracles[name]))
            lost[name] = mse_loss(evaluate(ranked, x).scores, wanted).item()
        name = min(lost, key=lambda name: lost[name])
        draws = torch.Generator().manual_seed(seed)
        policy = Policy(partitions[name], target.inputs, pool, draws)
        lazy = LazyNetwork(target, partitions[name], policy, Sample(draws))
        told = {"partition": name, "groups": list(counts), "pool": pool.size if pool else 0, "rates": rates}
        found.append(Chosen(lazy, rates, told))
    return found


def _spreads(target: MLP, x: Tensor, activity: float) -> list[list[float]]:
    """The layers' shares in each way that is tried, without those that are nearly alike."""
    found: list[list[float]] = []
    for factors in _factors(target, x):
        rates = spread_over(activity, factors, target.hidden)
        if not any(np.allclose(rates, other, rtol=ALIKE) for other in found):
            found.append(rates)
    return found


def _factors(target: MLP, x: Tensor) -> list[list[float]]:
    """Ways to spread an activity over the layers."""
    layers = len(target.hidden)
    places = np.linspace(1, -1, layers) if layers > 1 else np.zeros(1)
    found = [(1 + spread * places).tolist() for spread in SPREADS]
    fired = firing_patterns(target, x).float().mean(0).split(list(target.hidden))
    return [*found, [float(part.mean()) ** FIRING + 1e-3 for part in fired]] if layers > 1 else found[:1]


def _partitions(target: MLP, examples: Examples, counts: Sequence[int], seed: int) -> dict[str, Partition]:
    draws = torch.Generator().manual_seed(seed)
    patterns = firing_patterns(target, torch.from_numpy(examples.data.train.x[:4000]))
    return {
        "coactivation": activation_partition(patterns, target.hidden, counts, draws, "layer"),
        "k-means": weight_partition(target, counts, draws, "layer"),
    }


class _Training(PolicyTraining):
    """Training on the model's own outputs; those that are no scores of classes are kept in the mean square."""

    scores = True
    scale = 1.0  # the outputs' variance
    known: Tensor | None = None  # what the model answers where pictures stay as they are

    def cost(self, found: Evaluation, y: Tensor, wanted: Tensor | None) -> Tensor:
        if self.scores or wanted is None:
            return super().cost(found, y, wanted)
        return (found.scores - wanted).square().mean(1) / self.scale

    def a_step(self, batch: int) -> Callable[[], Tensor]:
        """The loss of one minibatch, to see how long it takes."""
        return lambda: self.loss(torch.arange(batch))

    def follow(self, planned: dict[str, Any], title: str | None = None) -> None:
        """Train for as long as it has been planned, in the words of `fitting.plan`, with a bar of this title."""
        self.settings = {**self.settings, **planned}
        self.run(title)


def trained(
    candidates: Sequence[Chosen],
    target: MLP,
    examples: Examples,
    finetune: bool,
    moved: int,
    seconds: float,
    epochs: int | None,
    seed: int,
    progress: bool,
) -> Chosen:
    """The best of these lazy networks with a trained policy, decided by thresholds or by a budget, whichever keeps more
    on validation data of what `target`, the model as it was, answers; its own is a copy where it is fine-tuned."""
    chosen, started = candidates[0], time.perf_counter()
    if min(chosen.rates) >= 1:
        every = tuple(chosen.lazy.partition.groups_by_gate)
        told = {**chosen.told, "decision": "budget", "epochs": 0, "ended": "", "finetuned": False, "moved": 0}
        return Chosen(decided_by(chosen.lazy, Budget(every)), chosen.rates, told)
    chosen = _best(candidates, target, examples, seconds, epochs, seed)
    seconds -= time.perf_counter() - started
    lazy = chosen.lazy
    if finetune:
        lazy = LazyNetwork(copy.deepcopy(lazy.target), lazy.partition, lazy.policy, lazy.decision)
    phases = _phases(chosen, examples, finetune, moved)
    done, ended = _run(lazy, examples, phases, seconds, epochs, seed, progress)
    name, decided = _decided(lazy, target, examples, chosen.rates)
    told = {"decision": name, "epochs": done, "ended": ended, "finetuned": finetune,
            "moved": moved if finetune else 0}  # fmt: skip
    return Chosen(decided, chosen.rates, {**chosen.told, **told})


def _run(
    lazy: LazyNetwork, examples: Examples, phases: Sequence[Phase], seconds: float, epochs: int | None, seed: int,
    progress: bool,
) -> tuple[int, str]:  # fmt: skip
    """Train `lazy` in place, one phase after the other: the epochs of all of them, and what ended the last one."""
    done, ended, shuffling = 0, "", torch.Generator().manual_seed(seed)
    training, size = None, len(examples.data.train)
    for title, settings, share, most in phases:
        started = time.perf_counter()
        training = _made(lazy, examples, settings, shuffling, training)
        most = most_epochs(most, size, settings["batch"])
        asked = None if epochs is None else min(epochs, WARM) if settings["estimator"] == "cross-entropy" else epochs
        planned = _planned(training, settings["batch"], size, seconds * share, asked, most)
        training.follow(planned, title if progress else None)
        seconds -= time.perf_counter() - started
        done += planned["max_epochs"]
        ended = "epochs" if planned["max_epochs"] in (asked, most) else "seconds"
    return done, ended


def _best(
    candidates: Sequence[Chosen], target: MLP, examples: Examples, seconds: float, epochs: int | None, seed: int
) -> Chosen:
    """The one whose policy loses least after a short training: an oracle's ranking of spreads is not a policy's. The
    loss is the square in the outputs, which tells policies that have learned little apart better than accuracy does."""
    if len(candidates) == 1:
        return candidates[0]
    x, lost, training = torch.from_numpy(examples.data.valid.x), [], None
    wanted, each = scores_of(target, x), seconds * TRIAL_SHARE / (2 * len(candidates))
    for chosen in candidates:
        draws = torch.Generator().manual_seed(seed)
        for _, settings, _, _ in _phases(chosen, examples):
            training = _made(chosen.lazy, examples, settings, draws, training)
            steps = max(1, min(TRIED, len(examples.data.train)) // settings["batch"])
            if epochs is None:
                steps = min(steps, affordable(training.a_step(settings["batch"]), each))
            training.follow({"max_epochs": 1, "epoch_examples": steps * settings["batch"]})
        decided = calibrated(chosen.lazy, x, chosen.rates)
        lost.append(mse_loss(evaluate(decided, x).scores, wanted).item())
    return candidates[int(np.argmin(lost))]


def pixels(examples: Examples, moved: int | None) -> int:
    """By how many pixels pictures are moved while weights are trained: as asked, or by their size."""
    side = min(examples.data.shape[1:])
    if moved is None:
        return 1 + side // 24 if side >= SMALLEST_MOVED else 0
    if not isinstance(moved, int) or moved < 0 or (moved and side < 2):
        shape = list(examples.data.shape)
        raise UsageError(f"moved is by how many pixels images of shape {shape} may be moved, or 0, not {moved}")
    return moved


def _phases(chosen: Chosen, examples: Examples, finetune: bool = False, moved: int = 0) -> list[Phase]:
    """What is trained one after the other."""
    data, labelled = examples.data, examples.labelled
    common = {"tau": _tau(chosen), "rates": chosen.rates, "sparsity": "rate", "lambda_s": 1.0, "learning_rate": RATE,
              "distil": 0.25 if labelled else 1.0, "labels": float(labelled),
              "batch": max(1, min(128, len(data.train) // 20))}  # fmt: skip
    own = {**common, "estimator": "threshold-through", **({"finetune": TUNING_RATE} if finetune else {})}
    if finetune and moved:
        own["augment"] = moved
    return [
        ("policy, after the oracle", {**common, "estimator": "cross-entropy"}, 0.3, WARM),
        ("policy and weights" if finetune else "policy", own, 1.0, TUNED if finetune else LATER),
    ]


def _tau(chosen: Chosen) -> float:
    """The mean share of the layers' neurons."""
    widths = np.array(chosen.lazy.target.hidden, float)
    return float(np.array(chosen.rates) @ widths / widths.sum())


def _made(
    lazy: LazyNetwork, examples: Examples, settings: dict[str, Any], draws: torch.Generator, before: _Training | None
) -> _Training:
    """A training with these settings, which takes over what the one `before` has computed of the same model."""
    first, known = (before.first, before.known) if before else (None, None)
    training = _Training(lazy, examples.data, policy_plan(**settings), draws, first, known, CACHE_BYTES)
    training.scores = examples.scores
    training.known = known if training.wanted is None else training.wanted
    if not examples.scores and training.known is not None:
        training.scale = max(training.known.var(correction=0).item(), 1e-12)
    return training


def most_epochs(most: int, examples: int, batch: int) -> int:
    """`most` epochs, or more where examples are few."""
    return max(most, STEPS * most // (LATER * math.ceil(examples / batch)))


def affordable(step: Callable[[], Tensor], seconds: float) -> int:
    """How many steps of training fit into a time: `step` gives the loss of one."""
    spent = []
    for _ in range(3):  # the first is slower than all others
        started = time.perf_counter()
        step().backward()
        spent.append(time.perf_counter() - started)
    return max(1, int(seconds / (1.3 * min(spent))))


def _planned(
    training: _Training, batch: int, examples: int, seconds: float, epochs: int | None, most: int
) -> dict[str, Any]:
    """How many epochs, of how many examples, fit into a time; as many as asked for where that is given."""
    if epochs is not None:
        return {"max_epochs": epochs}
    steps, whole = affordable(training.a_step(batch), seconds), math.ceil(examples / batch)
    if steps >= whole:
        return {"max_epochs": min(most, steps // whole)}
    return {"max_epochs": 1, "epoch_examples": steps * batch}


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
    return 1 - (mse_loss(scores, wanted) / wanted.var(correction=0).clamp(min=1e-12)).item()
