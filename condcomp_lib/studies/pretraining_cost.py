"""What the class-flow penalty costs (*partitions*, section 5.5): whole training steps without it, with the factorised
form, and with the paper's four-dimensional tensors, in time and in memory."""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import cross_entropy

from condcomp_lib import paths, stats, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.fitting import OPTIMISERS
from condcomp_lib.flow import Flow, naive_flow, scores_with_flow
from condcomp_lib.published import Answer
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies.blocks import on_this_machine
from condcomp_lib.targets import MLP

RECIPE = 2
REPEATS = {"quick": 5, "paper": 21}
NAIVE_REPEATS = 3  # at most; a step takes seconds
STEPS = 5  # in a row, of those that take milliseconds
MOST_BYTES = 2**31  # of one four-dimensional tensor; above it the naive form is not tried
BAR = {"widths": "3072-250-250-10", "batch": 20, "classes": 10, "optimiser": "adam", "form": "root"}
Row = Mapping[str, Any]


def grid(profile: str) -> list[dict[str, Any]]:
    """The rows: the paper's network, and from it other widths, minibatches, classes, forms and optimisers."""
    inputs, widths, batches = (64, (25, 50, 100), (40, 80)) if profile == "quick" else (
        3072, (50, 100, 500, 1000), (32, 64, 128)
    )  # fmt: skip
    rows = [{**BAR, "widths": f"{inputs}-{width}-{width}-10"} for width in widths]
    rows += [{**BAR, "widths": f"{inputs}-50-50-10", "batch": batch} for batch in batches]
    many = {**BAR, "batch": 100}
    rows += [{**many, "widths": f"{inputs}-50-50-{classes}", "classes": classes} for classes in (2, 10, 50)]
    if profile == "quick":
        return rows
    return [dict(BAR), {**BAR, "optimiser": "sgd"}, {**BAR, "form": "product"}, {**BAR, "form": "pairwise"}, *rows]


def specs(profile: str) -> list[RunSpec]:
    """One run per row; the paper's network twice."""
    found = []
    for row in grid(profile):
        for repeat in range(2 if row == BAR else 1):
            timed = {"threads": 1, "repeats": REPEATS[profile], "repeat": repeat}
            found.append(RunSpec("pretraining-cost", RECIPE, {"dataset": studies.NOISE, **row, **timed}))
    return found


class Step(Protocol):
    """What is measured: a call that can be made again after `clear`."""

    def clear(self) -> None:
        """Forget the gradients."""
        ...

    def __call__(self) -> None:
        """One step."""
        ...


