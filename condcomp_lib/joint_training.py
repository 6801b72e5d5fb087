"""Training of a network and its policy together (*dropout-policies*, section 3.3; *faster-models*, section 3)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from condcomp_lib.datasets import Dataset
from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.estimators import Minibatch, Reinforce, entropy, log_probability
from condcomp_lib.estimators.named import BUDGETED, TUNING
from condcomp_lib.fitting import Fitted, fit
from condcomp_lib.lazy import Evaluation, LazyNetwork, calibrated, decided_by, evaluate
from condcomp_lib.partitions import cut_into_blocks
from condcomp_lib.policies import Blind, Budget, Policy, Pool, Sample, Shared, means_of_runs
from condcomp_lib.policy_training import PolicyTraining, check_learnable, policy_plan, scores_of
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.sparsity import divergence
from condcomp_lib.targets import build_target, hidden_widths, start_glorot
from condcomp_lib.training import CACHE_BYTES, hits, shelf

RECIPE = 1
KL = ("cost", "corrected")
KEEP = ("best", "last")


def joint_plan(
    *,
    network_rate: float = 1e-3,
    l2: float = 0.0,
    dense_epochs: int = 0,
    anneal: int = 0,
    kl: str | None = None,
    to_go: bool = False,
    shared: int | None = None,
    uniform: float | None = None,
    keep: str = "best",
    sampled: bool = False,
    **policy: Any,
) -> dict[str, Any]:
    """The settings of joint training, checked: those of `policy_plan`, whose learning rate is the policy's, and

    - `network_rate`, the learning rate of the network's weights, and `l2`, what their sum of squares adds to the loss;
    - `dense_epochs` in which the network learns alone, evaluated in full, before the policy is switched on;
    - `anneal`: epochs over which the activity that is asked for falls from the whole network to tau, by the same factor
      each, so that all blocks learn from all examples first (counted from the first epoch, `dense_epochs` included);
    - `kl`: lambda_s times the divergence KL(sigma || tau) of each gate as part of REINFORCE's cost, in place of L_b and
      L_e: "cost" as in *dropout-policies*, whose estimate leaves out that sigma depends on the policy directly, or
      "corrected" with that gradient added;
    - `to_go`: a gate learns from what lies after it only, the scores and the divergences of the gates above;
    - `shared`: runs of so many examples of a minibatch share one mask (None: each has its own);
    - `uniform`: with the estimator "dense", block dropout: bits drawn at this rate whatever the input, in training and
      at inference;
    - `keep` the weights of the "best" epoch on validation data, or of the "last";
    - `sampled`: masks are sampled at inference also where `rates` are given (else calibrated to these).

    >>> joint_plan(estimator="threshold-through", tau=0.1)["joint"]["keep"]
    'best'
    """
    if not 0 < network_rate < math.inf:
        raise UsageError(f"the network's learning rate must be a number above 0, not {network_rate}")
    if not 0 <= l2 < math.inf:
        raise UsageError(f"l2 must be a number of at least 0, not {l2}")
    settings = policy_plan(**{"sparsity": "text", **policy})
    reinforce = settings["estimator"] == "reinforce"
    if kl is not None and kl not in KL:
        raise unknown("form of the divergence", kl, KL)
    if keep not in KEEP:
        raise unknown("epoch to keep", keep, KEEP)
    for name, wanted in (("kl", kl), ("to_go", to_go), ("shared", shared)):
        if wanted and not reinforce:
            raise UsageError(f"{name} goes with REINFORCE, not with {settings['estimator']!r}")
    if kl and not 0 < settings["tau"] < 1:
        raise UsageError(f"a divergence needs a base rate between 0 and 1, not {settings['tau']}")
    if shared is not None and (shared < 2 or settings["batch"] % shared):
        raise UsageError(f"a minibatch of {settings['batch']} examples cannot be cut into runs of {shared} that share "
                         "a mask; choose a number of at least 2 that divides it")  # fmt: skip
    if uniform is not None and (settings["estimator"] != "dense" or not 0 < uniform <= 1):
        raise UsageError(f'uniform is a rate in (0, 1] and goes with the estimator "dense"; not {uniform} with '
                         f"{settings['estimator']!r}")  # fmt: skip
    for name, epochs in (("dense_epochs", dense_epochs), ("anneal", anneal)):
        if not 0 <= epochs < settings["max_epochs"]:
            raise UsageError(f"{name} must leave some of the {settings['max_epochs']} epochs, not be {epochs}")
    if kl and anneal:
        raise UsageError("anneal changes the activity that L_b and L_e ask for; a divergence has one base rate, tau")
    for name in ("finetune", "warm_start"):
        if settings.get(name):
            raise UsageError(f"{name} is for a trained target; here the network learns from the start")
    if settings.get("distil") and reinforce:
        raise UsageError("distil goes with estimators that follow the cost's own gradient, not with 'reinforce'")
    own = {"network_rate": network_rate, "l2": l2, "dense_epochs": dense_epochs, "anneal": anneal, "kl": kl,
           "to_go": to_go, "shared": shared, "uniform": uniform, "keep": keep, "sampled": sampled}  # fmt: skip
    return {**settings, "joint": own}


@dataclass(frozen=True)
class JointCurve:
    """Validation accuracy after each epoch, share of the neurons evaluated by hidden layer, and entropy of the mask in
    nats a bit by gate (both empty while the network is evaluated in full); `epoch` (from 1) is the one kept."""

    accuracy: list[float] = field(default_factory=list)
    activity: list[list[float]] = field(default_factory=list)
    entropy: list[list[float]] = field(default_factory=list)
    epoch: int = 0


def train_jointly(
    lazy: LazyNetwork,
    data: Dataset,
    settings: Mapping[str, Any],
    generator: torch.Generator,
    progress: str | None = None,
) -> JointCurve:
    """Train network and policy of `lazy` in place, from the weights they have.

    The weights follow the gradient of the examples' mean cost under their masks, the policy the estimate that its
    estimator makes of it; the sparsity loss is added for both. Estimators from REINFORCE's family see the network as
    given: what a gate reads carries no gradient of log pi. Validation accuracy is that of masks decided as by
    `as_decided`.

    Arguments: `settings` as from `joint_plan`; `generator` shuffles (masks are drawn by the lazy network's decision
    where it samples).
    """
    check_learnable(lazy, min(len(data.train), settings.get("epoch_examples", len(data.train))), settings)
    training = JointTraining(lazy, data, settings, generator)
    fitted = training.fit(progress)
    lazy.target.requires_grad_(False)
    found = training.joint_curve
    return JointCurve(found.accuracy, found.activity, found.entropy, fitted.epoch)


class JointTraining(PolicyTraining):
    """One joint training: what `train_jointly` holds from minibatch to minibatch. `loss` is that of one of them."""

    def __init__(
        self, lazy: LazyNetwork, data: Dataset, settings: Mapping[str, Any], generator: torch.Generator
    ) -> None:
        learning = {**settings, "finetune": settings["joint"]["network_rate"]}
        super().__init__(lazy, data, learning, generator, None, None, CACHE_BYTES)
        self.joint, self.joint_curve, self.final = settings["joint"], JointCurve(), list(self.asked)
        self._ask()
        options = {"baseline": settings.get("baseline", "mean"), **settings.get("options", {})}
        reinforce = settings["estimator"] == "reinforce"
        self.by_gate = [Reinforce(**options) for _ in lazy.policy.gates] if reinforce else []

    def fit(self, progress: str | None) -> Fitted:
        model = nn.ModuleList([self.lazy.policy, self.lazy.target])
        rates = [(self.lazy.target, self.joint["network_rate"])]
        return fit(model, self.loss, self.score, len(self.x), self.settings, self.generator, keep=self.joint["keep"],
                   rates=rates, progress=progress)  # fmt: skip

    @property
    def dense(self) -> bool:
        """Whether the network is evaluated in full: the policy is still switched off, or there is none."""
        alone = self.settings["estimator"] == "dense" and not self.joint["uniform"]
        return alone or len(self.joint_curve.accuracy) < self.joint["dense_epochs"]

    @property
    def annealing(self) -> bool:
        """Whether more is asked for than in the end."""
        return len(self.joint_curve.accuracy) < self.joint["anneal"]

    def _ask(self) -> None:
        """Ask for the activity of the coming epoch, also of the estimator, which holds the same list."""
        done = len(self.joint_curve.accuracy) / self.joint["anneal"] if self.annealing else 1.0
        self.asked[:] = [share**done for share in self.final]

    def loss(self, rows: Tensor) -> Tensor:
        x, y = self.pictures(rows), self.y[rows]
        if self.dense:
            loss = cross_entropy(self.lazy.target(x), y)
        elif self.joint["uniform"]:
            loss = cross_entropy(self.lazy.evaluate(x, None, blind(self.lazy, self.settings)).scores, y)
        elif self.by_gate:
            loss = self._reinforced(x, y)
        else:
            loss = self._estimated(x, y, self.taught(rows, x))
        return loss + self._decay()

    def _estimated(self, x: Tensor, y: Tensor, wanted: Tensor | None) -> Tensor:
        """The estimator's loss, and for estimators that leave the network as it is the mean cost for its weights."""
        tuning = self.settings["estimator"] in TUNING
        minibatch = Minibatch(self.lazy, x, lambda found: self.cost(found, y, wanted), None, through=tuning)
        found = self.estimator(minibatch, self.drawing)
        loss = found.loss if tuning else found.loss + self.cost(found.found, y, wanted).mean()
        return loss + self.sparsity(found.found)

    def _reinforced(self, x: Tensor, y: Tensor) -> Tensor:
        """REINFORCE for each gate, the mean cost for the network's weights, and the sparsity loss."""
        size = self.joint["shared"]
        decision = Shared(Sample(self.drawing), size) if size else Sample(self.drawing)
        found = self.lazy.evaluate(x, None, decision, through=False)
        costs = self.cost(found, y, None)
        loss, later = costs.mean(), costs.detach()
        logits, masks = self.lazy.partition.by_gate(found.logits), self.lazy.partition.by_gate(found.mask)
        weight = self.settings["lambda_s"] if self.joint["kl"] else 0.0
        diverged = [weight * divergence(one.sigmoid(), self.settings["tau"]) for one in logits] if weight else []
        whole = later + sum(one.detach() for one in diverged)
        for gate in reversed(range(len(logits))):
            own = later if self.joint["to_go"] else whole
            loss = loss + self._scored(self.by_gate[gate], own, logits[gate], masks[gate])
            later = later + diverged[gate].detach() if diverged else later
        if self.joint["kl"] == "corrected":
            loss = loss + sum(one.mean() for one in diverged)
        return loss if self.joint["kl"] else loss + self.sparsity(found)

    def _scored(self, reinforce: Reinforce, costs: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        if size := self.joint["shared"]:
            costs, logits, mask = means_of_runs(costs, size), means_of_runs(logits, size), mask[::size]
        loss = reinforce.loss(costs, log_probability(logits, mask))
        return loss - reinforce.entropy_weight * entropy(logits).mean() if reinforce.entropy_weight else loss

    def _decay(self) -> Tensor:
        if not self.joint["l2"]:
            return torch.zeros(())
        return self.joint["l2"] * torch.stack([layer.weight.square().sum() for layer in self.lazy.target.linears]).sum()

    def score(self) -> float:
        early = self.dense or self.annealing
        found = self._validated()
        self._ask()
        # Whatever it is worth, no epoch that asks for what is asked for in the end is worth less.
        return found - 1 if early and self.settings["estimator"] != "dense" else found

    def _validated(self) -> float:
        """Validation accuracy, put into the curve with the activity and the entropy."""
        x, curve = torch.from_numpy(self.data.valid.x), self.joint_curve
        if self.dense:
            found = hits(scores_of(self.lazy.target, x), self.data.valid)
            curve.activity.append([])
            curve.entropy.append([])
            curve.accuracy.append(found)
            return found
        more = {"rates": self.asked} if self.annealing and "rates" in self.settings else {}
        decided = as_decided(self.lazy, x, {**self.settings, **more})
        evaluated = evaluate(decided, x)
        curve.accuracy.append(hits(evaluated.scores, self.data.valid))
        curve.activity.append(activity_by_layer(decided, evaluated))
        curve.entropy.append([(entropy(part) / part.shape[1]).mean().item()
                              for part in self.lazy.partition.by_gate(evaluated.logits)])  # fmt: skip
        return curve.accuracy[-1]


def as_decided(lazy: LazyNetwork, x: Tensor, settings: Mapping[str, Any]) -> LazyNetwork:
    """`lazy` as it is evaluated: by the budget that it was trained with; or by thresholds calibrated on `x` (float32,
    examples x features) to the settings' `rates`; else with sampled masks, shared or uniform as they were in training.
    """
    if settings["joint"]["uniform"]:
        return decided_by(lazy, blind(lazy, settings))
    if settings["estimator"] in BUDGETED:
        asked = settings.get("rates", (settings["tau"],) * len(lazy.policy.gates))
        return decided_by(lazy, Budget.of(tuple(asked), lazy.partition, lazy.policy))
    if "rates" in settings and not settings["joint"]["sampled"]:
        return calibrated(lazy, x, settings["rates"])
    return decided_by(lazy, Shared(lazy.decision, settings["joint"]["shared"])) if settings["joint"]["shared"] else lazy


def blind(lazy: LazyNetwork, settings: Mapping[str, Any]) -> Blind:
    """Block dropout: every block of the network is kept with the same probability, drawn by its own generator."""
    if not isinstance(lazy.decision, Sample):
        raise UsageError(f"blocks are dropped by sampling, not by a {type(lazy.decision).__name__}; give training a "
                         "lazy network that decides by Sample")  # fmt: skip
    rates = [torch.zeros(lazy.partition.groups) for _ in lazy.policy.gates]
    for rate, count in zip(rates, lazy.partition.groups_by_gate, strict=True):
        rate[:count] = settings["joint"]["uniform"]
    return Blind(tuple(rates), lazy.decision.generator)


def activity_by_layer(lazy: LazyNetwork, found: Evaluation) -> list[float]:
    """Share of each hidden layer's neurons that an evaluation took."""
    neurons = lazy.partition.neurons(found.mask).mean(0)
    return (neurons / neurons.new_tensor(lazy.partition.widths)).tolist()


def joint_spec(
    dataset: str,
    architecture: str,
    block: int,
    *,
    seed: int,
    start: float | None = None,
    glorot: bool = False,
    always_on: bool = False,
    pool: int = 0,
    limits: Sequence[float] | None = None,
    trained: Mapping[str, Any] | None = None,
    **training: Any,
) -> RunSpec:
    """The run that trains one network and its policy together.

    Arguments: `dataset` and `architecture` by name ("svhn", "208-128", see `build_target`); `block` neurons (or
    filters) that share a bit, 1 for single units; `seed` of weights, masks and shuffling; `start` the rate that gates
    start at (None: their biases are drawn like weights); `glorot` draws weights by Glorot's heuristic; `always_on`
    keeps each layer's first block on, whatever the input; `pool` pixels a side that are averaged for the first gate (0:
    it reads the input); `limits` of the probabilities, see `Policy`; `trained` how the network is trained alone before
    (as for `joint_plan`, estimator "dense"; None: not at all); `training` as for `joint_plan`.
    """
    cut_into_blocks(hidden_widths(architecture), block)
    if training.get("distil") and not trained:
        raise UsageError("distil has the network as it was trained alone for its teacher: say by `trained` how")
    more = {"pool": pool, "limits": limits and list(limits), "trained": trained and joint_plan(**trained)}
    settings = {"dataset": dataset, "architecture": architecture, "block": block, "seed": seed, "start": start,
                "glorot": glorot, "always_on": always_on, **{name: own for name, own in more.items() if own},
                **joint_plan(**training)}  # fmt: skip
    return RunSpec("joint-networks", RECIPE, settings)


def build_jointly(spec: RunSpec, data: Dataset, draws: torch.Generator) -> LazyNetwork:
    """The untrained lazy network of `spec`; `draws` its weights, and later samples its masks."""
    settings = spec.settings
    target = build_target(settings["architecture"], data.shape, data.classes, draws)
    if settings["glorot"]:
        start_glorot(target, draws)
    partition = cut_into_blocks(target.hidden, settings["block"])
    pool, limits = settings.get("pool"), settings.get("limits")
    inputs, made = (target.inputs, Pool(data.shape, pool)) if pool else (target.reads[0], None)
    policy = Policy(partition, inputs, made, draws, settings["always_on"], limits and tuple(limits))
    if settings["start"] is not None:
        policy.start_at(settings["start"])
    return LazyNetwork(target, partition, policy, Sample(draws))


def _alone(spec: RunSpec) -> RunSpec:
    """The run that trains the network of `spec` without its policy."""
    kept = {key: spec.settings[key] for key in ("dataset", "architecture", "block", "seed", "glorot")}
    return RunSpec(spec.study, RECIPE, {**kept, "start": None, "always_on": False, **spec.settings["trained"]})


def obtain_jointly(spec: RunSpec, data: Dataset, artefacts: RunStore) -> tuple[LazyNetwork, Record]:
    """The trained lazy network of `spec`, from the artefact cache or trained now, decided as in its validation, and its
    record."""
    draws = torch.Generator().manual_seed(spec.settings["seed"])
    lazy = build_jointly(spec, data, draws)
    learned = nn.ModuleList([lazy.policy, lazy.target])

    def compute(wanted: RunSpec) -> Outcome:
        if "trained" in wanted.settings:
            lazy.target.load_state_dict(obtain_jointly(_alone(wanted), data, artefacts)[0].target.state_dict())
        curve = train_jointly(lazy, data, wanted.settings, torch.Generator().manual_seed(wanted.settings["seed"]))
        weights = {name: np.asarray(tensor) for name, tensor in learned.state_dict().items()}
        return Outcome(dataclasses.asdict(curve), weights, {"note": data.note, "checksum": data.checksum})

    record = shelf(artefacts, data).obtain(spec, compute)
    learned.load_state_dict({name: torch.from_numpy(array) for name, array in record.arrays().items()})
    lazy.target.requires_grad_(False)
    draws.manual_seed(spec.settings["seed"])  # the same masks whether it was trained now or before
    return as_decided(lazy, torch.from_numpy(data.valid.x), spec.settings), record
