"""Gumbel-Softmax: the partition is learned by gradient together with the policy (*partitions*, section 2.3)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, softmax

from condcomp_lib.datasets import Dataset
from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.estimators import Estimator, Minibatch, Reinforce
from condcomp_lib.estimators.dpg import DPG
from condcomp_lib.fitting import fit
from condcomp_lib.lazy import Evaluation, LazyNetwork, evaluate
from condcomp_lib.partitioners import check_cut, check_worth
from condcomp_lib.partitions import Partition, check_groups
from condcomp_lib.policies import Decision, Sample
from condcomp_lib.policy_training import PolicyCurve, check_learnable
from condcomp_lib.sparsity import sparsity_loss
from condcomp_lib.training import hits

EPS = 1e-20  # inside the logarithms of the Gumbel noise
SCALE = 10.0  # preferences are stored divided by it: the optimiser's steps on them are as much larger
LEAST_TEMPERATURE = 0.1
# How the policy learns beside the preferences: what *partitions* compares.
LEARNING: dict[str, Callable[..., Estimator]] = {
    "reinforce": Reinforce,
    "dpg": DPG,
    "dpg-bits": functools.partial(DPG, reads="bits"),
}
# Temperature and size of the noise at a share of the training done. "constant" is the paper's; "annealed" lowers the
# temperature, which sharpens the gradient but not the draws; "annealed-noise" makes the draws themselves settle.
SCHEDULES: dict[str, Callable[[float], tuple[float, float]]] = {
    "constant": lambda _: (1.0, 1.0),
    "annealed": lambda done: (LEAST_TEMPERATURE**done, 1.0),
    "annealed-noise": lambda done: (1.0, 1.0 - done),
}


class Gumbel(nn.Module):
    """A vector of preferences mu_i over the groups for each neuron, from which its group is drawn.

    `propose` draws a partition, `best` takes each neuron's most preferred group; learning is by `train_gumbel`, so
    `update` changes nothing.

    Arguments: `widths` neurons of each hidden layer; `groups` k; `generator` draws the first preferences, which are
    near zero; `scope` as for `Partition`.
    """

    def __init__(
        self, widths: Sequence[int], groups: int, generator: torch.Generator | None = None, scope: str = "network"
    ) -> None:
        super().__init__()
        check_groups(widths, groups, scope)
        self.groups, self.scope = groups, scope
        self._scaled = nn.ParameterList(0.01 / SCALE * torch.randn(w, groups, generator=generator) for w in widths)

    @property
    def preferences(self) -> list[Tensor]:
        """mu (float32, neurons x groups) of each hidden layer."""
        return [SCALE * scaled for scaled in self._scaled]

    def draw(self, generator: torch.Generator, temperature: float = 1.0, noise: float = 1.0) -> list[Tensor]:
        """For each hidden layer the drawn groups as one-hot rows (float32, neurons x groups), with the gradient of
        softmax((mu + g) / temperature), g Gumbel noise times `noise`: the straight-through form of section 2.3."""
        if not temperature > 0 or not noise >= 0:
            raise UsageError(f"temperature must be above 0 and noise at least 0, not {temperature} and {noise}")
        return [straight_through(mu, generator, temperature, noise) for mu in self.preferences]

    def propose(self, generator: torch.Generator) -> Partition:
        """See `Partitioner`."""
        with torch.no_grad():  # the draw alone, which is the same at every temperature: no softmax, no one-hot rows
            drawn = [(mu + gumbel_noise(mu, generator)).argmax(1) for mu in self.preferences]
        return Partition(tuple(drawn), self.groups, self.scope)

    def update(self, partition: Partition, worth: float) -> None:  # noqa: ARG002 (it learns by gradient)
        """See `Partitioner`; checks the worth and learns nothing."""
        check_worth(worth)

    def best(self) -> Partition:
        """Each neuron in the group it prefers most."""
        return Partition(tuple(mu.detach().argmax(1) for mu in self.preferences), self.groups, self.scope)


def straight_through(mu: Tensor, generator: torch.Generator, temperature: float, noise: float = 1.0) -> Tensor:
    """yhat = (onehot(argmax y) - y) held constant + y, with y = softmax((mu + g) / temperature)."""
    y = softmax((mu + noise * gumbel_noise(mu, generator)) / temperature, 1)
    return (one_hot(y.argmax(1), mu.shape[1]) - y).detach() + y


def gumbel_noise(mu: Tensor, generator: torch.Generator) -> Tensor:
    """g = -log(-log(u)) with u ~ U[0, 1], of the shape of `mu`."""
    u = torch.rand(mu.shape, generator=generator)
    return -torch.log(-torch.log(u + EPS) + EPS)


def gumbel_scores(
    lazy: LazyNetwork, drawn: Sequence[Tensor], x: Tensor, first: Tensor | None = None, decision: Decision | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, mask and logits of `lazy` when its partition is `drawn` (as from `Gumbel.draw`); `decision` decides in
    place of the network's own.

    The mask of neuron i is sum_j yhat_ij M_j, so the scores have a gradient in the preferences; none in the policy.
    """
    h, masks, logits, decision = x, [], [], decision or lazy.decision
    for index, layer in enumerate(lazy.mlp.linears[:-1]):
        if index < len(lazy.policy.gates):
            logits.append(lazy.policy.logits(index, h.detach()))
            masks.append(decision(logits[-1], index))
        kept = masks[-1].to(h.dtype) @ drawn[index].T
        h = lazy.target.activation(first if index == 0 and first is not None else layer(h)) * kept
        if lazy.rescale == "activity":
            h = h / kept.mean(1, keepdim=True).clamp(min=1 / kept.shape[1])
    return lazy.target.linears[-1](h), torch.cat(masks, 1), torch.cat(logits, 1)


