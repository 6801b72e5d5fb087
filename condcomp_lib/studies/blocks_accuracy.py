"""Time against accuracy of trained lazy networks, both from one compiled object, beside dense nets of every width."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from condcomp_lib import kernels, paths, stats, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.datasets import Dataset
from condcomp_lib.kernels import timing
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies import blocks, policies, targets
from condcomp_lib.studies.block_results import compared
from condcomp_lib.studies.lazy_results import over_runs
from condcomp_lib.studies.partitioning import TAU
from condcomp_lib.studies.policy_results import DENSE, TUNED, WARM, by_method, no_answers
from condcomp_lib.targets import MLP, multiply_adds
from condcomp_lib.training import obtain_control, obtain_target

RECIPE = 3
TAUS = {"quick": (0.25,), "paper": (0.1, 0.25, 0.5)}
WIDTHS = {"digits": (8, 16, 32), "svhn": (64, 128, 192, 256, 288, 320)}
MOVED = {"digits": (16, 32), "svhn": (192, 288)}  # of nets that learn from moved pictures, around equal compute
OWN = ("engines", "repeats", "widths", "moved_widths")  # settings beyond those of the study `policies`
TIMED = 256  # test examples that are timed, one at a time
REPEATS = {"quick": 3, "paper": 21}


def specs(profile: str) -> list[RunSpec]:
    """One run per method, sparsity target and target: those of the study `policies`, first policy seed."""
    found = []
    for spec in policies.specs(profile):
        settings = spec.settings
        asked = (settings["method"] == WARM and settings["tau"] in TAUS[profile]) or settings["method"] == TUNED
        if asked and settings["part"] in ("best", "fronts") and settings["policy_seed"] == 0:
            own = {"engines": blocks.ENGINES[profile], "repeats": REPEATS[profile]}
            own["widths"] = list(WIDTHS[settings["dataset"]])
            if settings["method"] == TUNED:
                own["moved_widths"] = list(MOVED[settings["dataset"]])
            found.append(RunSpec("blocks-accuracy", RECIPE, {**settings, **own}))
    return found


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train (or fetch) the lazy network, compile it, and measure its accuracy and time, and those of dense nets."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    theirs = {key: value for key, value in settings.items() if key not in OWN}  # what the policy is known by
    lazy, policy, trained = policies.learned(theirs, data, artefacts)
    fast = kernels.compile(lazy, "one")
    scores, mask = fast.evaluate(data.test.x)
    fresh, _ = obtain_target(targets.target_of(settings), data, artefacts)
    nets = dense_nets(fresh, trained, settings, data, artefacts)
    engines, skipped = timing.dense_engines(fresh, 1, settings["engines"])
    calls: dict[str, Any] = {"lazy": fast, **engines}
    for (moved, width), (net, _) in nets.items():
        if not moved:  # pictures that moved in training change no time
            own, _ = timing.dense_engines(net, 1, [name for name in engines if name != "compiled"])
            calls |= {f"{width}, {name}": engine for name, engine in own.items()}
    inputs = [np.ascontiguousarray(data.test.x[i : i + 1]) for i in range(TIMED)]
    with FileLock(paths.timing_lock()):
        times = timing.interleaved(calls, inputs, settings["repeats"])
    accuracy, bits = float((scores.argmax(1) == data.test.y).mean()), torch.from_numpy(mask)
    result = {
        "accuracy": accuracy,
        "target_accuracy": trained.result["test_accuracy"],
        "accuracy_ratio": accuracy / trained.result["test_accuracy"],
        "activity": lazy.partition.activity(bits).mean().item(),
        "compute": lazy.compute(bits),
        "skipped": skipped,
        **compared(times, tuple(engines)),
        **_dense(times, nets, trained.result["test_accuracy"]),
        **blocks.on_this_machine(),
    }
    cited = {"target": trained.cite(), "policy": policy.cite()}
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, cited)


def dense_nets(
    target: MLP, trained: Record, settings: Mapping[str, Any], data: Dataset, artefacts: RunStore
) -> dict[tuple[bool, int], tuple[MLP, Record]]:
    """Dense nets of each width distilled from the target, as controls are; where the lazy network's weights were
    fine-tuned on moved pictures, also nets that learned from those. By (moved, width)."""
    found = {}
    for moved, widths in ((False, settings["widths"]), (True, settings.get("moved_widths", []))):
        for width in widths:
            cost = sum(multiply_adds([data.train.x.shape[1], *[width] * len(target.hidden), data.classes]))
            found[moved, width] = obtain_control(
                target, trained, cost, data, artefacts, seed=settings["target_seed"],
                augment=settings["augment"] if moved else 0, **targets.TRAINING[data.name],
            )  # fmt: skip
    return found


def _dense(
    times: Mapping[str, np.ndarray], nets: Mapping[tuple[bool, int], tuple[MLP, Record]], full: float
) -> dict[str, Any]:
    """Time and accuracy ratio of the dense nets by width."""
    widths = sorted(width for moved, width in nets if not moved)
    engines = {width: [name for name in times if name.startswith(f"{width}, ")] for width in widths}
    measured = [min(float(np.median(times[name])) for name in engines[width]) for width in widths]
    micro = np.maximum.accumulate(measured).tolist()  # noise must not make a wider net faster
    found: dict[str, Any] = {}
    for moved, name in ((False, "dense"), (True, "moved")):
        own = sorted(width for kind, width in nets if kind == moved)
        if own:
            ratios = [nets[moved, width][1].result["test_accuracy"] / full for width in own]
            times_of_own = [micro[widths.index(width)] for width in own]
            found |= {f"{name}_width_us": times_of_own, f"{name}_ratios": ratios}
    return found


def label(settings: Mapping[str, Any]) -> str:
    """The name of a lazy network in tables and figures."""
    return f"{settings['method']}, {100 * settings['tau']:g}%"


def _groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(label(record.spec.settings), []).append(record)
    return found


def rivals(records: Sequence[Record]) -> list[Record]:
    """The targets that were fine-tuned in full on moved pictures (study `policies`): the widest dense nets there are
    beside the fine-tuned lazy network. None in the quick profile."""
    if not records or any(record.spec.settings["dataset"] == "digits" for record in records):
        return []
    return by_method(studies.records("policies", "paper", partial=True), "dense").get(DENSE, [])


def at_equal_time(record: Record, kind: str, widest: Sequence[Record]) -> float:
    """The accuracy ratio of a dense net ("dense", or "moved" for those that learned from moved pictures) that takes the
    lazy network's time, interpolated linearly in time between the widths and, beyond them, towards the target itself,
    as it was or fine-tuned in full (`widest`, see `rivals`). Below the narrowest it is that of the narrowest."""
    result, seed = record.result, record.spec.settings["target_seed"]
    tuned = [r.result["accuracy_ratio"] for r in widest if r.spec.settings["target_seed"] == seed]
    ends = {"dense": [1.0], "moved": tuned}[kind]
    micro = [*result[f"{kind}_width_us"], *[result["dense_us"][result["fastest"]]] * len(ends)]
    return float(np.interp(result["lazy_us"], micro, [*result[f"{kind}_ratios"], *ends]))


def _rival(group: Sequence[Record], kind: str, widest: Sequence[Record], less: bool = False) -> stats.Interval:
    """The interval of that ratio over the targets, or (`less`) of the lazy network's own less it."""
    found = [at_equal_time(record, kind, widest) for record in group]
    if less:
        found = [record.result["accuracy_ratio"] - rival for record, rival in zip(group, found, strict=True)]
    return stats.interval(found)


