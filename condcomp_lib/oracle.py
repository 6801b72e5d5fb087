"""What knows more than a policy may: the oracle, which ranks groups by what they contribute, read off the full
computation, and the search over every example's masks. References that compute more than the target, no bounds."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from condcomp_lib.errors import UsageError
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.partitions import Partition
from condcomp_lib.policies import ALWAYS, Given, Policy, Pool, check_counts
from condcomp_lib.targets import MLP

TINY = 1e-12  # the logarithm of a group without a contribution stays finite


class Oracle(Policy):
    """A "policy" that computes everything and ranks the groups by their contribution: an upper rung, not a method.

    The contribution of a group of a layer is the length of what it adds to the next layer's pre-activations,
    | sum_{i in H_j} h_i w_i |, w_i the outgoing weights of neuron i, as a share of the sum over the groups; the logit
    is its logarithm. In scope "layer" a gate reads the layer below after its own mask, as a policy would; in scope
    "network" contributions come from the full network and are added over the layers. With one neuron a group it ranks
    single neurons.

    Costs are counted as those of the linear gates that a policy in its place would have (`pool` as for `Policy`).

    Arguments: `target` and `partition` of the lazy network it decides for. The target's weights are read here and must
    not change afterwards.
    """

    def __init__(self, target: MLP, partition: Partition, pool: Pool | None = None) -> None:
        super().__init__(partition, target.linears[0].in_features, pool, torch.Generator())  # weights nobody reads
        self.target, self.partition = target, partition
        self._products = [self._gram(layer) for layer in range(len(target.hidden))]

    def logits(self, gate: int, s: Tensor) -> Tensor:
        """Logarithms of the contributions (float32, examples x groups); see the class."""
        if self.scope == "layer":
            logits = self.shares(gate, self._activations(gate, s)).clamp(min=TINY).log()
            logits[:, self.partition.groups_by_gate[gate] :] = -ALWAYS  # below a group that adds nothing
            return logits
        shares, h = torch.zeros(len(s), self.partition.groups), s
        for layer in range(len(self.target.hidden)):
            h = self._activations(layer, h)
            shares = shares + self.shares(layer, h)
        return shares.clamp(min=TINY).log()

    def _activations(self, layer: int, s: Tensor) -> Tensor:
        return self.target.activation(self.target.linears[layer](s))

    def shares(self, layer: int, h: Tensor) -> Tensor:
        """Each group's share of the contributions of a layer (float32, examples x groups) whose neurons are at `h`
        (float32, examples x neurons)."""
        added = self._added(layer, h)
        return added / added.sum(1, keepdim=True).clamp(min=TINY)

    def _added(self, layer: int, h: Tensor) -> Tensor:
        """| sum_{i in H_j} h_i w_i | (float32, examples x groups) of the neurons of a layer that are at `h`."""
        added = torch.zeros(len(h), self.partition.groups)
        for group, (members, products) in enumerate(self._products[layer]):
            part = h[:, members]
            added[:, group] = ((part @ products) * part).sum(1).clamp(min=0).sqrt()
        return added

    def _gram(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """For each group its neurons and the products w_i . w_j of their outgoing weights: a few neurons squared are
        less work than a few neurons times the next layer."""
        above, groups = self.target.linears[layer + 1].weight.detach(), self.partition.membership[layer]
        members = [(groups == group).nonzero().squeeze(1) for group in range(self.partition.groups)]
        return [(rows, above[:, rows].T @ above[:, rows]) for rows in members]


class MaskSearch:
    """Search over the masks of every single example, a structured baseline that *retrospective* misses.

    A mask is worth the less the further the scores under it are from the full network's, measured by the
    Kullback-Leibler divergence of the two predictions: no label is looked at. `greedy` starts with every group and
    leaves out the least missed one, again and again; `improve` then exchanges, gate by gate, one evaluated group
    for one that is not, each time the best exchange, until none helps or the rounds are over.

    Arguments: `lazy` whose target, partition and rescaling are meant; `counts` the groups of each gate to evaluate;
    `batch` how many masks are tried at once.
    """

    def __init__(self, lazy: LazyNetwork, counts: Sequence[int], batch: int = 4096) -> None:
        check_counts(counts, len(lazy.policy.gates), lazy.partition.groups)
        if lazy.policy.always_on:
            raise UsageError("a search needs a policy without an always-on group")
        self.lazy, self.counts, self.batch = lazy, tuple(counts), batch

    @torch.inference_mode()
    def distances(self, x: Tensor, masks: Tensor) -> Tensor:
        """Divergences (float32, examples x masks) of `x` (float32, examples x features) under `masks` (bool, examples x
        masks x bits)."""
        first = self.lazy.target.linears[0](x)
        wanted = log_softmax(self.lazy.target(x), 1)
        each, found = max(1, self.batch // masks.shape[1]), []
        for rows in torch.arange(len(x)).split(each):
            again = rows.repeat_interleave(masks.shape[1])
            decision = Given(masks[rows].flatten(0, 1))
            scores = self.lazy.evaluate(x[again], first[again], decision).scores
            divergence = kl_div(log_softmax(scores, 1), wanted[again], reduction="none", log_target=True).sum(1)
            found.append(divergence.view(len(rows), -1))
        return torch.cat(found)

    @torch.inference_mode()
    def scores(self, x: Tensor, mask: Tensor) -> Tensor:
        """The lazy network's scores (float32, examples x classes) under `mask` (bool, examples x bits)."""
        return self.lazy.evaluate(x, None, Given(mask)).scores

    def greedy(self, x: Tensor) -> Tensor:
        """Masks (bool, examples x bits) of `x` (float32, examples x features) found by leaving groups out."""
        groups = self.lazy.partition.groups
        mask = torch.ones(len(x), self.lazy.partition.bits, dtype=torch.bool)
        for _ in range(self.lazy.partition.bits - sum(self.counts)):
            # A group may go while its gate has more than it is asked for; every example has equally many left.
            left = mask.view(len(x), -1, groups).sum(2, keepdim=True) > torch.tensor(self.counts)[:, None]
            mask = self._without(x, mask, (mask.view(len(x), -1, groups) & left).flatten(1))
        return mask

    def _without(self, x: Tensor, mask: Tensor, may_go: Tensor) -> Tensor:
        """Each example's mask without the group that is missed least among those that may go."""
        # Examples differ in how many may; those with fewer try others, too, and their distances do not count.
        most = int(may_go.sum(1).max())
        candidates = may_go.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        tried = mask[:, None].repeat(1, candidates.shape[1], 1)
        tried.scatter_(2, candidates[:, :, None], False)
        distances = self.distances(x, tried).masked_fill(~may_go.gather(1, candidates), torch.inf)
        gone = candidates.gather(1, distances.argmin(1, keepdim=True))
        return mask.scatter(1, gone, False)

    def improve(self, x: Tensor, mask: Tensor, rounds: int = 10) -> Tensor:
        """Masks after at most `rounds` exchanges in each example, every one of which lowers its divergence.

        Raises UsageError when `mask` does not have the asked number of groups in every gate.
        """
        groups, mask = self.lazy.partition.groups, mask.clone()
        if not (mask.view(len(x), -1, groups).sum(2) == torch.tensor(self.counts)).all():
            raise UsageError(f"every mask must have {list(self.counts)} groups of the gates")
        now = self.distances(x, mask[:, None])[:, 0]
        for _ in range(rounds):
            before = mask.clone()
            for gate, count in enumerate(self.counts):
                if count == groups:
                    continue
                own = slice(gate * groups, (gate + 1) * groups)
                on = mask[:, own].nonzero()[:, 1].view(len(x), count) + gate * groups
                off = (~mask[:, own]).nonzero()[:, 1].view(len(x), groups - count) + gate * groups
                out, into = on.repeat_interleave(groups - count, 1), off.repeat(1, count)
                tried = mask[:, None].repeat(1, out.shape[1], 1)
                tried.scatter_(2, out[:, :, None], False).scatter_(2, into[:, :, None], True)
                distances, best = self.distances(x, tried).min(1)
                better = distances < now
                mask[better] = tried[better, best[better]]
                now = torch.where(better, distances, now)
            if mask.equal(before):
                break
        return mask
