"""Lazy networks: a target evaluated only where a policy's mask says, with exact accounting of what that costs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.partitions import Partition
from condcomp_lib.policies import Decision, Policy, Sample, Threshold, asked_by_gate, level_for
from condcomp_lib.targets import MLP, ConvNet

RESCALES = ("none", "activity", "sigma")
LEAST_SIGMA = 0.01  # "sigma" never multiplies by more than 100
FLOAT_BYTES = 4


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a lazy network computed: `scores` (float32, examples x classes), `mask` (bool, examples x bits; float32 with
    a gradient where the decision is a relaxation of one), `logits` of the policy (float32, examples x bits), `hidden`
    each hidden layer's activations before its mask (float32, examples x neurons; left out by `evaluate` below)."""

    scores: Tensor
    mask: Tensor
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


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
    chosen neurons takes. In a `ConvNet` filters stand for neurons: a mask switches whole filters, and a gate reads the
    mean of each channel below (as the convolutional nets of *slides*).

    Arguments: `decision` turns the policy's logits into bits, or in training into numbers that stand for them and have
    a gradient; `rescale` what kept activations are multiplied with:
    "none" nothing; "activity" one over the share of the layer's neurons that this example evaluates (how inverted
    dropout was trained); "sigma" one over the probability of their bit (so that sampling leaves the mean
    unchanged; other decisions are not random and are left as they are); `fill` what a skipped neuron counts
    as (float32, neurons, for each hidden layer; None: zero), see `compensated`.

    Raises UsageError when the parts do not fit one another or the target's weights are not finite.
    """

    def __init__(
        self,
        target: MLP | ConvNet,
        partition: Partition,
        policy: Policy,
        decision: Decision,
        rescale: str = "none",
        fill: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        if partition.widths != target.hidden:
            raise UsageError(f"the partition is for hidden layers of {list(partition.widths)} neurons, the target has "
                             f"{list(target.hidden)}")  # fmt: skip
        if (policy.scope, policy.bits) != (partition.scope, partition.bits):
            raise UsageError(f"the policy sets {policy.bits} bits (scope {policy.scope}), the partition has "
                             f"{partition.bits} (scope {partition.scope})")  # fmt: skip
        read, below = policy.reads(), target.reads[: len(policy.gates)]
        below = [target.inputs, *below[1:]] if policy.pool else below
        if read != below or tuple(gate.out_features for gate in policy.gates) != partition.groups_by_gate:
            raise UsageError(f"the policy's gates read {read} features for "
                             f"{[gate.out_features for gate in policy.gates]} groups; here they must read {below} for "
                             f"{list(partition.groups_by_gate)} groups")  # fmt: skip
        if rescale not in RESCALES:
            raise unknown("rescale", rescale, RESCALES)
        if fill is not None and isinstance(target, ConvNet):
            raise UsageError("skipped filters count as zero: fill goes with fully connected targets only")
        if fill is not None and [len(values) for values in fill] != list(target.hidden):
            raise UsageError(f"fill must hold one number for each neuron of hidden layers {list(target.hidden)}, not "
                             f"{[len(values) for values in fill]}")  # fmt: skip
        for owner, part in (("target", target), ("policy", policy)):
            for name, weight in part.named_parameters():
                if not weight.isfinite().all():
                    raise UsageError(f"the {owner}'s {name} holds a number that is not finite; train it again")
        self.target, self.partition, self.policy = target, partition, policy
        self.decision, self.rescale, self.fill = decision, rescale, fill

    @property
    def mlp(self) -> MLP:
        """The target where it must be fully connected; raises UsageError for a conv net."""
        if isinstance(self.target, MLP):
            return self.target
        raise UsageError(f"this goes with fully connected targets only, not with a {type(self.target).__name__}")

    def forward(self, x: Tensor) -> Tensor:
        """Scores (float32, examples x classes) of inputs `x` (float32, examples x features)."""
        return self.evaluate(x).scores

    def evaluate(
        self, x: Tensor, first: Tensor | None = None, decision: Decision | None = None, *, through: bool = True
    ) -> Evaluation:
        """Scores, mask and logits of inputs `x`; `first` are the first layer's pre-activations where known already, and
        `decision` decides this once instead of the network's own.

        Gradients reach the policy through the logits: bits are constants, and so is sigma where it rescales; only a
        relaxed decision's numbers carry the gradient of the scores too. Those of the logits go on into the layers below
        unless `through` is False: then these are to a gate what the input is.
        """
        h, masks, logits, hidden = self.target.shaped(x), [], [], []
        read = x if self.policy.pool else self.target.read(h)
        decision = decision or self.decision
        for index, layer in enumerate(self.target.linears[:-1]):
            if index < len(self.policy.gates):
                logits.append(self.policy.logits(index, read if through else read.detach()))
                masks.append(self._decided(decision(logits[-1], index)))
            hidden.append(self.target.activation(first if index == 0 and first is not None else layer(h)))
            gate = min(index, len(masks) - 1)
            sigma = logits[gate].detach().sigmoid() if isinstance(decision, Sample) else None
            kept, h = self._kept(hidden[-1], masks[gate], sigma, index)
            read = self.target.read(kept)
        return Evaluation(
            self.target.linears[-1](read if h is kept else h), torch.cat(masks, 1), torch.cat(logits, 1), tuple(hidden)
        )

    def _decided(self, mask: Tensor) -> Tensor:
        """The bits of a gate as decided; that of an always-on group is set whatever the decision says."""
        return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1) if self.policy.always_on else mask

    def masked_scores(self, x: Tensor, mask: Tensor) -> Tensor:
        """Scores of `x` under a given mask (bool, examples x bits), whatever the policy would say; neither rescaled
        nor filled."""
        h = self.target.shaped(x)
        for layer, columns in zip(self.target.linears[:-1], self.partition.columns, strict=True):
            h = self.target.activation(layer(h))
            h = h * over(mask[:, columns], h)
        return self.target.linears[-1](self.target.read(h))

    def _kept(self, h: Tensor, mask: Tensor, sigma: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
        """The activations of a hidden layer after its mask, rescaled, as the next gate reads them (what was evaluated)
        and as the next layer does (filled); `sigma` of the bits where they were sampled."""
        groups, bits = self.partition.membership[index], mask.to(h.dtype)
        factors = bits
        if self.rescale == "sigma" and sigma is not None:
            factors = factors / sigma.clamp(min=LEAST_SIGMA)
        elif self.rescale == "activity":
            share = factors @ torch.bincount(groups, minlength=factors.shape[1]).to(h.dtype) / len(groups)
            factors = factors / share.clamp(min=1 / len(groups))[:, None]
        kept = h * over(self._spread(factors, index), h)
        if self.fill is None:
            return kept, kept
        return kept, kept + self.fill[index] * (1 - self._spread(bits, index))

    def _spread(self, bits: Tensor, index: int) -> Tensor:
        """For each neuron of a layer the number of its group. As a product where there is a gradient, whose backward
        pass is then a product too instead of a slow scattered sum; the numbers are the same."""
        if self.partition.alone[index]:
            return bits
        groups = self.partition.membership[index]
        return bits @ self.partition.rows[index] if bits.requires_grad else bits.index_select(1, groups)

    def cost(self, mask: Tensor) -> Cost:
        """What evaluating only the neurons that `mask` (bool, examples x bits) chooses takes, policy included."""
        neurons = self.partition.neurons(mask)
        groups, policy = self.partition.groups_by_gate, []
        for index, gate in enumerate(self.policy.gates):
            policy.append(neurons[:, index - 1].mean().item() if index else float(gate.in_features))
        cost, averaged = self._cost(neurons), self.target.positions
        own = [read * (groups[gate] + (averaged[gate - 1] if gate else 0)) for gate, read in enumerate(policy)]
        return dataclasses.replace(
            cost,
            policy_multiply_adds=(own[0] + self._pooling(), *own[1:]),
            policy_bytes=tuple(FLOAT_BYTES * (read + 1) * groups[gate] for gate, read in enumerate(policy)),
        )  # fmt: skip

    def _pooling(self) -> int:
        """Numbers of an input that are averaged for the first gate."""
        if self.policy.pool:
            return self.policy.pool.inputs
        return self.target.inputs if isinstance(self.target, ConvNet) else 0

    def target_cost(self) -> Cost:
        """What the target costs in full, without a policy."""
        return self._cost(torch.tensor([self.target.hidden], dtype=torch.float64))

    def compute(self, mask: Tensor) -> float:
        """Share of the target's multiply-adds that the lazy network spends, policy included."""
        return self.cost(mask).total_multiply_adds / self.target_cost().total_multiply_adds

    def computes(self, mask: Tensor) -> Tensor:
        """That share for each example (float64, examples); differentiable in a relaxed `mask`."""
        neurons, groups = self.partition.neurons(mask), self.partition.groups_by_gate
        sides, averaged = self._sides(neurons), neurons.new_tensor(self.target.positions)
        spent = (sides[:, :-1] * sides[:, 1:]) @ neurons.new_tensor(self.target.products)
        spent = spent + neurons[:, -1] * averaged[-1] + self.policy.gates[0].in_features * groups[0] + self._pooling()
        above = neurons[:, : len(self.policy.gates) - 1]  # what the gates after the first read
        spent = spent + above @ (above.new_tensor(groups[1:]) + averaged[: above.shape[1]])
        return spent / self.target_cost().total_multiply_adds

    def _cost(self, neurons: Tensor) -> Cost:
        sides = self._sides(neurons)
        # Products of counts of the same example: layers are active together, so means must come after.
        pairs, outputs, target = (sides[:, :-1] * sides[:, 1:]).mean(0), sides[:, 1:].mean(0), self.target
        adds = pairs * pairs.new_tensor(target.products)
        adds[-1] += sides[:, -2].mean() * target.positions[-1]  # what the last layer reads is averaged
        read = pairs * pairs.new_tensor(target.weights) + outputs
        return Cost(tuple(neurons.mean(0).tolist()), tuple(adds.tolist()), tuple((FLOAT_BYTES * read).tolist()))

    def _sides(self, neurons: Tensor) -> Tensor:
        """Neurons at both ends of each weight layer (float64, examples x layers from input to output)."""
        ends, classes = torch.ones(len(neurons), 1, dtype=torch.float64), self.target.linears[-1].out_features
        return torch.cat([self.target.reads[0] * ends, neurons, classes * ends], 1)


