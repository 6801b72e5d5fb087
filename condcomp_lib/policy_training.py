"""Training of policies: on a frozen target, or with its weights fine-tuned under the policy's masks."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from condcomp_lib.datasets import Dataset
from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.estimators import Minibatch, Reinforce, named
from condcomp_lib.estimators.named import BUDGETED, ESTIMATORS, SUPERVISED, TUNING, check_options
from condcomp_lib.fitting import fit, plan
from condcomp_lib.lazy import Evaluation, LazyNetwork, calibrated, evaluate
from condcomp_lib.oracle import Oracle
from condcomp_lib.policies import Sample, asked_by_gate
from condcomp_lib.pretraining import shifted
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.sparsity import FORMS, check_tau, gated_loss, sparsity_loss
from condcomp_lib.training import CACHE_BYTES, TEMPERATURE, first_layer, hits, shelf

POLICY_RECIPE = 1
MOST_WEIGHT = 1e4  # of the sparsity terms under a controller


@dataclass(frozen=True)
class PolicyCurve:
    """Validation accuracy and activity after each epoch of policy training: masks sampled, or decided by thresholds
    calibrated to the `rates` that the settings ask for."""

    accuracy: list[float]
    activity: list[float]


def policy_plan(
    *,
    estimator: str = "reinforce",
    baseline: str = "mean",
    tau: float = 0.25,
    lambda_s: float = 1.0,
    lambda_v: float = 0.0,
    controller: float = 0.0,
    **more: Any,
) -> dict[str, Any]:
    """The settings of policy training, checked: the estimator (REINFORCE with its `baseline` unless another of
    ESTIMATORS is named), the sparsity target `tau` with the weights of L_b + L_e and L_v, and `more`: any of the
    settings below, and those of `plan`.

    With `controller` above 0, `lambda_s` is only where its weight starts: after each minibatch it is multiplied by
    exp(controller * (activity - tau)), so that the share of neurons evaluated, not only of groups, comes to tau. While
    a policy is saturated the weight winds up, to MOST_WEIGHT at most, and then holds groups close to tau.

    `options` of the estimator by name; `sparsity` one of `sparsity.FORMS` gate by gate ("text" where only rates are
    given), with `rates` the sparsity target of each gate in place of tau; `computation` the weight of the share of
    multiply-adds in an example's cost; `distil` the weight in it of the divergence from the target's scores; `labels`
    that of the label's negative log likelihood (1); `augment` pixels by which pictures are moved; `warm_start` epochs
    of cross-entropy to the oracle's groups before; `finetune` a learning rate of the target's weights (None: frozen).

    >>> policy_plan(epochs=5)["tau"]
    0.25
    """
    check_tau(tau)
    own = {key: more.pop(key) for key in _MORE if key in more}
    _check_more(estimator, own)
    if estimator == "reinforce":
        Reinforce(baseline, **own.get("options", {}))
    for name, value in (("lambda_s", lambda_s), ("lambda_v", lambda_v), ("controller", controller)):
        if not 0 <= value < math.inf:
            raise UsageError(f"{name} must be a number of at least 0, not {value}")
    if controller and not lambda_s:
        raise UsageError("a controller multiplies lambda_s, which must then start above 0")
    found = {"estimator": estimator, **({"baseline": baseline} if estimator == "reinforce" else {})}
    sparsity = {"tau": tau, "lambda_s": lambda_s, "lambda_v": lambda_v}
    return {**found, **sparsity, **({"controller": controller} if controller else {}), **own, **plan(**more)}


_MORE = ("options", "sparsity", "rates", "computation", "distil", "labels", "augment", "warm_start", "finetune")
_WEIGHTS = ("computation", "distil", "labels", "augment", "warm_start", "finetune")


def _check_more(estimator: str, own: Mapping[str, Any]) -> None:
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ESTIMATORS)
    if own.get("finetune") and estimator not in TUNING:
        raise UsageError(f"the target's weights learn with {', '.join(TUNING)} only, not with {estimator!r}")
    if own.get("sparsity", "text") not in FORMS:
        raise unknown("form of the sparsity loss", own["sparsity"], FORMS)
    if not isinstance(own.get("rates", ()), Sequence):
        raise UsageError(f"rates must be a list with one sparsity target for each gate, not {own['rates']}")
    for rate in own.get("rates", ()):
        check_tau(rate)
    for name in _WEIGHTS:
        if not 0 <= (own.get(name) or 0) < math.inf:
            raise UsageError(f"{name} must be a number of at least 0, not {own[name]}")
    for name in ("augment", "warm_start"):
        if not isinstance(own.get(name, 0), int):
            raise UsageError(f"{name} must be a whole number, not {own[name]}")
    check_options(estimator, own.get("options", {}))


def train_policy(
    lazy: LazyNetwork,
    data: Dataset,
    settings: Mapping[str, Any],
    generator: torch.Generator,
    *,
    first: Tensor | None = None,
    cache_bytes: int = CACHE_BYTES,
    progress: str | None = None,
) -> PolicyCurve:
    """Train the policy of `lazy` in place by the estimator of `settings` on the cost of the lazy network.

    The cost of an example is its negative log likelihood under the mask (and what `policy_plan` adds to it). The
    sparsity loss is added and follows its own gradient, with relaxed bits in place of probabilities where there are any
    (not for supervised routers, which learn a fixed number of groups, nor for "dense"). The last epoch's policy is
    kept: one chosen by accuracy alone would be one of high activity. The target is frozen, and the first layer's
    pre-activations are computed once where they fit into `cache_bytes`; with `finetune` its weights are trained, too.

    Arguments: `settings` as from `policy_plan`; `generator` shuffles (masks are drawn by the lazy network's decision
    where it samples); `first` those pre-activations of the training data where known already, as from `first_layer`.
    """
    check_learnable(lazy, min(len(data.train), settings.get("epoch_examples", len(data.train))), settings)
    if not settings.get("warm_start"):
        return PolicyTraining(lazy, data, settings, generator, first, None, cache_bytes).run(progress)
    before = {**settings, "estimator": "cross-entropy", "max_epochs": settings["warm_start"], "options": {}}
    without = ("finetune", "warm_start", "computation", "controller")
    warm = PolicyTraining(lazy, data, {key: value for key, value in before.items() if key not in without}, generator,
                     first, None, cache_bytes)  # fmt: skip
    curve = warm.run(progress)
    after = PolicyTraining(lazy, data, settings, generator, warm.first, warm.wanted, cache_bytes).run(progress)
    return PolicyCurve(curve.accuracy + after.accuracy, curve.activity + after.activity)


class PolicyTraining:
    """One training of a policy: what `train_policy` holds from minibatch to minibatch."""

    def __init__(
        self,
        lazy: LazyNetwork,
        data: Dataset,
        settings: Mapping[str, Any],
        generator: torch.Generator,
        first: Tensor | None,
        wanted: Tensor | None,
        cache_bytes: int,
    ) -> None:
        self.lazy, self.data, self.settings, self.generator = lazy, data, settings, generator
        self.asked = list(asked_by_gate(settings.get("rates", settings["tau"]), len(lazy.policy.gates)))
        options = dict(settings.get("options", {}))
        if settings["estimator"] == "reinforce":
            options["baseline"] = settings["baseline"]
        self.estimator = ESTIMATORS[settings["estimator"]](options, lazy, self.asked)
        self.lambda_s, self.tuned = settings["lambda_s"], settings.get("finetune")
        self.drawing = lazy.decision.generator if isinstance(lazy.decision, Sample) else generator
        lazy.target.requires_grad_(bool(self.tuned))
        self.x, self.y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
        self.teacher = copy.deepcopy(lazy.target).requires_grad_(False) if settings.get("distil") else None
        self.wanted = None  # the teacher's scores, where pictures stay as they are
        if self.teacher is not None and not settings.get("augment"):
            self.wanted = scores_of(self.teacher, self.x) if wanted is None else wanted
        frozen = not self.tuned and not settings.get("augment")
        self.first = (first_layer(lazy.target, self.x, cache_bytes) if first is None else first) if frozen else None
        valid = torch.from_numpy(data.valid.x)
        self.first_valid = None if self.tuned else first_layer(lazy.target, valid, cache_bytes)
        self.curve = PolicyCurve([], [])

    def run(self, progress: str | None) -> PolicyCurve:
        model = nn.ModuleList([self.lazy.policy, self.lazy.target]) if self.tuned else self.lazy.policy
        rates = [(self.lazy.target, self.tuned)] if self.tuned else []
        fit(model, self.loss, self.score, len(self.x), self.settings, self.generator, keep="last", rates=rates,
            progress=progress)  # fmt: skip
        self.lazy.target.requires_grad_(False)
        return self.curve

    def loss(self, rows: Tensor) -> Tensor:
        x, y = self.pictures(rows), self.y[rows]
        known = None if self.first is None else self.first[rows]
        wanted = self.taught(rows, x)
        found = self.estimator(Minibatch(self.lazy, x, lambda found: self.cost(found, y, wanted), known), self.drawing)
        if self.settings["estimator"] in (*SUPERVISED, "dense"):
            return found.loss
        return found.loss + self.sparsity(found.found)

    def taught(self, rows: Tensor, x: Tensor) -> Tensor | None:
        """The teacher's scores of the examples with these numbers, whose pictures are `x`; None without a teacher."""
        if self.wanted is not None:
            return self.wanted[rows]
        with torch.no_grad():
            return None if self.teacher is None else self.teacher(x)

    def pictures(self, rows: Tensor) -> Tensor:
        """The examples with these numbers, moved where the settings say so."""
        if not self.settings.get("augment"):
            return self.x[rows]
        return shifted(self.x[rows], self.data.shape, self.settings["augment"], self.generator)

    def cost(self, found: Evaluation, y: Tensor, wanted: Tensor | None) -> Tensor:
        """Each example's cost (float32): label, divergence from the target's scores, computation."""
        costs = cross_entropy(found.scores, y, reduction="none") * self.settings.get("labels", 1.0)
        if wanted is not None:
            ours, theirs = (log_softmax(scores / TEMPERATURE, 1) for scores in (found.scores, wanted))
            soft = kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
            costs = costs + self.settings["distil"] * TEMPERATURE**2 * soft
        if self.settings.get("computation"):
            costs = costs + self.settings["computation"] * self.lazy.computes(found.mask).to(costs.dtype)
        return costs

    def sparsity(self, found: Evaluation) -> Tensor:
        settings = self.settings
        if "controller" in settings:
            before, over = self.lambda_s, self.lazy.partition.activity(found.mask).mean().item() - settings["tau"]
            self.lambda_s = min(MOST_WEIGHT, before * math.exp(min(1.0, settings["controller"] * over)))
            return self._sparsity(found, before)
        return self._sparsity(found, self.lambda_s)

    def _sparsity(self, found: Evaluation, lambda_s: float) -> Tensor:
        if not {"sparsity", "rates"} & set(self.settings):
            return sparsity_loss(found.logits.sigmoid(), self.settings["tau"], lambda_s, self.settings["lambda_v"])
        form, by_gate = self.settings.get("sparsity", "text"), self.lazy.partition.by_gate
        if self.settings["estimator"] in BUDGETED:
            counts = named.counts(self.lazy, self.asked)
            held = [self._picked(logits, count) for logits, count in zip(by_gate(found.logits), counts, strict=True)]
        elif found.mask.requires_grad and form != "kl":
            # The bits themselves where they have a gradient: what is evaluated, not how likely it is. A divergence
            # needs probabilities: at 0 or 1 it has no gradient.
            held = by_gate(found.mask)
        else:
            held = by_gate(found.logits.sigmoid())
        return gated_loss(held, self.asked, form, lambda_s, self.settings["lambda_v"])

    def _picked(self, logits: Tensor, count: int) -> Tensor:
        """About how often a gate picks each group: `count` times the softmax of the logits."""
        if self.lazy.policy.always_on:
            return torch.cat([torch.ones_like(logits[:, :1]), (count - 1) * logits[:, 1:].softmax(1)], 1)
        return count * logits.softmax(1)

    def score(self) -> float:
        x, lazy = torch.from_numpy(self.data.valid.x), self.lazy
        if "rates" in self.settings:
            lazy = calibrated(lazy, x, self.settings["rates"], self.first_valid)
        found = evaluate(lazy, x, self.first_valid)
        self.curve.accuracy.append(hits(found.scores, self.data.valid))
        self.curve.activity.append(lazy.partition.activity(found.mask).mean().item())
        return self.curve.accuracy[-1]


