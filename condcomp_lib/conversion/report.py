"""What a converted network is worth, beside what it must beat: plain data, and rows for a table (for a figure see
`time_plots.converted`)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softmax

from condcomp_lib import kernels
from condcomp_lib.conversion.choice import LATER, TUNED, WARM, affordable, kept, most_epochs
from condcomp_lib.conversion.examples import Examples
from condcomp_lib.fitting import fit, plan
from condcomp_lib.kernels import FastLazy, timing
from condcomp_lib.lazy import LazyNetwork, calibrated, decided_by, evaluate
from condcomp_lib.oracle import Oracle
from condcomp_lib.partitions import cut_into_blocks
from condcomp_lib.policies import Blind, Budget
from condcomp_lib.policy_training import scores_of
from condcomp_lib.pretraining import shifted
from condcomp_lib.targets import MLP
from condcomp_lib.training import TEMPERATURE, control_width, distillation

VERSION = 1
BATCHES, REPEATS = (1, 128), 9
JUDGED = 2000  # examples of the oracle ladder
NEAR = 0.01  # how far activity may lie from what is asked, before the advice says so
Z = 1.96  # of a 95% interval
GOOD = 0.99  # a ratio at which nothing more has to be tried
LARGE = 1_000_000  # weights from which on time is gained at a quarter of the neurons


def written(
    fast: FastLazy, target: MLP, examples: Examples, *, asked: float, control_seconds: float, epochs: int | None,
    seed: int, chosen: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The report: plain data. Accuracy and activity are of examples held back from training and calibration."""
    lazy, data = fast.lazy, examples.data
    x, y = torch.from_numpy(data.test.x), data.test.y
    scores, mask = fast.evaluate(x)
    full, own = kept(scores_of(target, x), y, x, target, examples.scores), kept(scores, y, x, target, examples.scores)
    cost, (timed, skipped) = lazy.cost(mask), latency(fast, target, x)
    found: dict[str, Any] = {
        "version": VERSION,
        "measure": "accuracy" if examples.tested else "agreement" if examples.scores else "variance kept",
        "examples": {part: len(getattr(data, part)) for part in ("train", "valid", "test")},
        "weights": sum(parameter.numel() for parameter in target.parameters()),
        "chosen": dict(chosen),
        "activity": {"asked": asked, "found": lazy.partition.activity(mask).mean().item(),
                     "by_layer": [n / w for n, w in zip(cost.neurons, lazy.target.hidden, strict=True)]},
        "compute": lazy.compute(mask),
        "full": full,
        "lazy": own,
        "ratio": _ratio(scores, scores_of(target, x), y, examples.scores, own, full),
        "latency": timed,
        "skipped": skipped,
        "ladder": ladder(lazy, target, examples),
    }  # fmt: skip
    if control_seconds:
        found["control"] = control(target, examples, cost.total_multiply_adds, control_seconds, epochs, seed,
                                   chosen, full)  # fmt: skip
    found["next"] = advice(found)
    return found


def _share(own: float, full: float) -> float | None:
    """What is kept of what the full network has; None where that is nothing."""
    return own / full if full and math.isfinite(own) else None


def _ratio(
    scores: Tensor, full: Tensor, y: np.ndarray, classes: bool, own: float, whole: float
) -> dict[str, float | None]:
    """Accuracy ratio with its 95% interval over examples, which both answer (delta method); of variance kept none."""
    ratio = _share(own, whole)
    if not classes or ratio is None:
        return {"estimate": ratio, "low": None, "high": None}
    labels = torch.from_numpy(y)
    pairs = (scores.argmax(1) == labels).double() - ratio * (full.argmax(1) == labels).double()
    error = pairs.std().item() / (len(y) ** 0.5 * whole) if len(y) > 1 else 0.0
    # All pairs alike say that no difference was seen among so many, not that there is none (rule of three).
    half = Z * error if error else 3 / len(y)
    return {"estimate": ratio, "low": ratio - half, "high": ratio + half}


