"""Block speedups: compiled lazy networks timed beside dense engines (*faster-models*, 4.1; *dropout-policies*, 4)."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from condcomp_lib import kernels, paths, studies
from condcomp_lib.errors import CondcompError, unknown
from condcomp_lib.kernels import FastLazy, timing
from condcomp_lib.kernels.tiles import LANES
from condcomp_lib.lazy import LazyNetwork, calibrated, decided_by
from condcomp_lib.partitions import make_partition
from condcomp_lib.policies import Budget, Given, Policy, Shared, Threshold
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import block_results
from condcomp_lib.targets import MLP
from condcomp_lib.training import control_width

RECIPE = 3
NET = "3072-800-800-800-10"
SMALL = "64-64-64-10"
BATCHES, ACTIVITIES = (1, 8, 32, 128, 512), (0.125, 0.25, 0.5)
IMPOSSIBLE = 1.2  # of the roofline: medians of a busy machine may lie a little above its own best
LEAST_INPUTS = 64  # different ones, in turn
CALIBRATION = 4096
REPEATS = {"quick": 5, "paper": 21}
ENGINES = {"quick": ["eager", "onnxruntime"], "paper": ["eager", "compiled", "onnxruntime"]}  # of dense networks
COMMON = {"architecture": NET, "groups": 16, "scope": "network", "threads": 1, "dtype": "float32"}


def bars(profile: str = "paper") -> list[dict[str, Any]]:
    """The rows that the companion's promises are about."""
    net = {**COMMON, "architecture": SMALL, "groups": 8} if profile == "quick" else COMMON
    if profile == "quick":
        kinds = ((1, "one"), (32, "per-example"), (32, "shared"))
        return [{**net, "batch": batch, "mask": mask, "activity_asked": activity}
                for batch, mask in kinds for activity in (0.25, 1.0)]  # fmt: skip
    rows = [(batch, activity) for batch in BATCHES for activity in (*ACTIVITIES, 1.0)]
    found = [{**net, "batch": batch, "mask": "one" if batch == 1 else "per-example", "activity_asked": activity}
             for batch, activity in [(1, 0.0625), *rows, (50, 0.18)]]  # fmt: skip
    found += [{**net, "batch": batch, "mask": "shared", "activity_asked": 0.25} for batch in (8, 32, 128)]
    found += [{**net, "batch": batch, "mask": mask, "activity_asked": 0.25, "dtype": dtype}
              for dtype in ("bfloat16", "int8") for batch, mask in ((1, "one"), (128, "per-example"))]  # fmt: skip
    found.append({**net, "batch": 128, "mask": "per-example", "activity_asked": 0.25, "threads": 2})
    # The one row of *dropout-policies*, section 4, which names one layer of 500 and masks for 32 examples.
    mnist = {**net, "architecture": "784-500-10", "batch": 32, "mask": "shared", "activity_asked": 0.125}
    return [*found, mnist]


def drawn() -> list[dict[str, Any]]:
    """Rows that figures need beyond `bars`: numbers of groups, shared masks, more batches and activities."""
    one = {**COMMON, "batch": 1, "mask": "one"}
    found = [{**one, "groups": groups, "activity_asked": a} for groups in (8, 64, 256) for a in (0.0625, *ACTIVITIES)]
    for batch in (2, 4, 8, 32, 128, 512):
        missing = (0.0625, *ACTIVITIES, 1.0) if batch < 8 else (0.0625,)
        found += [{**COMMON, "batch": batch, "mask": "per-example", "activity_asked": a} for a in missing]
    return found + [{**COMMON, "batch": batch, "mask": "shared", "activity_asked": activity}
                    for batch in (8, 32) for activity in (0.0625, 0.125, 0.5, 1.0)]  # fmt: skip


def sweeps() -> list[dict[str, Any]]:
    """Rows beyond those: widths to 8192, 4096 examples, groups within layers, more of each."""
    one, many = {**COMMON, "batch": 1, "mask": "one"}, {**COMMON, "batch": 128, "mask": "per-example"}
    found = [{**one, "architecture": f"3072-{width}-{width}-{width}-10", "activity_asked": activity}
             for width in (200, 2048, 8192) for activity in ACTIVITIES]  # fmt: skip
    found += [{**many, "groups": groups, "activity_asked": activity}
              for groups in (8, 64, 256) for activity in (0.0625, *ACTIVITIES)]  # fmt: skip
    found += [{**many, "batch": batch, "activity_asked": activity}
              for batch in (16, 64, 1024, 4096) for activity in (0.01, 0.0625, *ACTIVITIES, 0.75, 1.0)]  # fmt: skip
    return found + [{**row, "scope": "layer", "groups": groups, "activity_asked": 0.25}
                    for groups in (16, 100) for row in (one, many)]  # fmt: skip


def grid(name: str) -> list[dict[str, Any]]:
    """The rows of a grid, "bars" or "full", each once."""
    if name not in ("bars", "full"):
        raise unknown("grid", name, ("bars", "full"))
    rows = bars() + (drawn() + sweeps() if name == "full" else [])
    return list({tuple(sorted(row.items())): row for row in rows}.values())


