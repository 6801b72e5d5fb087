"""Contextual bandits: one per layer, whose context is a neuron's weights (*partitions*, section 2.2)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.partitioners import check_cut, check_worth
from condcomp_lib.partitioners.bandits import explored, first_of_best
from condcomp_lib.partitions import Partition, check_groups
from condcomp_lib.targets import MLP

TINY = 1e-12  # keeps the penalty above 0 where all weights are 0
CONTEXTS = ("incoming", "incoming+outgoing")


def falling(first: float = 0.8, last: float = 0.1, span: int = 10) -> Callable[[int], float]:
    """The exploration of section 5.2: `first` after the first trial, falling evenly to `last` after `span` of them.

    >>> [round(falling()(trial), 2) for trial in (1, 5, 10, 20)]
    [0.8, 0.49, 0.1, 0.1]
    """
    if not 0 <= last <= first <= 1 or span < 1:
        raise UsageError(f"epsilon must fall from at most 1 to at least 0 over at least one trial, not from {first} to "
                         f"{last} over {span}")  # fmt: skip
    return lambda trial: last + (first - last) * max(0.0, (span - trial) / max(1, span - 1))


class ContextualBandits:
    """One linear bandit per layer: Q(w, a) = beta_a . w, beta_a by least squares over the neurons that were put into
    group a, one equation for each of them and each trial, with the trial's worth on its right-hand side. The ridge is
    ours; the paper has none, and more unknowns than equations.

    A proposal gives each neuron its group of the highest Q, or with probability epsilon a random one; the first is
    random throughout. Groups nobody was put into have Q = 0.

    The ridge shrinks Q towards 0. So where every worth is positive, as accuracies are, what was tried most looks best
    and the bandits settle early; where a worth is counted from a level that good partitions reach
    (negative below it), failures lose to what was tried less, and planted groups are found.

    The equations are solved in their dual form: with K = W W^T the products of the contexts of a layer, the predictions
    of group a for all neurons are K[:, s] (K[s, s] + ridge D^-1)^-1 r, where s are the neurons that were in it, D how
    often, r their mean worth. The system is as large as s, not as the context (3,072 for a first layer on images).

    Arguments: `contexts` one matrix (float, neurons x features) for each hidden layer, as from `contexts_of`; `groups`
    k; `ridge` the penalty on |beta|^2, above 0, in units of the layer's mean |w|^2; `epsilon(trial)` the exploration of
    the proposal that follows so many trials; `scope` as for `Partition`.

    >>> bandits = ContextualBandits([torch.eye(4)], groups=2)
    >>> bandits.propose(torch.Generator().manual_seed(0)).sizes.sum()
    tensor(4)
    """

    def __init__(
        self,
        contexts: Sequence[Tensor],
        groups: int,
        *,
        ridge: float = 1.0,
        epsilon: Callable[[int], float] | None = None,
        scope: str = "network",
    ) -> None:
        self.widths = tuple(len(context) for context in contexts)
        check_groups(self.widths, groups, scope)
        if not 0 < ridge < float("inf"):
            raise UsageError(f"the ridge must be a number above 0, not {ridge}")
        for number, context in enumerate(contexts, 1):
            if context.ndim != 2:
                raise UsageError(f"the contexts of layer {number} must be neurons x features, not of shape "
                                 f"{list(context.shape)}")  # fmt: skip
            if not context.isfinite().all():
                raise UsageError(f"the contexts of layer {number} hold a number that is not finite")
        self.groups, self.ridge, self.scope = groups, ridge, scope
        self.epsilon = epsilon or falling()
        self.trials = 0
        self.products = [context.detach().double() @ context.detach().double().T for context in contexts]
        self.penalties = [ridge * max(float(products.trace()) / len(products), TINY) for products in self.products]
        self.counts = [torch.zeros(width, groups, dtype=torch.float64) for width in self.widths]
        self.sums = [torch.zeros(width, groups, dtype=torch.float64) for width in self.widths]
        self.values = [torch.zeros(width, groups, dtype=torch.float64) for width in self.widths]

    def propose(self, generator: torch.Generator) -> Partition:
        """See `Partitioner`."""
        epsilon = self.epsilon(self.trials) if self.trials else 1.0
        chosen = [explored(first_of_best(q, generator), self.groups, epsilon, generator) for q in self.values]
        return Partition(tuple(chosen), self.groups, self.scope)

    def update(self, partition: Partition, worth: float) -> None:
        """See `Partitioner`."""
        check_worth(worth)
        check_cut(partition, self.widths, self.groups, self.scope)
        self.trials += 1
        for layer, groups in enumerate(partition.membership):
            pulled = one_hot(groups, self.groups).double()
            self.counts[layer] += pulled
            self.sums[layer] += worth * pulled
            self.values[layer] = self._solved(layer)

    def best(self) -> Partition:
        """Each neuron in its group of the highest Q, the first of equal ones."""
        return Partition(tuple(q.argmax(1) for q in self.values), self.groups, self.scope)

    def _solved(self, layer: int) -> Tensor:
        """Q of all neurons of a layer (float64, neurons x groups)."""
        products, counts, sums = self.products[layer], self.counts[layer], self.sums[layer]
        values = torch.zeros_like(counts)
        for group in range(self.groups):
            seen = counts[:, group].nonzero().squeeze(1)
            if len(seen):
                often = counts[seen, group]
                system = products[seen][:, seen] + torch.diag(self.penalties[layer] / often)
                values[:, group] = products[:, seen] @ torch.linalg.solve(system, sums[seen, group] / often)
        return values


def contexts_of(target: MLP, context: str = "incoming") -> list[Tensor]:
    """What a contextual bandit knows of the neurons of each hidden layer (float32, neurons x features).

    `context`: "incoming" the neuron's incoming weights (*partitions*, section 2.2); "incoming+outgoing" its outgoing
    ones as well, which the paper's discussion proposes.

    >>> [tuple(c.shape) for c in contexts_of(MLP(5, (4, 3), 2), "incoming+outgoing")]
    [(4, 8), (3, 6)]
    """
    if context not in CONTEXTS:
        raise unknown("context", context, CONTEXTS)
    incoming = [layer.weight.detach() for layer in target.linears[:-1]]
    if context == "incoming":
        return incoming
    return [torch.cat([w, above.weight.detach().T], 1)
            for w, above in zip(incoming, target.linears[1:], strict=True)]  # fmt: skip
