"""The oracle: groups ranked by what they contribute, read off the full computation; a reference, not a bound."""

import torch
from torch import Tensor

from condcomp_lib.partitions import Partition
from condcomp_lib.policies import Policy, Pool
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
            return self._shares(gate, self._activations(gate, s)).clamp(min=TINY).log()
        shares, h = torch.zeros(len(s), self.partition.groups), s
        for layer in range(len(self.target.hidden)):
            h = self._activations(layer, h)
            shares = shares + self._shares(layer, h)
        return shares.clamp(min=TINY).log()

    def _activations(self, layer: int, s: Tensor) -> Tensor:
        return self.target.activation(self.target.linears[layer](s))

    def _shares(self, layer: int, h: Tensor) -> Tensor:
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