def specs(profile: str) -> list[RunSpec]:
    """One run per row of `bars` and `drawn`; those of `bars` twice."""
    rows = bars("quick") if profile == "quick" else bars() + drawn()
    often = bars(profile)
    found = []
    for repeat, row in itertools.product(range(1 if profile == "quick" else 2), rows):
        if repeat == 0 or row in often:
            timed = {"engines": ENGINES[profile], "repeats": REPEATS[profile], "repeat": repeat}
            found.append(RunSpec("blocks", RECIPE, {"dataset": studies.NOISE, **row, **timed}))
    return found


def network(row: Mapping[str, Any]) -> LazyNetwork:
    """The lazy network of a row, with untrained weights: a policy on the raw input, held to the asked activity on
    standard normal inputs, by a threshold, or by a budget where one mask is shared. Weights change no time."""
    draws = torch.Generator().manual_seed(0)
    inputs, *hidden, classes = map(int, row["architecture"].split("-"))
    target = MLP(inputs, tuple(hidden), classes, generator=draws).requires_grad_(False)
    partition = make_partition("balanced", target.hidden, row["groups"], draws, row["scope"])
    policy = Policy(partition, inputs, generator=draws).requires_grad_(False)
    lazy = LazyNetwork(target, partition, policy, Threshold((0.0,) * len(policy.gates)))
    if row["mask"] == "shared":
        return decided_by(lazy, Shared(Budget.of(row["activity_asked"], partition, policy)))
    return calibrated(lazy, torch.randn(CALIBRATION, inputs, generator=draws), row["activity_asked"])