def table(records: Sequence[Record], widest: Sequence[Record]) -> list[dict[str, Any]]:
    """Each lazy network's time and accuracy ratio beside those of dense nets of equal time (`widest` from `rivals`)."""
    return [
        {
            "network": name,
            "targets": len(group),
            "ratio": over_runs(group, lambda r: r["accuracy_ratio"]),
            "activity": over_runs(group, lambda r: r["activity"]),
            "compute": over_runs(group, lambda r: r["compute"]),
            "lazy, us": over_runs(group, lambda r: r["lazy_us"]),
            "fastest dense, us": over_runs(group, lambda r: r["dense_us"][r["fastest"]]),
            "speed-up": over_runs(group, lambda r: r["speedup_vs_fastest"][0]),
            "dense of equal time": _rival(group, "dense", widest),
            "the same, moved pictures": _rival(group, "moved", widest) if "moved_ratios" in group[0].result else "",
        }
        for name, group in _groups(records).items()
    ]


def points(records: Sequence[Record], widest: Sequence[Record]) -> dict[str, np.ndarray]:
    """For the figure: (microseconds, accuracy ratio) of every lazy network by name, of "target" in full, as it was and
    fine-tuned (`widest`, see `rivals`), and of dense nets ("dense", and "dense, moved pictures": targets x widths x 2).
    """
    found = {
        name: np.array([(r.result["lazy_us"], r.result["accuracy_ratio"]) for r in group])
        for name, group in _groups(records).items()
    }
    for key, name in (("dense", "dense"), ("moved", "dense, moved pictures")):
        having = [r.result for r in records if f"{key}_ratios" in r.result]
        if having:
            found[name] = np.array([list(zip(r[f"{key}_width_us"], r[f"{key}_ratios"], strict=True)) for r in having])
    micro = [r.result["dense_us"][r.result["fastest"]] for r in records]
    found["target"] = np.array([(us, 1.0) for us in micro])
    if widest:
        found["target, fine-tuned"] = np.array([(np.mean(micro), r.result["accuracy_ratio"]) for r in widest])
    return found