def over(bits: Tensor, h: Tensor) -> Tensor:
    """Numbers of each unit (examples x units) in a shape that is multiplied with activations `h` of these units."""
    return bits[:, :, None, None] if h.ndim == 4 else bits


@torch.inference_mode()
def evaluate(lazy: LazyNetwork, x: Tensor, first: Tensor | None = None, batch: int = 2048) -> Evaluation:
    """`lazy.evaluate` over many examples, in minibatches, without gradients (`first` as there)."""
    if not len(x):
        raise UsageError("there are no examples to evaluate")
    known = [None] * -(-len(x) // batch) if first is None else first.split(batch)
    parts = [_slim(lazy.evaluate(part, done)) for part, done in zip(x.split(batch), known, strict=True)]
    return Evaluation(
        torch.cat([part.scores for part in parts]),
        torch.cat([part.mask for part in parts]),
        torch.cat([part.logits for part in parts]),
    )


def _slim(found: Evaluation) -> Evaluation:
    return dataclasses.replace(found, hidden=())  # all layers of all examples would be hundreds of megabytes


def decided_by(lazy: LazyNetwork, decision: Decision) -> LazyNetwork:
    """The same target, partition and policy (shared, not copied) with another way to decide."""
    return LazyNetwork(lazy.target, lazy.partition, lazy.policy, decision, lazy.rescale, lazy.fill)


@torch.no_grad()  # not inference_mode: what is filled in takes part in later training
def compensated(lazy: LazyNetwork, x: Tensor, batch: int = 2048) -> LazyNetwork:
    """The same lazy network with the mean contribution of a skipped group added to the next layer's pre-activations.

    A skipped neuron then counts as its mean over the examples of `x` (float32, examples x features) that skip it. The
    sum over all neurons is part of the next bias, and from a kept activation its mean is subtracted, so no
    multiply-add is added. Gates go on reading what was evaluated only. Layers are done from the first to the last,
    because what is added below changes those above. The decision must give bits, no relaxation of them.
    """
    if not len(x):
        raise UsageError("there are no examples to take means from")
    fill = [torch.zeros(width) for width in lazy.target.hidden]
    for layer, columns in enumerate(lazy.partition.columns):
        trial = LazyNetwork(lazy.target, lazy.partition, lazy.policy, lazy.decision, lazy.rescale, tuple(fill))
        total, times = torch.zeros(len(columns)), torch.zeros(len(columns))
        for part in x.split(batch):
            found = trial.evaluate(part)
            skipped = (~found.mask)[:, columns]
            total, times = total + (found.hidden[layer] * skipped).sum(0), times + skipped.sum(0)
        fill[layer] = total / times.clamp(min=1)
    return LazyNetwork(lazy.target, lazy.partition, lazy.policy, lazy.decision, lazy.rescale, tuple(fill))


def calibrated(
    lazy: LazyNetwork, x: Tensor, activity: float | Sequence[float], first: Tensor | None = None
) -> LazyNetwork:
    """The lazy network that decides by thresholds found on `x` so that mean activity is what was asked.

    Arguments: `x` (float32, examples x features) calibration data, best the validation split; `activity` in (0, 1], one
    share for all gates or one for each; `first` the first layer's pre-activations where known already.

    In scope "layer" every layer gets the asked activity, found from the first to the last, because a gate reads what
    the gates below let through. Equal logits stand or fall together (examples for which nothing was evaluated below
    share theirs), so a gate that hardly looks at its input is calibrated coarsely.
    """
    gates = len(lazy.policy.gates)
    asked = asked_by_gate(activity, gates)
    sizes = lazy.partition.sizes.split(lazy.partition.groups)
    levels: list[float] = []
    for gate in range(gates):
        trial = decided_by(lazy, Threshold((*levels, *([0.0] * (gates - gate)))))
        logits = evaluate(trial, x, first).logits.split(lazy.partition.groups, dim=1)[gate]
        levels.append(level_for(logits, sizes[gate], asked[gate]))
    return decided_by(lazy, Threshold(tuple(levels)))