def inputs_of(row: Mapping[str, Any], features: int) -> list[np.ndarray]:
    """Standard normal minibatches, so many that there are LEAST_INPUTS different inputs, at least four."""
    draws = torch.Generator().manual_seed(1 + row["batch"])
    count = max(4, -(-LEAST_INPUTS // row["batch"]))
    return [torch.randn(row["batch"], features, generator=draws).numpy() for _ in range(count)]


@functools.lru_cache(maxsize=2)
def dense_engines(
    widths: tuple[int, ...], threads: int, names: tuple[str, ...]
) -> tuple[dict[str, timing.Engine], dict[str, str]]:
    """The engines for the target of `network`, kept for the next row: compiling takes its time."""
    inputs, *hidden, classes = widths
    draws = torch.Generator().manual_seed(0)
    return timing.dense_engines(MLP(inputs, tuple(hidden), classes, generator=draws), threads, names)


def measure(row: Mapping[str, Any], repeats: int, engines: Sequence[str] = ENGINES["paper"]) -> dict[str, Any]:
    """Time a row: the compiled lazy network beside the dense engines, the equal-compute control, the reference (dense,
    then masked) and itself at 100%; with the activity and compute that were measured and the roofline.

    Raises CondcompError when the compiled network's scores are not the reference's, or when it did more in the time
    than the machine can do: then something was measured wrongly.
    """
    lazy = network(row)
    fast = kernels.compile(lazy, row["mask"], row["threads"], row["dtype"])
    batches = inputs_of(row, fast.inputs)
    masks = [torch.from_numpy(fast.evaluate(x)[1]) for x in batches]
    error = largest_error(lazy, fast, batches[0], masks[0])
    if error > {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2}[row["dtype"]]:
        raise CondcompError(f"scores of {dict(row)} differ from the reference's by {error:.1e} of the largest")
    mask = torch.cat(masks)
    cost, widths = lazy.cost(mask), (fast.inputs, *lazy.target.hidden, fast.classes)
    found, skipped = dense_engines(widths, row["threads"], tuple(engines))
    control = MLP(widths[0], (control_width(lazy.mlp, cost.total_multiply_adds),) * len(lazy.target.hidden), widths[-1])
    smaller, _ = timing.dense_engines(control, row["threads"], [name for name in found if name != "compiled"])
    full = np.ones((row["batch"], fast.packed.bits), bool)
    calls: dict[str, Callable[[np.ndarray], object]] = {
        "lazy": fast,
        **found,
        **{f"control, {name}": engine for name, engine in smaller.items()},
        "masked": functools.partial(_masked, lazy),
        "lazy at 100%": functools.partial(_at_full, fast, full),
    }
    with FileLock(paths.timing_lock()):  # one measurement at a time on this machine
        before = timing.machine(lazy_bytes(lazy))
        times = timing.interleaved(calls, batches, repeats)
        best = timing.best([before, timing.machine(lazy_bytes(lazy))])
    limits = roofline(lazy, row, batches, masks, best, float(np.median(times["lazy"])))
    if limits["share_of_roofline"] > IMPOSSIBLE:
        raise CondcompError(f"{dict(row)} took less time than this machine needs at its best for what was computed "
                            "and read: much else runs here, or something is measured wrongly; try again")  # fmt: skip
    return {
        "activity": lazy.partition.activity(mask).mean().item(),
        "compute": cost.total_multiply_adds / lazy.target_cost().total_multiply_adds,
        "control_width": control.hidden[0],
        "largest_error": error,
        "skipped": skipped,
        **block_results.compared(times, tuple(found)),
        **limits,
        "machine": dataclasses.asdict(best),
    }


def _masked(lazy: LazyNetwork, x: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return lazy(torch.from_numpy(x))


def _at_full(fast: FastLazy, mask: np.ndarray, x: np.ndarray) -> Any:
    return fast.evaluate(x, mask)


def largest_error(lazy: LazyNetwork, fast: FastLazy, x: np.ndarray, mask: torch.Tensor) -> float:
    """The largest difference of scores from the reference's under the same mask, as a share of the largest score."""
    with torch.inference_mode():
        wanted = lazy.evaluate(torch.from_numpy(x), None, Given(mask)).scores.numpy()
    return float(np.abs(fast(x) - wanted).max() / np.abs(wanted).max())


def lazy_bytes(lazy: LazyNetwork) -> int:
    """Bytes of all weights, policy included: what must be held to evaluate any example."""
    return sum(4 * p.numel() for part in (lazy.target, lazy.policy) for p in part.parameters())


def roofline(
    lazy: LazyNetwork,
    row: Mapping[str, Any],
    batches: Sequence[np.ndarray],
    masks: Sequence[torch.Tensor],
    best: timing.Machine,
    lazy_us: float,
) -> dict[str, float]:
    """The least time of a call: its multiply-adds at the measured peak, or the bytes that the union of its masks reads,
    whichever takes longer; and the share of it that was reached. Evaluated neurons that are zero add no multiply-adds.
    """
    amounts = []
    for x, mask in zip(batches, masks, strict=True):
        with torch.inference_mode():
            hidden = lazy.evaluate(torch.from_numpy(x), None, Given(mask)).hidden
        own = [h * mask[:, columns] for h, columns in zip(hidden, lazy.partition.columns, strict=True)]
        amounts.append((_executed(lazy, own, mask), _read(lazy, mask)))
    executed, read = np.mean(amounts, axis=0).tolist()
    size = {"float32": 1.0, "bfloat16": 0.5, "int8": 0.25}[row["dtype"]]
    rates = {"executed_share_of_peak": executed / (best.multiply_adds * row["threads"]),
             "read_share_of_bandwidth": size * read / best.bandwidth}  # fmt: skip
    least = 1e6 * max(rates.values())
    shares = {name: 1e6 * seconds / lazy_us for name, seconds in rates.items()}
    return {
        "roofline_us": least,
        "share_of_roofline": least / lazy_us,
        **shares,
        "executed": executed,
        "read": size * read,
    }


def _executed(lazy: LazyNetwork, kept: Sequence[torch.Tensor], mask: torch.Tensor) -> float:
    """Multiply-adds of a call: each kept neuron that is not zero with every evaluated one above, and the policy's."""
    neurons, nonzero = lazy.partition.neurons(mask), [(h != 0).sum(1).double() for h in kept]
    n, gates = len(mask), lazy.policy.gates
    total = lazy.target.linears[0].in_features * neurons[:, 0].sum() + gates[0].in_features * lazy.partition.groups * n
    for layer, below in enumerate(nonzero[:-1], 1):
        total += (below * neurons[:, layer]).sum()
        total += lazy.partition.groups * below.sum() if layer < len(gates) else 0
    return float(total + lazy.target.linears[-1].out_features * nonzero[-1].sum())


def _read(lazy: LazyNetwork, mask: torch.Tensor) -> float:
    """Bytes of float32 weights that a call must read at least once: what some example's mask asks for."""
    wanted = [mask[:, columns].float() for columns in lazy.partition.columns]
    total = float(lazy.target.linears[0].in_features * wanted[0].any(0).sum())
    for below, above in itertools.pairwise(wanted):
        total += float((below.T @ above > 0).sum())
    total += float(lazy.target.linears[-1].out_features * wanted[-1].any(0).sum())
    return 4 * (total + sum(gate.weight.numel() for gate in lazy.policy.gates))


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:  # noqa: ARG001 (nothing is trained)
    """Time one row."""
    row = {key: spec.settings[key] for key in (*COMMON, "batch", "mask", "activity_asked")}
    result = measure(row, spec.settings["repeats"], spec.settings["engines"])
    return Outcome({**result, "policy": "raw", **on_this_machine()}, None, {"note": "standard normal numbers"})


def on_this_machine() -> dict[str, Any]:
    """Versions of the engines, the processor's name and the numbers in one of its vectors: what times depend on beside
    the code."""
    versions = {}
    for name in ("torch", "numba", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"versions": versions, "processor": names[0] if names else platform.processor(), "lanes": LANES}


STUDY = studies.Study(
    name="blocks",
    title="Block speedups",
    notebook="05_block_speedups",
    specs=specs,
    compute=compute,
    answers=block_results.answers,
    claims=block_results.claims,
    promises=block_results.promises,
    audited=("activity", "compute"),
)