class _Step:
    """A whole training step: forward, penalty, backward, update."""

    def __init__(self, row: Row, scores: Callable[[MLP, Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> None:
        inputs, *hidden, classes = map(int, row["widths"].split("-"))
        draws = torch.Generator().manual_seed(0)
        self.model, self.scores = MLP(inputs, tuple(hidden), classes, generator=draws), scores
        self.optimiser = OPTIMISERS[row["optimiser"]](self.model.parameters(), 1e-3)
        self.x, self.y = torch.randn(row["batch"], inputs, generator=draws), torch.arange(row["batch"]) % classes

    def clear(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        scores, penalty = self.scores(self.model, self.x, self.y)
        loss = cross_entropy(scores, self.y)
        if penalty is not None:
            loss = loss + 0.01 * penalty
        loss.backward()
        self.optimiser.step()


def steps(row: Row) -> dict[str, _Step]:
    """The steps to compare by name: "plain", "factorised", and "naive" where its tensors fit."""
    flow = Flow(row["form"])

    def plain(model: MLP, x: Tensor, y: Tensor) -> tuple[Tensor, None]:  # noqa: ARG001
        return model(x), None

    def factorised(model: MLP, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return scores_with_flow(model, x, y, flow)

    def naive(model: MLP, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return naive_scores(model, x, y, flow)

    ways = {"plain": plain, "factorised": factorised}
    if tensor_bytes(row) <= MOST_BYTES:
        ways["naive"] = naive
    return {name: _Step(row, way) for name, way in ways.items()}


def naive_scores(model: MLP, x: Tensor, y: Tensor, flow: Flow) -> tuple[Tensor, Tensor]:
    """As `scores_with_flow`, by the four-dimensional tensors."""
    total = torch.zeros(())
    for layer in model.linears:
        h = x if layer is model.linears[0] else model.activation(x)
        total = total + naive_flow(h, layer.weight, y, model.linears[-1].out_features, flow)
        x = layer(h)
    return x, total


def tensor_bytes(row: Row) -> int:
    """Bytes of the largest tensor of classes x examples x inputs x outputs."""
    widths = [int(width) for width in row["widths"].split("-")]
    return 4 * row["classes"] * row["batch"] * max(a * b for a, b in itertools.pairwise(widths))


def measure(row: Row, repeats: int) -> dict[str, Any]:
    """Milliseconds a step of each way, in turn, `repeats` times, with the ratios of the same turn; and the most memory
    that torch holds above what is there between two steps, in MB."""
    found = steps(row)
    with FileLock(paths.timing_lock()):  # one measurement at a time on this machine
        memory = {name: peak_bytes(step) / 1e6 for name, step in found.items()}
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(repeats):
            for name, step in found.items():
                if name != "naive" or turn < NAIVE_REPEATS:
                    times[name].append(_milliseconds(step, 1 if name == "naive" else STEPS))
    arrays = {name: np.array(values) for name, values in times.items()}
    result: dict[str, Any] = {f"{name}_ms": float(np.median(values)) for name, values in arrays.items()}
    result |= {f"{name}_mb": size for name, size in memory.items()}
    result["factorised_over_plain"] = _ratio(arrays["factorised"], arrays["plain"])
    result["memory_over_plain"] = memory["factorised"] / memory["plain"]
    result["minibatches_per_hour"] = 3.6e6 / result["factorised_ms"]
    if "naive" in arrays:
        count = len(arrays["naive"])
        result["naive_over_factorised"] = _ratio(arrays["naive"], arrays["factorised"][:count])
        result["naive_minibatches_per_hour"] = 3.6e6 / result["naive_ms"]
    return result


def _ratio(above: np.ndarray, below: np.ndarray) -> list[float]:
    """The interquartile mean of the ratios of each turn, with the ends of its interval."""
    found = stats.interval(above / below)
    return [found.estimate, found.low, found.high]


def _interval(ratio: Sequence[float], repeats: int) -> stats.Interval:
    estimate, low, high = ratio
    return stats.Interval(estimate, low, high, repeats, 0.95)


def _milliseconds(step: _Step, count: int) -> float:
    step.clear()
    step()  # what the one before left in the caches is not its own
    started = time.perf_counter()
    for _ in range(count):
        step.clear()
        step()
    return 1e3 * (time.perf_counter() - started) / count


def peak_bytes(step: Step) -> int:
    """The most bytes that torch allocates above the level between two steps (weights and the optimiser's state are
    there, gradients are not), as its profiler reports them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # that the profiler starts and stops is no news
    step()
    step.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    level = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    return most


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:  # noqa: ARG001 (nothing is trained)
    """Time one row."""
    row = {key: spec.settings[key] for key in BAR}
    result = measure(row, spec.settings["repeats"])
    return Outcome({**result, **on_this_machine()}, None, {"note": "standard normal numbers"})


def row_of(record: Record) -> dict[str, Any]:
    """The settings of a run that make its row."""
    return {key: record.spec.settings[key] for key in BAR}


def slowest(records: Sequence[Record]) -> list[Record]:
    """Of each row the run with the higher ratio to plain training."""
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = tuple(row_of(record).values())
        if (
            key not in found
            or record.result["factorised_over_plain"][0] > found[key].result["factorised_over_plain"][0]
        ):
            found[key] = record
    return list(found.values())


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per network: milliseconds and megabytes a step, and the ratios."""
    rows = []
    for record in slowest(records):
        result, row = record.result, row_of(record)
        ratio = _interval(result["factorised_over_plain"], record.spec.settings["repeats"])
        naive = result.get("naive_over_factorised")
        rows.append(
            {
                "network": row["widths"],
                "batch": row["batch"],
                "form": row["form"],
                "optimiser": row["optimiser"],
                "plain, ms": f"{result['plain_ms']:.2f}",
                "factorised, ms": f"{result['factorised_ms']:.2f}",
                "naive, ms": f"{result['naive_ms']:.0f}" if naive else "too large",
                "factorised / plain": ratio.format(2),
                "naive / factorised": f"{naive[0]:.0f}" if naive else "",
                "plain, MB": f"{result['plain_mb']:.1f}",
                "factorised, MB": f"{result['factorised_mb']:.1f}",
                "naive, MB": f"{result['naive_mb']:.0f}" if naive else "",
            }
        )
    return rows


def lines(records: Sequence[Record], key: str) -> dict[str, np.ndarray]:
    """Time a step of each way against the "width" of the hidden layers, the "batch" or the "classes": points
    (x, milliseconds, megabytes), of the rows that differ in nothing else."""
    values: dict[str, list[tuple[float, float, float]]] = {"plain": [], "factorised": [], "naive": []}
    for record in slowest(records):
        row = row_of(record)
        hidden = int(row["widths"].split("-")[1])
        fixed = {"width": (row["batch"], row["classes"]) == (20, 10),
                 "batch": (hidden, row["classes"]) == (50, 10),
                 "classes": (hidden, row["batch"]) == (50, 100)}[key]  # fmt: skip
        if not fixed or (row["optimiser"], row["form"]) != (BAR["optimiser"], BAR["form"]):
            continue
        at = {"width": hidden, "batch": row["batch"], "classes": row["classes"]}[key]
        for name, points in values.items():
            if f"{name}_ms" in record.result:
                points.append((at, record.result[f"{name}_ms"], record.result[f"{name}_mb"]))
    return {name: np.array(sorted(points)) for name, points in values.items() if points}


def answers(records: Sequence[Record]) -> list[Answer]:
    """Minibatches an hour of the paper's network."""
    found = [record.result for record in slowest(records) if row_of(record) == BAR]
    if not found:
        return []
    result = found[0]
    note = f"factorised, one thread of {result['processor']}; with tensors of four dimensions "
    note += f"{result['naive_minibatches_per_hour']:.0f} on the same"
    place = {"notebook": "03_pretraining", "figure": "pretraining_cost"}
    return [Answer("Ps55.01", result["minibatches_per_hour"], "minibatches_per_hour", note, **place)]


def claims(records: Sequence[Record]) -> list[Claim]:
    """The penalty's price in the paper's network; the slower of two runs."""
    found = []
    for record in slowest(records):
        if row_of(record) != BAR:
            continue
        result, net = record.result, "3072-250-250-10, batch 20, Adam, one thread"
        ratio = _interval(result["factorised_over_plain"], record.spec.settings["repeats"])
        statement = f"{net}: a step with the factorised penalty takes at most 1.5 times a plain one"
        found.append(judge("flow.cost.time", "ours", statement, ratio, below=1.5))
        faster = _interval(result["naive_over_factorised"], NAIVE_REPEATS)
        statement = f"{net}: the paper's tensors take more than a hundred times as long ({NAIVE_REPEATS} turns)"
        found.append(judge("flow.cost.naive", "ours", statement, faster, above=100.0))
    return found


def finding(records: Sequence[Record]) -> str:
    """What a step costs in the paper's network, in words, of two runs the slower."""
    for record in slowest(records):
        if row_of(record) == BAR:
            result = record.result
            ratio = _interval(result["factorised_over_plain"], record.spec.settings["repeats"]).format(2)
            naive = _interval(result["naive_over_factorised"], NAIVE_REPEATS).format(0)
            memory, hour = result["memory_over_plain"], result["minibatches_per_hour"]
            return (
                f"A whole training step of the paper's network (3072-250-250-10, minibatches of 20, Adam, one thread) "
                f"takes {ratio} times as long with the penalty as without, and {memory:.2f} times the memory. The "
                f"paper's tensors take {naive} times as long as the factorised form, and {result['naive_mb']:.0f} MB "
                f"instead of {result['factorised_mb']:.1f}. That is {hour:,.0f} minibatches an hour (published: 835; "
                f"with those tensors, here: {result['naive_minibatches_per_hour']:.0f})."
            )
    return ""


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 03 that are made from this study."""
    return dict.fromkeys(("pretraining_cost", "pretraining_cost_table"), records)


STUDY = studies.Study(
    name="pretraining-cost",
    title="Cost of the class-flow penalty",
    notebook="03_pretraining",
    specs=specs,
    compute=compute,
    answers=answers,
    claims=claims,
    promises=promises,
    audited=(),
)
