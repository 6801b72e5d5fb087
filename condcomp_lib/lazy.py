"""Lazy networks: a target evaluated only where a policy's mask says, with exact accounting of what that costs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.partitions import Partition
from condcomp_lib.policies import Decision, Policy, Sample, Threshold, asked_by_gate, level_for
from condcomp_lib.targets import MLP

RESCALES = ("none", "activity", "sigma")
LEAST_SIGMA = 0.01  # "sigma" never multiplies by more than 100
FLOAT_BYTES = 4


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a lazy network computed: `scores` (float32, examples x classes), `mask` (bool, examples x bits), `logits`
    of the policy (float32, examples x bits)."""

    scores: Tensor
    mask: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Cost:
    """Means over examples of what one example costs when it is evaluated alone.

    `neurons` by hidden layer; `multiply_adds` and `bytes` (float32 weights and biases that are read) by weight layer;
    `policy_multiply_adds` and `policy_bytes` by gate. Biases and rescaling are no multiply-adds; pooling counts one for
    each feature.
    """

    neurons: tuple[float, ...]
    multiply_adds: tuple[float, ...]
    bytes: tuple[float, ...]
    policy_multiply_adds: tuple[float, ...] = ()
    policy_bytes: tuple[float, ...] = ()

    @property
    def total_multiply_adds(self) -> float:
        """Multiply-adds of all layers and gates."""
        return sum(self.multiply_adds) + sum(self.policy_multiply_adds)

    @property
    def total_bytes(self) -> float:
        """Bytes of all layers and gates."""
        return sum(self.bytes) + sum(self.policy_bytes)


class LazyNetwork(nn.Module):
    """A target, a partition and a policy: Z = <T, pi, P> (*partitions*, section 3). This is the reference evaluation.

    It computes every neuron and then masks, which defines the outputs; `cost` says what an evaluation of only the
    chosen neurons takes.

    Arguments: `decision` turns the policy's logits into bits; `rescale` what kept activations are multiplied with:
    "none" nothing; "activity" one over the share of the layer's neurons that this example evaluates (how inverted
    dropout was trained); "sigma" one over the probability of their bit (so that sampling leaves the mean
    unchanged; other decisions are not random and are left as they are).

    Raises UsageError when the parts do not fit one another or the target's weights are not finite.
    """

    def __init__(
        self, target: MLP, partition: Partition, policy: Policy, decision: Decision, rescale: str = "none"
    ) -> None:
        super().__init__()
        if partition.widths != target.hidden:
            raise UsageError(f"the partition is for hidden layers of {list(partition.widths)} neurons, the target has "
                             f"{list(target.hidden)}")  # fmt: skip
        if (policy.scope, policy.bits) != (partition.scope, partition.bits):
            raise UsageError(f"the policy sets {policy.bits} bits (scope {policy.scope}), the partition has "
                             f"{partition.bits} (scope {partition.scope})")  # fmt: skip
        read, below = policy.reads(), [target.linears[0].in_features, *target.hidden[:-1]][: len(policy.gates)]
        if read != below or {gate.out_features for gate in policy.gates} != {partition.groups}:
            raise UsageError(f"the policy's gates read {read} features for "
                             f"{[gate.out_features for gate in policy.gates]} groups; here they must read {below} for "
                             f"{partition.groups} groups each")  # fmt: skip
        if rescale not in RESCALES:
            raise unknown("rescale", rescale, RESCALES)
        for owner, part in (("target", target), ("policy", policy)):
            for name, weight in part.named_parameters():
                if not weight.isfinite().all():
                    raise UsageError(f"the {owner}'s {name} holds a number that is not finite; train it again")
        self.target, self.partition, self.policy = target, partition, policy
        self.decision, self.rescale = decision, rescale

    def forward(self, x: Tensor) -> Tensor:
        """Scores (float32, examples x classes) of inputs `x` (float32, examples x features)."""
        return self.evaluate(x).scores

    def evaluate(self, x: Tensor, first: Tensor | None = None) -> Evaluation:
        """Scores, mask and logits of inputs `x`; `first` are the first layer's pre-activations where known already.

        Gradients reach the policy through the logits only: bits are constants, and so is sigma where it rescales.
        """
        h, masks, logits = x, [], []
        for index, layer in enumerate(self.target.linears[:-1]):
            if index < len(self.policy.gates):
                logits.append(self.policy.logits(index, h))
                masks.append(self._decided(logits[-1], index))
            full = self.target.activation(first if index == 0 and first is not None else layer(h))
            h = self._kept(full, masks, logits, index)
        return Evaluation(self.target.linears[-1](h), torch.cat(masks, 1), torch.cat(logits, 1))

    def _decided(self, logits: Tensor, gate: int) -> Tensor:
        """The bits of a gate; that of an always-on group is set whatever the decision says."""
        mask = self.decision(logits, gate)
        return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1) if self.policy.always_on else mask

    def masked_scores(self, x: Tensor, mask: Tensor) -> Tensor:
        """Scores of `x` under a given mask (bool, examples x bits), whatever the policy would say; no rescaling."""
        for layer, columns in zip(self.target.linears[:-1], self.partition.columns, strict=True):
            x = self.target.activation(layer(x)) * mask[:, columns]
        return self.target.linears[-1](x)

    def _kept(self, h: Tensor, masks: Sequence[Tensor], logits: Sequence[Tensor], index: int) -> Tensor:
        """The activations of a hidden layer after its mask, rescaled."""
        gate, groups = min(index, len(masks) - 1), self.partition.membership[index]
        factors = masks[gate].to(h.dtype)
        if self.rescale == "sigma" and isinstance(self.decision, Sample):
            factors = factors / logits[gate].detach().sigmoid().clamp(min=LEAST_SIGMA)
        elif self.rescale == "activity":
            share = factors @ torch.bincount(groups, minlength=factors.shape[1]).to(h.dtype) / len(groups)
            factors = factors / share.clamp(min=1 / len(groups))[:, None]
        return h * factors.index_select(1, groups)

    def cost(self, mask: Tensor) -> Cost:
        """What evaluating only the neurons that `mask` (bool, examples x bits) chooses takes, policy included."""
        neurons = self.partition.neurons(mask)
        groups, policy = self.partition.groups, []
        for index, gate in enumerate(self.policy.gates):
            policy.append(neurons[:, index - 1].mean().item() if index else float(gate.in_features))
        cost = self._cost(neurons)
        pooling = self.policy.pool.inputs if self.policy.pool else 0
        return dataclasses.replace(
            cost,
            policy_multiply_adds=tuple(read * groups + (0 if gate else pooling) for gate, read in enumerate(policy)),
            policy_bytes=tuple(FLOAT_BYTES * (read + 1) * groups for read in policy),
        )  # fmt: skip

    def target_cost(self) -> Cost:
        """What the target costs in full, without a policy."""
        return self._cost(torch.tensor([self.target.hidden], dtype=torch.float64))

    def compute(self, mask: Tensor) -> float:
        """Share of the target's multiply-adds that the lazy network spends, policy included."""
        return self.cost(mask).total_multiply_adds / self.target_cost().total_multiply_adds

    def _cost(self, neurons: Tensor) -> Cost:
        linears = self.target.linears
        ends = torch.ones(len(neurons), 1, dtype=torch.float64)
        sides = torch.cat([linears[0].in_features * ends, neurons, linears[-1].out_features * ends], 1)
        # Products of counts of the same example: layers are active together, so means must come after.
        products, outputs = (sides[:, :-1] * sides[:, 1:]).mean(0), sides[:, 1:].mean(0)
        return Cost(
            tuple(neurons.mean(0).tolist()),
            tuple(products.tolist()),
            tuple((FLOAT_BYTES * (products + outputs)).tolist()),
        )