class _Drawn:
    """What an estimator evaluates: the lazy network under partitions that are drawn anew for each minibatch."""

    def __init__(self, lazy: LazyNetwork, drawn: Sequence[Tensor]) -> None:
        self.policy, self._lazy, self._drawn = lazy.policy, lazy, drawn

    def evaluate(
        self, x: Tensor, first: Tensor | None = None, decision: Decision | None = None, *, through: bool = True
    ) -> Evaluation:
        if not through:
            raise UsageError("the target is frozen while a partition is learned: there is no gradient to stop")
        return Evaluation(*gumbel_scores(self._lazy, self._drawn, x, first, decision))


def train_gumbel(
    gumbel: Gumbel,
    lazy: LazyNetwork,
    data: Dataset,
    settings: Mapping[str, Any],
    generator: torch.Generator,
    *,
    first: Tensor | None = None,
    progress: str | None = None,
) -> PolicyCurve:
    """Train preferences and the policy of `lazy` together, in place; the target is frozen.

    One partition is drawn for each minibatch. The policy learns as in `train_policy`, by REINFORCE or by DPG; the
    preferences follow the gradient of the lazy network's loss through the straight-through draws. Neither is told how
    many neurons a group holds, so nothing keeps the groups balanced, as in the paper.

    Arguments: `settings` as from `policy_plan`, with "gumbel" one of SCHEDULES ("constant" if not given); `generator`
    shuffles and draws; `first` the first layer's pre-activations of the training data (float32, examples x neurons)
    where known.
    Returns accuracy and activity on validation data after each epoch, partitions and masks drawn.
    """
    schedule = settings.get("gumbel", "constant")
    if schedule not in SCHEDULES:
        raise unknown("Gumbel schedule", schedule, SCHEDULES)
    check_cut(lazy.partition, [len(mu) for mu in gumbel.preferences], gumbel.groups, gumbel.scope)
    for unused in ("controller", "sparsity", "rates", "computation", "distil", "augment", "warm_start", "finetune"):
        if settings.get(unused):
            raise UsageError(f"Gumbel-Softmax is trained on labels with a fixed lambda_s; leave out {unused!r}")
    if lazy.rescale == "sigma":
        raise UsageError('Gumbel-Softmax takes rescale "none" or "activity", not "sigma"')
    examples = min(len(data.train), settings.get("epoch_examples", len(data.train)))
    check_learnable(lazy, examples, settings)
    lazy.target.requires_grad_(False)
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    name = settings.get("estimator", "reinforce")
    if name not in LEARNING:
        raise unknown("estimator for Gumbel-Softmax", name, LEARNING)
    options = dict(settings.get("options", {})) | ({"baseline": settings["baseline"]} if name == "reinforce" else {})
    estimator = LEARNING[name](**options)
    drawing = lazy.decision.generator if isinstance(lazy.decision, Sample) else generator
    steps = settings["max_epochs"] * -(-examples // settings["batch"])
    curve, step = PolicyCurve([], []), 0

    def loss(rows: Tensor) -> Tensor:
        nonlocal step
        drawn = gumbel.draw(generator, *SCHEDULES[schedule](step / steps))
        step += 1
        labels = y[rows]
        minibatch = Minibatch(
            _Drawn(lazy, drawn),  # type: ignore[arg-type]
            x[rows],
            lambda found: cross_entropy(found.scores, labels, reduction="none"),
            None if first is None else first[rows],
        )
        found = estimator(minibatch, drawing)
        sigma = found.found.logits.sigmoid()
        sparsity = sparsity_loss(sigma, settings["tau"], settings["lambda_s"], settings["lambda_v"])
        return found.loss + sparsity + cross_entropy(found.found.scores, labels)

    def score() -> float:
        noise = SCHEDULES[schedule](step / steps)[1]
        drawn = gumbel.propose(generator) if noise else gumbel.best()
        network = LazyNetwork(lazy.target, drawn, lazy.policy, lazy.decision, lazy.rescale)
        found = evaluate(network, torch.from_numpy(data.valid.x))
        curve.accuracy.append(hits(found.scores, data.valid))
        curve.activity.append(drawn.activity(found.mask).mean().item())
        return curve.accuracy[-1]

    fit(nn.ModuleList([lazy.policy, gumbel]), loss, score, len(x), settings, generator, keep="last", progress=progress)
    return curve