def latency(fast: FastLazy, target: MLP, x: Tensor) -> tuple[dict[str, Any], dict[str, str]]:
    """For each number of examples microseconds of a call, lazy and by each dense engine, interleaved, one thread, and
    the speed-up over the fastest of these; and the engines that are not to be had, with the reason."""
    found: dict[str, Any] = {}
    threads = torch.get_num_threads()
    try:
        engines, skipped = timing.dense_engines(target, 1, ("eager", "onnxruntime"))
        for batch in BATCHES:
            mode = "one" if batch == 1 else "per-example"
            own = fast if (fast.batch, fast.threads) == (mode, 1) else kernels.compile(fast.lazy, mode, 1, fast.dtype)
            rows = x.repeat(-(-max(64, 4 * batch) // len(x)), 1)[: max(64, 4 * batch)].numpy()
            inputs = [np.ascontiguousarray(rows[at : at + batch]) for at in range(0, len(rows), batch)]
            times = timing.interleaved({"lazy": own, **engines}, inputs, REPEATS)
            fastest = timing.fastest(times, engines)
            ratios = times[fastest] / times["lazy"]
            found[str(batch)] = {
                "lazy_us": float(np.median(times["lazy"])),
                "dense_us": {name: float(np.median(times[name])) for name in engines},
                "fastest": fastest,
                "speedup": float(np.median(ratios)),
                "low": float(np.quantile(ratios, 0.1)),
                "high": float(np.quantile(ratios, 0.9)),
            }
    finally:
        torch.set_num_threads(threads)
    return found, skipped


@torch.inference_mode()
def ladder(lazy: LazyNetwork, target: MLP, examples: Examples) -> dict[str, float | None]:
    """What is kept, as a share of the full network's, by an oracle that ranks neurons, by one that ranks these groups
    (both greedily, by what each contributes: landmarks, no bounds), by the policy, and by as many groups drawn blindly:
    the same activity in each layer, the same examples. Oracles know the model as it was, before any fine-tuning."""
    x, y = torch.from_numpy(examples.data.test.x[:JUDGED]), examples.data.test.y[:JUDGED]
    full = kept(scores_of(target, x), y, x, target, examples.scores)
    cost = lazy.cost(evaluate(lazy, x).mask)
    rates = [min(1.0, max(n / w, 1e-3)) for n, w in zip(cost.neurons, lazy.target.hidden, strict=True)]
    alone = cut_into_blocks(target.hidden, 1)
    neurons, groups = Oracle(target, alone), Oracle(target, lazy.partition, lazy.policy.pool)
    ranked = LazyNetwork(target, lazy.partition, groups, Budget.of(rates, lazy.partition, groups))
    drawn = tuple(torch.full((lazy.partition.groups,), rate) for rate in rates)
    rungs = {
        "oracle, neurons": LazyNetwork(target, alone, neurons, Budget.of(rates, alone, neurons)),
        "oracle, groups": calibrated(ranked, torch.from_numpy(examples.data.valid.x[:JUDGED]), rates),
        "learned": lazy,
        "blind": decided_by(lazy, Blind(drawn, torch.Generator().manual_seed(0))),
    }
    return {name: _share(kept(evaluate(net, x).scores, y, x, target, examples.scores), full)
            for name, net in rungs.items()}  # fmt: skip


def control(
    target: MLP, examples: Examples, wanted: float, seconds: float, epochs: int | None, seed: int,
    chosen: Mapping[str, Any], full: float,
) -> dict[str, Any]:  # fmt: skip
    """The dense net of equal multiply-adds, distilled from the same network on the same examples (pictures moved where
    those that the lazy network learned from were): what it keeps."""
    moved, most = chosen["moved"], TUNED if chosen["finetuned"] else LATER
    data, width = examples.data, control_width(target, wanted)
    draws = torch.Generator().manual_seed(seed)
    small = MLP(target.inputs, (width,) * len(target.hidden), target.linears[-1].out_features,
                "tanh" if isinstance(target.activation, torch.nn.Tanh) else "relu", draws)  # fmt: skip
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    known = scores_of(target, x)
    variance = known.var().clamp(min=1e-12)

    def loss(rows: Tensor) -> Tensor:
        given = shifted(x[rows], data.shape, moved, draws) if moved else x[rows]
        theirs = scores_of(target, given) if moved else known[rows]
        if examples.scores:
            return distillation(small(given), softmax(theirs / TEMPERATURE, 1), y[rows])
        return mse_loss(small(given), theirs) / variance

    valid = torch.from_numpy(data.valid.x)

    def score() -> float:
        return kept(scores_of(small, valid), data.valid.y, valid, target, examples.scores)

    batch = max(1, min(128, len(x) // 20))
    if epochs is None:
        epochs = affordable(lambda: loss(torch.arange(batch)), seconds) * batch // len(x)
        epochs = max(1, min(epochs, sum(most_epochs(own, len(x), batch) for own in (WARM, most))))
    else:
        epochs += min(epochs, WARM)  # as many as the lazy network has had
    fit(small, loss, score, len(x), plan(epochs=epochs, batch=batch), draws)
    test = torch.from_numpy(data.test.x)
    own = kept(scores_of(small, test), data.test.y, test, target, examples.scores)
    return {"width": width, "kept": own, "ratio": _share(own, full), "epochs": epochs}


def advice(found: Mapping[str, Any]) -> list[str]:
    """What to try next, from the report's own numbers."""
    told, rungs, ratio = [], found["ladder"], found["ratio"]["estimate"]
    asked, share = found["activity"]["asked"], found["activity"]["found"]
    if abs(share - asked) > NEAR:
        told.append(f"{100 * share:.1f}% of the neurons are evaluated where {100 * asked:g}% were asked for: give more "
                    "examples, and such as will come")  # fmt: skip
    if max(one["speedup"] for one in found["latency"].values()) < 1.1:
        why = "it is too small" if found["weights"] < LARGE else "too much of it is evaluated"
        told.append(f"nothing is to be gained in time with {found['weights']:,} weights at this activity: {why}")
    if ratio is None or rungs["learned"] is None:
        return [*told, "the full network gives nothing that could be kept on these examples: look at their labels"]
    if ratio >= GOOD:
        return told or ["nothing is lost at this activity: ask for less"]
    return [*told, *_to_keep_more(found, ratio)]


def _to_keep_more(found: Mapping[str, Any], ratio: float) -> list[str]:
    chosen, rungs, learned = found["chosen"], found["ladder"], found["ladder"]["learned"]
    tuned, longer = chosen["finetuned"], "more seconds" if chosen["ended"] == "seconds" else "more epochs"
    told = [] if tuned else ["finetune=True, which trains a copy of the weights, too"]
    if rungs["oracle, groups"] > learned + 0.02:
        told.append(f"an oracle keeps more with these groups: give the policy more examples or {longer}")
    elif rungs["oracle, neurons"] > learned + 0.02:
        told.append(f"an oracle of single neurons keeps more: try more groups than {max(chosen['groups'])}")
    elif tuned:
        told.append(f"{longer}, in which the weights go on learning, or more activity")
    else:
        told.append("the policy keeps as much as the oracles: ask for more activity, or train the network with dropout")
    if "control" in found and found["control"]["ratio"] > ratio + 0.005:
        told.append(f"a dense net of {found['control']['width']} neurons a layer keeps more at equal compute")
    return told


def rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report as pairs of text, for a table."""
    ratio, activity, moved = report["ratio"], report["activity"], report["chosen"]["moved"]
    interval = "" if ratio["low"] is None else f" [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    found = [
        (f"{report['measure']}, full network", f"{report['full']:.3f}"),
        (f"{report['measure']}, lazy network", f"{report['lazy']:.3f}"),
        ("ratio", f"{_told(ratio['estimate'])}{interval}"),
        ("activity", f"{100 * activity['found']:.1f}% (asked: {100 * activity['asked']:g}%)"),
        ("activity by layer", " / ".join(f"{100 * share:.0f}%" for share in activity["by_layer"])),
        ("compute, policy included", f"{100 * report['compute']:.1f}% of the multiply-adds"),
    ]
    if moved:
        found.append(("pictures that weights learned from", f"moved by up to {moved} pixel{'s' * (moved > 1)}"))
    for batch in map(str, BATCHES):
        own = report["latency"][batch]
        found.append((f"time, {batch} example{'s' * (batch != '1')}",
                      f"{own['lazy_us']:.0f} us, {own['speedup']:.1f} times as fast as {own['fastest']} "
                      f"({own['dense_us'][own['fastest']]:.0f} us)"))  # fmt: skip
    found += [(f"kept by: {name}", _told(share)) for name, share in report["ladder"].items()]
    if "control" in report:
        own = report["control"]
        found.append((f"dense net of equal compute ({own['width']} a layer)", _told(own["ratio"])))
    return [*found, *(("next", line) for line in report["next"])]


def _told(share: float | None) -> str:
    return "none" if share is None else f"{share:.3f}"