@torch.inference_mode()
def evaluate(lazy: LazyNetwork, x: Tensor, first: Tensor | None = None, batch: int = 2048) -> Evaluation:
    """`lazy.evaluate` over many examples, in minibatches, without gradients (`first` as there)."""
    if not len(x):
        raise UsageError("there are no examples to evaluate")
    known = [None] * -(-len(x) // batch) if first is None else first.split(batch)
    parts = [lazy.evaluate(part, done) for part, done in zip(x.split(batch), known, strict=True)]
    return Evaluation(*(torch.cat([getattr(part, name) for part in parts]) for name in ("scores", "mask", "logits")))


def decided_by(lazy: LazyNetwork, decision: Decision) -> LazyNetwork:
    """The same target, partition and policy (shared, not copied) with another way to decide."""
    return LazyNetwork(lazy.target, lazy.partition, lazy.policy, decision, lazy.rescale)


def calibrated(lazy: LazyNetwork, x: Tensor, activity: float | Sequence[float]) -> LazyNetwork:
    """The lazy network that decides by thresholds found on `x` so that mean activity is what was asked.

    Arguments: `x` (float32, examples x features) calibration data, best the validation split; `activity` in (0, 1], one
    share for all gates or one for each. In scope "layer" every layer gets the asked activity, found from the first to
    the last, because a gate reads what the gates below let through. Equal logits stand or fall together (examples for
    which nothing was evaluated below share theirs), so a gate that hardly looks at its input is calibrated coarsely.
    """
    gates = len(lazy.policy.gates)
    asked = asked_by_gate(activity, gates)
    sizes = lazy.partition.sizes.split(lazy.partition.groups)
    levels: list[float] = []
    for gate in range(gates):
        trial = decided_by(lazy, Threshold((*levels, *([0.0] * (gates - gate)))))
        logits = evaluate(trial, x).logits.split(lazy.partition.groups, dim=1)[gate]
        levels.append(level_for(logits, sizes[gate], asked[gate]))
    return decided_by(lazy, Threshold(tuple(levels)))