def claims(records: Sequence[Record]) -> list[Claim]:
    """The trained networks are fast, and more accurate than dense nets that take as long."""
    found, widest = [], rivals(records)
    for name, group in _groups(records).items():
        if len(group) < 2:
            continue  # one target says nothing about another
        id = name.replace(", ", ".").replace("%", "").replace(" ", "-")
        speed = over_runs(group, lambda r: r["speedup_vs_fastest"][0])
        if group[0].spec.settings["tau"] == TAU:
            statement = f"{name}, batch 1: 3.5 times as fast as the fastest dense engine"
            found.append(judge(f"blocks.trained.{id}.speed", "ours", statement, speed, above=3.5))
        for key, rival in (
            ("dense", "the dense net of equal time"),
            ("moved", "the one that learned from moved pictures"),
        ):
            if f"{key}_ratios" in group[0].result:
                gain = _rival(group, key, widest, less=True)
                statement = f"{name}, batch 1: more accurate than {rival}"
                found.append(judge(f"blocks.trained.{id}.{key}", "ours", statement, gain, above=0.0))
    return found


def finding(records: Sequence[Record], widest: Sequence[Record]) -> str:
    """What the trained networks keep in which time, as a Markdown list with its numbers filled in."""
    lines = []
    for row in table(records, widest):
        kept, speed, rival = row["ratio"].format(3), row["speed-up"].format(1), row["dense of equal time"].format(3)
        lines.append(f"- **{row['network']}** keeps {kept} of the target's accuracy and is {speed} times as fast as "
                     f"the fastest dense engine; a dense net of equal time keeps {rival}.")  # fmt: skip
    return "\n".join(lines)


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 05 that are made from trained networks."""
    both = [*records, *rivals(records)]
    return {"blocks_accuracy": both, "blocks_accuracy_table": both}


STUDY = studies.Study(
    name="blocks-accuracy",
    title="Time against accuracy",
    notebook="05_block_speedups",
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=claims,
    promises=promises,
    audited=("accuracy", "accuracy_ratio", "activity"),
)
