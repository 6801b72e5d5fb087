"""Deterministic policy gradient (*partitions*, section 3.2; Silver et al. 2014): a critic learns what actions cost."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.estimators import Estimate, Minibatch
from condcomp_lib.targets import MLP

READS = ("sigma", "bits")


class Replay:
    """The last `capacity` experiences: rows of numbers (float32) in a ring."""

    def __init__(self, capacity: int, columns: int) -> None:
        self._rows, self._next, self._full = torch.zeros(capacity, columns), 0, False

    def __len__(self) -> int:
        return len(self._rows) if self._full else self._next

    def add(self, rows: Tensor) -> None:
        """Store `rows` (float32, experiences x columns) over the oldest ones."""
        rows = rows[-len(self._rows) :]
        places = (self._next + torch.arange(len(rows))) % len(self._rows)
        self._rows[places] = rows
        self._full = self._full or self._next + len(rows) >= len(self._rows)
        self._next = (self._next + len(rows)) % len(self._rows)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` stored rows drawn uniformly, with repetition."""
        return self._rows[torch.randint(len(self), (count,), generator=generator)]


@dataclass
class _Explore:
    """Bits drawn with probability a = sigma plus Gaussian noise, cut to [0, 1]; the actions a are kept."""

    generator: torch.Generator
    deviation: float
    actions: list[Tensor] = field(default_factory=list)

    def __call__(self, logits: Tensor, gate: int) -> Tensor:  # noqa: ARG002 (all gates alike)
        noise = self.deviation * torch.randn(logits.shape, generator=self.generator)
        self.actions.append((logits.detach().sigmoid() + noise).clamp(0, 1))
        return torch.rand(logits.shape, generator=self.generator) < self.actions[-1]


class DPG:
    """The action is a = sigma + noise; the environment draws the mask from it and returns the cost; the critic Q(X, a)
    regresses that cost on a replay buffer; the policy follows grad_a Q at sigma times the gradient of sigma.

    The paper has a deep critic Q(X, M) and leaves open whether M is probabilities or bits; noise, replay and the one
    hidden layer of the critic are ours. A mask is decided once for each example, so there is nothing to bootstrap.

    The critic reads X (pooled where the policy pools it) and the action; with `reads` "bits" it learns from the drawn
    bits instead of the action, which are what the cost depends on, and is asked at sigma all the same. With a gate for
    each layer grad_a Q holds the actions above fixed, which really depend on the bits below.

    Arguments: `noise` standard deviation; `capacity` of the replay buffer and `batch` rows of it in one step of the
    critic (Adam at `rate`); `hidden` neurons of the critic; `seed` of its first weights.

    A fresh critic knows nothing: until the buffer holds a `batch`, the policy stands still.
    """

    def __init__(
        self,
        *,
        noise: float = 0.1,
        capacity: int = 16_384,
        batch: int = 128,
        hidden: int = 64,
        rate: float = 1e-3,
        reads: str = "sigma",
        seed: int = 0,
    ) -> None:
        if reads not in READS:
            raise unknown("what the critic reads", reads, READS)
        if batch < 1 or hidden < 1:
            raise UsageError(f"batch and hidden neurons of the critic must be at least 1, not {batch} and {hidden}")
        if capacity < batch:
            raise UsageError(f"a replay buffer must hold at least one batch: {capacity} rows are fewer than the "
                             f"{batch} of a batch")  # fmt: skip
        for name, value in (("noise", noise), ("critic's learning rate", rate)):
            if not 0 <= value < float("inf"):
                raise UsageError(f"the {name} must be a number of at least 0, not {value}")
        self.noise, self.capacity, self.batch, self.hidden = noise, capacity, batch, hidden
        self.rate, self.reads, self.seed = rate, reads, seed
        self.critic: MLP | None = None

    def __call__(self, minibatch: Minibatch, generator: torch.Generator) -> Estimate:
        """See `Estimator`; one experience for each example, then one step of the critic."""
        explore = _Explore(generator, self.noise)
        costs, found = minibatch.under(explore)
        pool = minibatch.lazy.policy.pool
        features = pool(minibatch.x) if pool else minibatch.x
        action = torch.cat(explore.actions, 1) if self.reads == "sigma" else found.mask.to(features.dtype)
        costs = costs.detach()
        if self.critic is None:
            self._begin(features.shape[1], action.shape[1])
        self._replay.add(torch.cat([features, action, costs[:, None]], 1))
        if len(self._replay) < self.batch:
            return Estimate(0.0 * found.logits.sum(), found, costs)
        self.learn(generator)
        return Estimate(self.value(features, found.logits.sigmoid()).mean(), found, costs)

    def _begin(self, features: int, bits: int) -> None:
        self.critic = MLP(features + bits, (self.hidden,), 1, generator=torch.Generator().manual_seed(self.seed))
        self._optimiser = torch.optim.Adam(self.critic.parameters(), lr=self.rate, fused=True)
        self._replay = Replay(self.capacity, features + bits + 1)

    def learn(self, generator: torch.Generator) -> float:
        """One step of the critic on rows of the replay buffer; returns its mean squared error before the step."""
        critic = self._critic()
        rows = self._replay.sample(self.batch, generator)
        with torch.enable_grad():
            error = mse_loss(critic(rows[:, :-1])[:, 0], rows[:, -1])
            self._optimiser.zero_grad(set_to_none=True)
            error.backward()
        self._optimiser.step()
        return error.item()

    def value(self, features: Tensor, action: Tensor) -> Tensor:
        """Q (float32, examples) of `features` (float32, examples x features) and `action` (float32, examples x bits);
        its gradient goes to the action only."""
        critic = self._critic().requires_grad_(False)
        found: Tensor = critic(torch.cat([features, action], 1))[:, 0]
        critic.requires_grad_(True)
        return found

    def _critic(self) -> nn.Module:
        if self.critic is None:
            raise UsageError("the critic has not seen a minibatch yet")
        return self.critic
