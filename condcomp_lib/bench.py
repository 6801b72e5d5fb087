"""What `condcomp bench` measures: speed lives here, never in a test."""

import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from condcomp_lib import datasets, paths
from condcomp_lib.coactivation import firing_patterns, network_coactivation
from condcomp_lib.errors import CondcompError
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.partitioners import Partitioner
from condcomp_lib.partitioners.bandits import RULES, Bandits
from condcomp_lib.partitioners.clustering import activation_partition
from condcomp_lib.partitioners.contextual import ContextualBandits, contexts_of
from condcomp_lib.partitioners.gumbel import Gumbel
from condcomp_lib.partitioners.local import LocalSearch
from condcomp_lib.partitions import make_partition
from condcomp_lib.policies import Policy, Sample
from condcomp_lib.policy_training import ESTIMATORS, policy_plan, train_policy
from condcomp_lib.runs import Outcome, RunSpec, RunStore
from condcomp_lib.studies import blocks as block_study
from condcomp_lib.studies import pretraining_cost as cost_study
from condcomp_lib.studies.partition_search import Trials
from condcomp_lib.studies.partitioning_splits import TRIAL
from condcomp_lib.targets import MLP
from condcomp_lib.training import CACHE_BYTES, first_layer


def store(count: int) -> dict[str, float]:
    """What the run store costs: milliseconds a run to write `count` runs, to find them again, and to list them."""
    specs = [RunSpec("bench", 1, {"seed": seed}) for seed in range(count)]
    with tempfile.TemporaryDirectory(prefix="condcomp-bench-") as folder:
        runs = RunStore(folder)
        return {
            "runs": float(count),
            "write_ms": _ms(lambda: [runs.obtain(spec, lambda _: Outcome({"accuracy": 0.5})) for spec in specs], count),
            "read_ms": _ms(lambda: [runs.get(spec) for spec in specs], count),
            "list_ms": _ms(lambda: list(runs.records()), count),
        }


def training(repeats: int) -> dict[str, Any]:
    """Seconds for one epoch of policy training: SVHN, 3x800 frozen, 16 groups, REINFORCE, validation included.

    With the first layer's pre-activations cached and without, in turn; medians, and the median of the ratios of pairs.
    The weights are untrained, which changes no time.
    """
    data = datasets.load("svhn")
    generator = torch.Generator().manual_seed(0)
    target = MLP(data.train.x.shape[1], (800, 800, 800), data.classes, generator=generator)
    partition = make_partition("random", target.hidden, 16, generator)
    plan = policy_plan(epochs=1)
    x, rows = torch.from_numpy(data.train.x), []

    def epoch(cache_bytes: int) -> float:
        policy = Policy(partition, x.shape[1], generator=generator)
        lazy = LazyNetwork(target, partition, policy, Sample(generator))
        return _seconds(lambda: train_policy(lazy, data, plan, generator, cache_bytes=cache_bytes))

    for _ in range(repeats):
        caching = _seconds(lambda: first_layer(target, x, CACHE_BYTES))
        rows.append((caching, epoch(CACHE_BYTES) - caching, epoch(0)))
    caching, cached, computed = np.median(rows, axis=0).tolist()
    ratios = [slow / fast for _, fast, slow in rows]
    return {
        "examples": len(data.train),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "first_layer_once_s": caching,
        "epoch_s": cached,
        "epoch_without_cache_s": computed,
        "gain": float(np.median(ratios)),
        "gain_least": min(ratios),
        "gain_most": max(ratios),
    }


