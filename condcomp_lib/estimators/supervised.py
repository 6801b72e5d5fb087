"""Supervised routers: a policy that is told what each group contributes, read off the full layer."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.estimators import Estimate, Minibatch
from condcomp_lib.oracle import Oracle
from condcomp_lib.policies import Budget, asked_by_gate, check_counts

KINDS = ("regression", "cross-entropy")


class Supervised:
    """A router learns which groups of a layer contribute most to the next (see `oracle.Oracle`).

    `kind`: "regression" of each group's contribution, as a multiple of the mean over the layer's groups, by the logit
    (squared error; the logit is then no logit but the forecast, and ranks groups all the same); "cross-entropy" of the
    bits to the oracle's groups, those with the largest contributions.

    Masks are decided by the router's own ranking while it learns, so that upper gates see layers as they will be; in
    scope "layer" what contributes is what would, given the mask below.

    Arguments: `oracle` of the same target and partition; `asked` the share of the groups to evaluate, one for all gates
    or one for each.
    """

    def __init__(self, oracle: Oracle, asked: float | Sequence[float], kind: str = "cross-entropy") -> None:
        if kind not in KINDS:
            raise unknown("kind of router", kind, KINDS)
        self.oracle, self.kind = oracle, kind
        self.counts = Budget.of(asked, oracle.partition, oracle).counts

    @classmethod
    def of(cls, oracle: Oracle, counts: Sequence[int], kind: str = "cross-entropy") -> "Supervised":
        """The same for so many groups of each gate."""
        groups, gates = oracle.partition.groups, len(oracle.gates)
        check_counts(counts, gates, groups)
        return cls(oracle, asked_by_gate([count / groups for count in counts], gates), kind)

    def __call__(self, minibatch: Minibatch, generator: torch.Generator) -> Estimate:  # noqa: ARG002 (draws nothing)
        """See `Estimator`; the loss is the router's own, not an estimate of the cost."""
        lazy = minibatch.lazy
        if lazy.partition is not self.oracle.partition or lazy.target is not self.oracle.target:
            raise UsageError("the oracle and the lazy network must have the same target and partition")
        if lazy.policy.always_on:
            raise UsageError("a supervised router needs a policy without an always-on group")
        costs, found = minibatch.under(Budget(self.counts))
        gates = self.oracle.partition.by_gate(found.logits)
        loss = torch.zeros(())
        for logits, shares, count in zip(gates, self._shares(minibatch.x, found.hidden), self.counts, strict=True):
            loss = loss + self._loss(logits, shares, count)
        return Estimate(loss, found, costs.detach())

    def _shares(self, x: Tensor, hidden: Sequence[Tensor]) -> list[Tensor]:
        """For each gate the groups' shares (float32, examples x groups). In scope "network" they are those of the full
        network, added over the layers, because what a layer gets depends on the mask that is still to be learned."""
        if self.oracle.scope == "network":
            with torch.no_grad():
                return [self.oracle.logits(0, x).exp() / len(self.oracle.partition.widths)]
        counts = self.oracle.partition.groups_by_layer
        return [self.oracle.shares(layer, h.detach())[:, : counts[layer]] for layer, h in enumerate(hidden)]

    def _loss(self, logits: Tensor, shares: Tensor, count: int) -> Tensor:
        if self.kind == "regression":
            return (logits - shares * shares.shape[1]).square().mean()
        chosen = shares.topk(count, dim=1).indices
        bits = torch.zeros_like(logits).scatter_(1, chosen, 1.0)
        return binary_cross_entropy_with_logits(logits, bits)
