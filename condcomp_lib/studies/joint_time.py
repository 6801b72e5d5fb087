"""Time of jointly trained networks: passes by compiled kernels beside dense ones (the times of Figures 2 and 4), one
example at a time and fifty, and training steps; and what REINFORCE's vector-Jacobian product saves in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from condcomp_lib import kernels, paths, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.datasets import Dataset
from condcomp_lib.estimators import Reinforce, log_probability
from condcomp_lib.fitting import OPTIMISERS
from condcomp_lib.joint_training import JointTraining, build_jointly
from condcomp_lib.kernels import timing
from condcomp_lib.lazy import LazyNetwork, decided_by
from condcomp_lib.policies import Sample, Threshold
from condcomp_lib.published import Answer
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.stats import Interval
from condcomp_lib.studies import joint
from condcomp_lib.studies.block_results import ratio
from condcomp_lib.studies.blocks import on_this_machine
from condcomp_lib.studies.joint_results import NOTEBOOK, OURS, PAPER, described, error
from condcomp_lib.studies.pretraining_cost import peak_bytes
from condcomp_lib.targets import linear

RECIPE = 1
REPEATS = {"quick": 3, "paper": 15}
TIMED = 250  # test examples that are timed
BATCH = 50  # examples at a time, as in the paper
PASS, STEP, MEMORY = "pass", "step", "memory"
ENGINES = ("eager", "onnxruntime")
# Networks whose training steps are timed.
STEPPED = {"quick": (("digits", "48-32"),), "paper": (("mnist", "256"), ("cifar10", "640-640"), ("svhn", "800-704"))}
UNITS = {"quick": (64, 32, 32), "paper": (784, 500, 128)}  # inputs, units and examples of the measurement of memory
# The paper's seconds for a test pass with and without its kernel (Figures 2 and 4).
SECONDS = {
    ("cifar10", "1536-1536"): (6.8, 26.2), ("cifar10", "256-512"): (1.4, 8.2), ("cifar10", "640-640"): (2.0, 10.4),
    ("svhn", "208-128"): (1.5, 2.2), ("svhn", "432-112"): (2.8, 4.3), ("svhn", "800-704"): (10.2, 14.1),
}  # fmt: skip


def specs(profile: str) -> list[RunSpec]:
    """A pass of every conditional network, first seed; steps of some; the memory of REINFORCE's gradient."""
    found = []
    for spec in joint.specs(profile):
        settings = spec.settings
        if settings["target_seed"] or settings["method"] not in (PAPER, OURS) or settings["block"] == 1:
            continue
        kind = (settings["dataset"], settings["architecture"])
        for part in (PASS, *([STEP] if kind in STEPPED[profile] else [])):
            found.append(RunSpec("joint-time", RECIPE, {**settings, "part": part, "repeats": REPEATS[profile]}))
    inputs, units, examples = UNITS[profile]
    memory = {"dataset": studies.NOISE, "part": MEMORY, "inputs": inputs, "units": units, "examples": examples}
    return [*found, RunSpec("joint-time", RECIPE, memory)]


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Measure one row."""
    settings = spec.settings
    if settings["part"] == MEMORY:
        sizes = (settings["inputs"], settings["units"], settings["examples"])
        return Outcome({**gradient_memory(*sizes), **on_this_machine()}, None, {"note": "standard normal numbers"})
    data = studies.dataset(settings["dataset"])
    used = {"note": data.note, "checksum": data.checksum}
    if settings["part"] == STEP:
        return Outcome({**steps(settings, data), **on_this_machine()}, None, used)
    lazy, result, mask, cited = joint.trained(joint.network_spec(settings), data, artefacts)
    for batch, size in (("one", 1), ("per-example", BATCH)):
        result[batch] = passes(lazy, data, mask, batch, size, settings["repeats"])
    return Outcome({**result, **on_this_machine()}, None, used, cited)


def fast_pass(lazy: LazyNetwork, mask: Tensor, x: np.ndarray, batch: str, size: int) -> Callable[[int], object]:
    """The compiled network as a function of which run of `size` examples it evaluates; sampled masks are those that
    were drawn in the test (`mask`), policies are evaluated all the same."""
    drawn = isinstance(lazy.decision, Sample)
    fast = kernels.compile(decided_by(lazy, Threshold.at(0.5, lazy.policy)) if drawn else lazy, batch)
    starts = range(0, TIMED - TIMED % size, size)
    runs = [np.ascontiguousarray(x[i : i + size]) for i in starts]
    if not drawn:
        return lambda run: fast(runs[run])
    masks = [mask[i : i + size].numpy() for i in starts]
    return lambda run: fast.evaluate(runs[run], masks[run])


def passes(lazy: LazyNetwork, data: Dataset, mask: Tensor, batch: str, size: int, repeats: int) -> dict[str, Any]:
    """Microseconds an example: compiled, computed densely and then masked (in PyTorch, as the paper compares), and the
    dense network by its engines; with the ratios of the same turn."""
    x = data.test.x
    runs = [np.ascontiguousarray(x[i : i + size]) for i in range(0, TIMED - TIMED % size, size)]
    engines, _ = timing.dense_engines(lazy.target, 1, ENGINES)
    # `interleaved` hands on arrays, so the number of the run travels as one.
    numbered = [np.array(run) for run in range(len(runs))]
    quick = fast_pass(lazy, mask, x, batch, size)
    calls: dict[str, Callable[[np.ndarray], object]] = {
        "lazy": lambda number: quick(int(number)),
        "masked": lambda number: _masked(lazy, runs[int(number)]),
        **{name: _of_run(engine, runs) for name, engine in engines.items()},
    }
    with FileLock(paths.timing_lock()):
        times = timing.interleaved(calls, numbered, repeats)
    fastest = min(engines, key=lambda name: float(np.median(times[name])))
    return {
        "us": {name: float(np.median(values)) / size for name, values in times.items()},
        "fastest": fastest,
        "over_masked": ratio(times["masked"], times["lazy"]),
        "over_dense": ratio(times[fastest], times["lazy"]),
    }


def _of_run(engine: timing.Engine, runs: Sequence[np.ndarray]) -> Callable[[np.ndarray], object]:
    return lambda number: engine(runs[int(number)])


@torch.inference_mode()
def _masked(lazy: LazyNetwork, x: np.ndarray) -> Tensor:
    return lazy(torch.from_numpy(x))


def pass_us(lazy: LazyNetwork, data: Dataset, mask: Tensor | None, repeats: int) -> float:
    """Microseconds an example, fifty at a time: compiled with its masks, or without masks the fastest dense engine."""
    runs = [np.ascontiguousarray(data.test.x[i : i + BATCH]) for i in range(0, TIMED, BATCH)]
    numbered = [np.array(run) for run in range(len(runs))]
    if mask is None:
        engines, _ = timing.dense_engines(lazy.target, 1, ENGINES)
        calls = {name: _of_run(engine, runs) for name, engine in engines.items()}
    else:
        quick = fast_pass(lazy, mask, data.test.x, "per-example", BATCH)
        calls = {"lazy": lambda number: quick(int(number))}
    with FileLock(paths.timing_lock()):
        times = timing.interleaved(calls, numbered, repeats)
    return min(float(np.median(values)) for values in times.values()) / BATCH


class TrainingStep:
    """A whole step of joint training on the same minibatch: forward, backward, update."""

    def __init__(self, settings: Mapping[str, Any], data: Dataset) -> None:
        spec = joint.network_spec(settings)
        lazy = build_jointly(spec, data, torch.Generator().manual_seed(0))
        self.training = JointTraining(lazy, data, spec.settings, torch.Generator().manual_seed(0))
        self.rows = torch.arange(spec.settings["batch"])
        self.optimiser = OPTIMISERS[spec.settings["optimiser"]](
            nn.ModuleList([lazy.policy, lazy.target]).parameters(), spec.settings["learning_rate"]
        )

    def __call__(self, _: np.ndarray) -> None:
        """One step; what it is called with does not matter."""
        self.optimiser.zero_grad(set_to_none=True)
        self.training.loss(self.rows).backward()
        self.optimiser.step()


def steps(settings: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    """Milliseconds of a training step, conditional and dense (the same architecture and optimiser), and their ratio."""
    torch.set_num_threads(1)
    both = ("batch", "augment", "optimiser", "schedule", "network_rate", "l2")
    kept = {key: settings["training"][key] for key in both if key in settings["training"]}
    dense = joint.spec_of(*joint.dense_row(data.name, settings["architecture"], **kept), 0).settings
    calls = {"conditional": TrainingStep(settings, data), "dense": TrainingStep(dense, data)}
    with FileLock(paths.timing_lock()):
        times = timing.interleaved(calls, [np.zeros(1)] * 2, settings["repeats"])
    found: dict[str, Any] = {f"{name}_ms": float(np.median(values)) / 1000 for name, values in times.items()}
    return {**found, "over_dense": ratio(times["conditional"], times["dense"])}


class PolicyGradient:
    """REINFORCE's gradient of one gate: by one backward pass, or (`explicit`) example by example into a Jacobian."""

    def __init__(self, inputs: int, units: int, examples: int, explicit: bool) -> None:
        draws = torch.Generator().manual_seed(0)
        self.gate, self.explicit = linear(inputs, units, draws), explicit
        self.x, self.costs = torch.randn(examples, inputs, generator=draws), torch.rand(examples, generator=draws)
        self.mask = torch.rand(examples, units, generator=draws) < 0.15

    def clear(self) -> None:
        """Forget the gradients."""
        self.gate.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        """Leave the gradient in the gate's parameters."""
        if not self.explicit:
            Reinforce().loss(self.costs, log_probability(self.gate(self.x), self.mask)).backward()
            return
        weights: dict[str, Tensor] = dict(self.gate.named_parameters())

        def of_one(own: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
            return log_probability(torch.func.functional_call(self.gate, own, (x[None],)), mask[None])[0]

        jacobian = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(weights, self.x, self.mask)
        advantage = self.costs - self.costs.mean()
        for name, weight in weights.items():
            weight.grad = torch.einsum("n,n...->...", advantage, jacobian[name]) / len(self.x)


def gradient_memory(inputs: int, units: int, examples: int) -> dict[str, Any]:
    """The most megabytes that either way takes, and how far their gradients differ (largest difference over largest
    number)."""
    ways = {"product": PolicyGradient(inputs, units, examples, False),
            "jacobian": PolicyGradient(inputs, units, examples, True)}  # fmt: skip
    found: dict[str, Any] = {f"{name}_mb": peak_bytes(way) / 1e6 for name, way in ways.items()}
    gradients = [torch.as_tensor(way.gate.weight.grad) for way in ways.values()]
    found["difference"] = ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item()
    return found


def part_of(records: Sequence[Record], part: str) -> list[Record]:
    """The records of one part of the run table."""
    return [record for record in records if record.spec.settings["part"] == part]


def name_of(record: Record) -> str:
    """A network and how it was trained, in words."""
    settings = record.spec.settings
    return f"{settings['dataset']}, {described(settings)}, {settings['method']}"


def _interval(found: Sequence[float], record: Record) -> Interval:
    return Interval(found[0], found[1], found[2], record.spec.settings["repeats"], 0.95)


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Passes of every conditional network: microseconds an example, fifty at a time and one, and the ratios to the
    network computed densely and masked (beside the paper's) and to the fastest dense engine."""
    rows = []
    for record in part_of(records, PASS):
        settings, result = record.spec.settings, record.result
        many, one = result["per-example"], result["one"]
        seconds = SECONDS.get((settings["dataset"], settings["architecture"]))
        theirs = f"{seconds[1] / seconds[0]:.1f}" if seconds and settings["method"] == PAPER else ""
        rows.append(
            {
                "network": name_of(record),
                "error, %": f"{error(result):.1f}",
                "active, %": f"{100 * result['activity']:.0f}",
                "lazy, us": f"{many['us']['lazy']:.1f}",
                "masked, us": f"{many['us']['masked']:.1f}",
                "masked / lazy": _interval(many["over_masked"], record).format(1),
                "published": theirs,
                "fastest dense / lazy": _interval(many["over_dense"], record).format(1),
                "one at a time: lazy, us": f"{one['us']['lazy']:.1f}",
                "one at a time: fastest dense / lazy": _interval(one["over_dense"], record).format(1),
            }
        )
    return rows


def step_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Training steps: milliseconds of the conditional and of the dense net, and their ratio."""
    return [
        {
            "network": name_of(record),
            "estimator": record.spec.settings["training"]["estimator"],
            "conditional, ms": f"{record.result['conditional_ms']:.2f}",
            "dense, ms": f"{record.result['dense_ms']:.2f}",
            "conditional / dense": _interval(record.result["over_dense"], record).format(2),
        }
        for record in part_of(records, STEP)
    ]


def memory_finding(records: Sequence[Record]) -> str:
    """What the vector-Jacobian product saves, in words."""
    found = part_of(records, MEMORY)[0]
    sizes, result = found.spec.settings, found.result
    return (
        f"REINFORCE's gradient for a gate of {sizes['inputs']} x {sizes['units']} from {sizes['examples']} examples "
        f"takes {result['product_mb']:.1f} MB as one product, {result['jacobian_mb']:.0f} MB example by example; the "
        f"two differ by {result['difference']:.0e} of the largest number."
    )


def answers(records: Sequence[Record]) -> list[Answer]:
    """The wall time of training."""
    found = part_of(records, STEP)
    if not found:
        return []
    worst = max(found, key=lambda record: record.result["over_dense"][0])
    ratios = "; ".join(f"{name_of(r)} {r.result['over_dense'][0]:.2f}" for r in found)
    ours = _interval(worst.result["over_dense"], worst)
    return [Answer("Fs42.04", ours, "training_time_ratio", f"the slowest of: {ratios}", NOTEBOOK, "joint_steps_table")]


def claims(records: Sequence[Record]) -> list[Claim]:
    """A training step takes at most half as long again as a dense one; passes are as much faster as published. Brief
    measurements on digits judge nothing."""
    found = []
    records = [record for record in records if record.spec.settings["dataset"] != "digits"]
    for record in part_of(records, STEP):
        settings = record.spec.settings
        id = f"joint.step.{settings['dataset']}.{settings['method'].replace(' ', '-').replace(chr(39), '')}"
        statement = f"{name_of(record)}: a training step takes at most 1.5 times the dense net's"
        found.append(judge(id, "Fs42.04", statement, _interval(record.result["over_dense"], record), below=1.5))
    for record in part_of(records, PASS):
        settings = record.spec.settings
        seconds = SECONDS.get((settings["dataset"], settings["architecture"]))
        if seconds and settings["method"] == PAPER:
            level = round(seconds[1] / seconds[0], 1)
            statement = f"{name_of(record)}: fifty at a time, {level} times as fast as computed densely and masked"
            gain = _interval(record.result["per-example"]["over_masked"], record)
            id = f"joint.pass.{settings['dataset']}.{settings['architecture']}"
            found.append(judge(id, "faster-models, Figures 2 and 4", statement, gain, above=level))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Tables of notebook 06 that are made from this study."""
    return dict.fromkeys(("joint_time_table", "joint_steps_table"), records)


STUDY = studies.Study(
    name="joint-time",
    title="Time of jointly trained networks",
    notebook=NOTEBOOK,
    specs=specs,
    compute=compute,
    answers=answers,
    claims=claims,
    promises=promises,
    audited=(),
)