def estimators(repeats: int) -> dict[str, Any]:
    """Seconds for one epoch of policy training by each estimator, as in `training` (first layer cached), interleaved:
    medians, and the median, least and most of the ratios to REINFORCE's epoch of the same turn.

    "one_gate": the two that *partitions* compares, in its setting, one gate for groups that span the layers; the rest
    is with 16 groups in each layer, which the regression needs.
    """
    data, generator = datasets.load("svhn"), torch.Generator().manual_seed(0)
    target = MLP(data.train.x.shape[1], (800, 800, 800), data.classes, generator=generator)
    first = first_layer(target, torch.from_numpy(data.train.x), CACHE_BYTES)
    seconds: dict[str, list[float]] = {name: [] for name in ESTIMATORS if name != "dense"}

    def epoch(name: str, scope: str) -> float:
        partition = make_partition("balanced", target.hidden, 16, generator, scope)
        lazy = LazyNetwork(target, partition, Policy(partition, 3072, generator=generator), Sample(generator))
        plan = policy_plan(estimator=name, epochs=1)
        return _seconds(lambda: train_policy(lazy, data, plan, generator, first=first))

    # In the papers' setting, one gate for the whole net, for the two that they compare.
    papers = [(epoch("reinforce", "network"), epoch("dpg", "network")) for _ in range(repeats)]
    for _ in range(repeats):
        for name, times in seconds.items():
            times.append(epoch(name, "layer"))
    ratios = {name: np.array(times) / seconds["reinforce"] for name, times in seconds.items()}
    return {
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "one_gate_epoch_s": dict(zip(("reinforce", "dpg"), np.median(papers, axis=0).tolist(), strict=True)),
        "one_gate_dpg_over_reinforce": _spread([dpg / reinforce for reinforce, dpg in papers]),
        "epoch_s": {name: float(np.median(times)) for name, times in seconds.items()},
        "over_reinforce": {name: _spread(ratio.tolist()) for name, ratio in ratios.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def partitioners(repeats: int) -> dict[str, Any]:
    """What partitioners cost on SVHN, 3x800 (untrained weights): medians and the most of `repeats`.

    Milliseconds a proposal of 2,400 neurons for 256 groups takes after a first update; seconds of a balanced
    coactivation split into 16, and of one trial of Algorithm 1 at its longest, when every epoch raises the accuracy.
    """
    data, generator = datasets.load("svhn"), torch.Generator().manual_seed(0)
    target = MLP(data.train.x.shape[1], (800, 800, 800), data.classes, generator=generator)
    start = make_partition("random", target.hidden, 256, generator)
    ready: dict[str, Partitioner] = {
        **{rule: Bandits(target.hidden, 256, rule) for rule in RULES},
        "contextual": ContextualBandits(contexts_of(target), 256),
        "gumbel": Gumbel(target.hidden, 256, generator),
        "local search": LocalSearch(start),
    }
    proposals = {}
    for name, partitioner in ready.items():
        partitioner.update(start, 0.5)
        times = [1000 * _seconds(lambda p=partitioner: p.propose(generator)) for _ in range(repeats)]  # type: ignore[misc]
        proposals[name] = {"median_ms": float(np.median(times)), "most_ms": max(times)}
    x = torch.from_numpy(data.train.x[:4000])
    splits = [
        _seconds(lambda: activation_partition(firing_patterns(target, x), target.hidden, 16, generator))
        for _ in range(repeats)
    ]
    trial = {**TRIAL["svhn"], "patience": None}
    trials = Trials({"rescale": "activity", "target_seed": 0, "policy_seed": 0,
                     "search": {"policy": policy_plan(lambda_s=0.5, **trial)}}, target, data)  # fmt: skip
    cut = make_partition("random", target.hidden, 16, generator)
    longest = [_seconds(lambda: trials(cut)) for _ in range(repeats)]
    return {
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "proposal_256_groups": proposals,
        "coactivation_split_s": {"median": float(np.median(splits)), "most": max(splits)},
        "longest_trial_s": {"median": float(np.median(longest)), "most": max(longest)},
    }


def blocks(grid: str, repeats: int) -> Iterator[dict[str, Any]]:
    """The timed rows of a grid ("bars" or "full") as they come; see `studies.blocks.measure`.

    Raises UsageError for another grid, before anything is measured.
    """
    for row in block_study.grid(grid):
        yield {**row, **block_study.measure(row, repeats), **block_study.on_this_machine(), "policy": "raw"}


def blocks_line(row: Mapping[str, Any] | None) -> str:
    """A row of `blocks` as a line of text; the heads of its columns for None."""
    if row is None:
        return (f"{'network':<24}{'groups':>7}{'batch':>6} {'mask':<12}{'active':>7}{'compute':>8} {'weights':<9}"
                f"{'thr':>4}{'lazy us':>10}{'dense us':>10} {'engine':<12}{'speed-up':<22}{'roofline':>8}")  # fmt: skip
    middle, low, high = row["speedup_vs_fastest"]
    return (f"{row['architecture']:<24}{row['groups']:>7}{row['batch']:>6} {row['mask']:<12}{row['activity']:>7.3f}"
            f"{row['compute']:>8.3f} {row['dtype']:<9}{row['threads']:>4}{row['lazy_us']:>10.1f}"
            f"{row['dense_us'][row['fastest']]:>10.1f} {row['fastest']:<12}"
            f"{f'{middle:.2f} [{low:.2f}, {high:.2f}]':<22}{row['share_of_roofline']:>8.2f}")  # fmt: skip


def flow(repeats: int) -> Iterator[dict[str, Any]]:
    """The timed rows of the class-flow penalty's cost as they come; see `studies.pretraining_cost.measure`."""
    torch.set_num_threads(1)  # of this command; the rows say so
    for row in cost_study.grid("paper"):
        found = dict.fromkeys(("naive_ms", "naive_mb"))  # None where its tensors do not fit
        yield {**row, "threads": 1, **found, **cost_study.measure(row, repeats), **block_study.on_this_machine()}


def flow_line(row: Mapping[str, Any] | None) -> str:
    """A row of `flow` as a line of text; the heads of its columns for None."""
    if row is None:
        cells = ["network", "batch", "form", "optimiser", "plain ms", "factor. ms", "naive ms", "over plain",
                 "naive over", "plain MB", "factor. MB", "naive MB"]  # fmt: skip
    else:
        middle, low, high = row["factorised_over_plain"]
        cells = [row["widths"], str(row["batch"]), row["form"], row["optimiser"]]
        cells += [f"{row['plain_ms']:.2f}", f"{row['factorised_ms']:.2f}", _whole(row["naive_ms"])]
        cells += [f"{middle:.2f} [{low:.2f}, {high:.2f}]", _whole(row.get("naive_over_factorised", [None])[0])]
        cells += [f"{row['plain_mb']:.1f}", f"{row['factorised_mb']:.1f}", _whole(row["naive_mb"])]
    widths = (20, -6, 10, 10, -9, -10, -9, 19, -10, -9, -10, -9)
    texts = zip(cells, widths, strict=True)
    return "".join(f"{text:<{width}}" if width > 0 else f"{text:>{-width}} " for text, width in texts)


def _whole(number: float | None) -> str:
    return "-" if number is None else f"{number:.0f}"


def coactivation(repeats: int) -> dict[str, Any]:
    """Seconds that coactivation of 2,400 neurons over 10,000 examples takes, and the megabytes above what was held
    before (the process's highest level, weights and examples left out)."""
    draws = torch.Generator().manual_seed(0)
    target, x = MLP(3072, (800, 800, 800), 10, generator=draws), torch.randn(10_000, 3072, generator=draws)
    network_coactivation(MLP(3072, (8,), 10, generator=draws), x[:100])  # what torch needs once
    before = _most_bytes()
    seconds = [_seconds(lambda: network_coactivation(target, x)) for _ in range(repeats)]
    return {
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "seconds": {"median": float(np.median(seconds)), "most": max(seconds)},
        "megabytes": (_most_bytes() - before) / 1e6,
    }


def _most_bytes() -> int:
    """The most memory that this process has held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def commands() -> dict[str, Any]:
    """Clone the committed state into an empty folder and time what a newcomer types there, set-up apart.

    Raises CondcompError when a command fails, so this is the fresh-clone check too.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="condcomp-clone-") as folder:
        clone = Path(folder) / "condcomp"
        _run(["git", "clone", "--quiet", str(paths.root()), str(clone)], Path(folder))
        for command, what in (
            ("make setup", "set-up, once (part of the first of the two commands)"),
            ("make reproduce", "all notebooks, both profiles"),
            ("make test", "every test"),
        ):
            started = time.perf_counter()
            _run(command.split(), clone)
            rows.append({"command": f"`{command}`", "what": what, "seconds": round(time.perf_counter() - started)})
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return {"machine": machine, "rows": rows}


def _run(command: list[str], folder: Path) -> None:
    # The clone makes its own environment; what this one has set must not leak into it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VIRTUAL_ENV", "MAKE"))}
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise CondcompError(f"{' '.join(command)} failed in a fresh clone (exit code {done.returncode})")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _ms(work: Callable[[], object], count: int) -> float:
    return 1000 * _seconds(work) / count