@torch.no_grad()
def scores_of(target: nn.Module, x: Tensor) -> Tensor:
    """The target's scores (float32, examples x classes) of `x` (float32, examples x features), in minibatches."""
    return torch.cat([target(part) for part in x.split(2048)])


def check_learnable(lazy: LazyNetwork, examples: int, settings: Mapping[str, Any]) -> None:
    """Raise UsageError when the policy of `lazy` could not be trained with these settings on so many examples."""
    estimator = settings.get("estimator", "reinforce")
    needs = [f"baseline {settings['baseline']!r}"] if settings.get("baseline") in ("mean", "leave-one-out") else []
    needs += ["L_v"] if settings["lambda_v"] else []
    if examples % settings["batch"] == 1 and needs:
        raise UsageError(f"{examples} examples in batches of {settings['batch']} leave a last batch of one, for "
                         f"which {needs[0]} says nothing; choose another batch")  # fmt: skip
    if isinstance(lazy.policy, Oracle):
        raise UsageError("an oracle has nothing to learn; give it a lazy network with a Policy")
    if (estimator != "reinforce" or settings.get("warm_start")) and lazy.rescale == "sigma":
        raise UsageError(f'rescale "sigma" goes with REINFORCE from the start only, not with {estimator!r}')
    if estimator == "reinforce" and not isinstance(lazy.decision, Sample):
        raise UsageError(f"REINFORCE learns from sampled masks, not from a {type(lazy.decision).__name__}; give it a "
                         "lazy network that decides by Sample")  # fmt: skip


def obtain_policy(spec: RunSpec, lazy: LazyNetwork, data: Dataset, artefacts: RunStore) -> Record:
    """Give `lazy` the trained policy of `spec` in place, from the artefact cache or trained now; return its record.

    `spec.settings` holds what `policy_plan` returns, the "policy_seed" that shuffles, and whatever else made `lazy`
    what it is: its target, partition and rescaling. Where weights are fine-tuned, the target gets them in place, too.
    """
    learned: nn.Module = nn.ModuleList([lazy.policy, lazy.target]) if spec.settings.get("finetune") else lazy.policy

    def compute(wanted: RunSpec) -> Outcome:
        shuffling = torch.Generator().manual_seed(wanted.settings["policy_seed"])
        curve = train_policy(lazy, data, wanted.settings, shuffling)
        weights = {name: np.asarray(tensor) for name, tensor in learned.state_dict().items()}
        result = {"accuracy_curve": curve.accuracy, "activity_curve": curve.activity, "epochs": len(curve.accuracy)}
        return Outcome(result, weights, {"note": data.note, "checksum": data.checksum})

    record = shelf(artefacts, data).obtain(spec, compute)
    learned.load_state_dict({name: torch.from_numpy(array) for name, array in record.arrays().items()})
    return record
