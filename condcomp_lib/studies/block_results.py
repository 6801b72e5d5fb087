"""From timed rows to tables, figure data and claims (the studies `blocks` and `blocks-accuracy`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from condcomp_lib import stats
from condcomp_lib.claims import Claim, judge
from condcomp_lib.kernels import timing
from condcomp_lib.published import Answer
from condcomp_lib.runs import Record
from condcomp_lib.stats import Interval


def compared(times: Mapping[str, np.ndarray], dense: Sequence[str]) -> dict[str, Any]:
    """What a row records of its `times` (microseconds a call, by engine and repeat): medians, and how many times as
    fast as the fastest of the `dense` engines, with the bootstrap interval of the median of the repeats' ratios."""
    medians = {name: float(np.median(values)) for name, values in times.items()}
    fastest = timing.fastest(times, dense)
    controls = [name for name in times if name.startswith("control, ")]
    found: dict[str, Any] = {
        "lazy_us": medians["lazy"],
        "dense_us": {name: medians[name] for name in dense},
        "fastest": fastest,
        "speedup_vs_fastest": ratio(times[fastest], times["lazy"]),
    }
    if controls:
        control = timing.fastest(times, controls)
        found |= {"control_us": medians[control], "speedup_vs_control": ratio(times[control], times["lazy"])}
    for name, key in (("masked", "masked"), ("lazy at 100%", "full")):
        if name in times:
            found[f"{key}_us"] = medians[name]
    if "masked" in times:
        found["speedup_vs_masked"] = ratio(times["masked"], times["lazy"])
    if "lazy at 100%" in times:
        found["full_vs_fastest"] = ratio(times[fastest], times["lazy at 100%"])
    return found


def ratio(slow: np.ndarray, fast: np.ndarray) -> list[float]:
    """The median of `slow` / `fast` over repeats, and the ends of its interval."""
    found = stats.interval(slow / fast, statistic=np.median)
    return [found.estimate, found.low, found.high]


def of(records: Sequence[Record], **wanted: Any) -> list[Record]:
    """The records whose settings are these (and float32, one thread, the first network's shape unless asked for)."""
    plain = {"dtype": "float32", "threads": 1}
    if "architecture" not in wanted and records:
        plain |= {key: records[0].spec.settings[key] for key in ("architecture", "groups", "scope")}
    asked = {**plain, **wanted}
    return [r for r in records if all(r.spec.settings[key] == value for key, value in asked.items())]


def speedup(group: Sequence[Record], field: str = "speedup_vs_fastest") -> Interval:
    """The ratio of the record in which it is lowest: what is claimed must hold in every run of a row."""
    worst = min(group, key=lambda record: record.result[field][0])
    found = worst.result[field]
    return Interval(found[0], found[1], found[2], worst.spec.settings["repeats"], 0.95)


def promised(records: Sequence[Record]) -> list[Record]:
    """The records of the first network's rows that were measured in two runs (all of them in the quick profile)."""
    shape = ("architecture", "groups", "scope")
    again = [_row(record) for record in records if record.spec.settings["repeat"] == 1]
    first = [r for r in records if all(r.spec.settings[key] == records[0].spec.settings[key] for key in shape)]
    return [record for record in first if not again or _row(record) in again]


def _row(record: Record) -> tuple[Any, ...]:
    named = ("architecture", "groups", "scope", "batch", "mask", "dtype", "threads", "activity_asked")
    return tuple(record.spec.settings[key] for key in named)


def roofline_share(record: Record, records: Sequence[Record]) -> float:
    """The share of its roofline that a row reached, by the best that any of the records measured of the same processor
    and width of vectors with the same weights: a row alone may have met a busy machine."""
    alike = [r for r in records if all(r.result.get(k) == record.result.get(k) for k in ("processor", "lanes"))]
    machines = [r.result["machine"] for r in alike]
    most = timing.best([timing.Machine(**m) for m in machines if m["buffer"] == record.result["machine"]["buffer"]])
    threads, result = record.spec.settings["threads"], record.result
    least = max(result["executed"] / (most.multiply_adds * threads), result["read"] / most.bandwidth)
    return 1e6 * least / float(result["lazy_us"])


def rows(records: Sequence[Record], measured: Sequence[Record]) -> list[dict[str, Any]]:
    """The table of timed rows, in microseconds a call, of each the run in which the speed-up is lowest; `measured` are
    all records that say what the machine can do."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(_row(record), []).append(record)
    table = []
    for group in found.values():
        record = min(group, key=lambda r: r.result["speedup_vs_fastest"][0])
        settings, result = record.spec.settings, record.result
        table.append(
            {
                "batch": settings["batch"],
                "mask": settings["mask"],
                "weights": settings["dtype"],
                "threads": settings["threads"],
                "activity": f"{result['activity']:.3f}",
                "compute": f"{result['compute']:.3f}",
                "lazy, us": f"{result['lazy_us']:.0f}",
                "fastest dense, us": f"{result['dense_us'][result['fastest']]:.0f} ({result['fastest']})",
                "speed-up": speedup(group),
                "over the control": speedup(group, "speedup_vs_control"),
                "over masked dense": speedup(group, "speedup_vs_masked"),
                "share of roofline": f"{roofline_share(record, measured):.2f}",
            }
        )
    return table


def measured_on(record: Record) -> str:
    """What a time depends on beside the code, in words: processor, width of its vectors, versions of the engines."""
    result = record.result
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    vectors = f", vectors of {result['lanes']} float32 numbers" if "lanes" in result else ""
    return f"{result['processor']}{vectors}; {versions}"


def surface(records: Sequence[Record]) -> tuple[list[int], list[float], np.ndarray]:
    """Speed-up over the fastest dense engine (batches x activities, NaN where not measured) of the first network."""
    # The papers' own measure, at 18%, stands alone and would be a row and a column of its own.
    found = [
        r for r in of(records) if r.spec.settings["mask"] != "shared" and r.spec.settings["activity_asked"] != 0.18
    ]
    batches = sorted({r.spec.settings["batch"] for r in found})
    activities = sorted({r.spec.settings["activity_asked"] for r in found})
    grid = np.full((len(batches), len(activities)), np.nan)
    for i, batch in enumerate(batches):
        for j, activity in enumerate(activities):
            if group := of(found, batch=batch, activity_asked=activity):
                grid[i, j] = speedup(group).estimate
    return batches, activities, grid


def by_groups(records: Sequence[Record], batch: int) -> dict[str, np.ndarray]:
    """For each number of groups over the network: (measured activity in %, speed-up) of its rows at that batch."""
    found: dict[str, np.ndarray] = {}
    network = records[0].spec.settings
    for groups in sorted({r.spec.settings["groups"] for r in records if r.spec.settings["scope"] == "network"}):
        mine = of(records, architecture=network["architecture"], groups=groups, scope="network", batch=batch)
        mine = [record for record in mine if record.spec.settings["mask"] != "shared"]
        if len(mine) > 1:
            found[f"{groups} groups"] = _points(mine)
    return found


def by_sharing(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """For masks shared by 1, 8 and 32 examples: (measured activity in %, speed-up over dense at that batch)."""
    found = {}
    for batch in (1, 8, 32):
        mine = of(records, batch=batch, mask="one" if batch == 1 else "shared")
        if mine:
            found[f"shared by {batch}" if batch > 1 else "one example"] = _points(mine)
    return found


def _points(group: Sequence[Record]) -> np.ndarray:
    """(measured activity in %, speed-up) of each row, of its slowest run, by activity."""
    asked = sorted({record.spec.settings["activity_asked"] for record in group})
    runs = [[r for r in group if r.spec.settings["activity_asked"] == activity] for activity in asked]
    return np.array([(100 * same[0].result["activity"], speedup(same).estimate) for same in runs])


# What the companion promises of SVHN's 3072-800-800-800-10 with 16 groups over the network: name, row, field, level.
BARS: tuple[tuple[str, dict[str, Any], str, float], ...] = (
    ("one.25", {"batch": 1, "activity_asked": 0.25}, "speedup_vs_fastest", 4.0),
    ("one.6.25", {"batch": 1, "activity_asked": 0.0625}, "speedup_vs_fastest", 14.0),
    ("8.25", {"batch": 8, "mask": "per-example", "activity_asked": 0.25}, "speedup_vs_fastest", 1.9),
    ("128.25", {"batch": 128, "mask": "per-example", "activity_asked": 0.25}, "speedup_vs_fastest", 3.3),
    ("shared.128.25", {"batch": 128, "mask": "shared", "activity_asked": 0.25}, "speedup_vs_fastest", 4.5),
    ("masked.50.18", {"batch": 50, "mask": "per-example", "activity_asked": 0.18}, "speedup_vs_masked", 5.0),
)
AGAINST = {"speedup_vs_fastest": "the fastest dense engine", "speedup_vs_masked": "the net computed densely and masked"}


def claims(records: Sequence[Record]) -> list[Claim]:
    """The speed-ups, the share of the roofline, and what is lost where nothing is saved."""
    if not records or records[0].spec.settings["repeats"] < 10:
        return []  # the quick profile's times are for looking at
    found = []
    for name, row, field, level in BARS:
        if group := of(records, **row):
            mask = "" if row["batch"] == 1 else f", {group[0].spec.settings['mask']} mask{'s' * ('shared' not in name)}"
            asked = f"batch {row['batch']}{mask}, {100 * row['activity_asked']:g}% active"
            statement = f"{asked}: {level:g} times as fast as {AGAINST[field]}"
            found.append(judge(f"blocks.{name}", "ours", statement, speedup(group, field), above=level))
    grid = [(batch, activity) for batch in (1, 8, 32, 128, 512) for activity in (0.125, 0.25, 0.5)]
    rooflined = [r for batch, activity in grid for r in of(records, batch=batch, activity_asked=activity)
                 if r.spec.settings["mask"] != "shared"]  # fmt: skip
    if rooflined:
        shares = [roofline_share(record, records) for record in rooflined]
        middle, least = float(np.median(shares)), min(shares)
        for name, value, level in (("median", middle, 0.7), ("worst", least, 0.55)):
            statement = f"share of the roofline over batches 1 to 512 and 12.5 to 50% active, {name}"
            value_alone = Interval(value, value, value, len(shares), 0.95)
            found.append(judge(f"blocks.roofline.{name}", "ours", statement, value_alone, above=level))
    full = [record for record in of(records, activity_asked=1.0) if record.spec.settings["mask"] != "shared"]
    if full:
        statement = "100% active: at least 0.95 times as fast as the fastest dense engine, at the worst batch"
        found.append(judge("blocks.full", "ours", statement, speedup(full), above=0.95))
    return found


def answers(records: Sequence[Record]) -> list[Answer]:
    """The speed-ups that the papers report, by the nearest row."""
    place = {"notebook": "05_block_speedups", "figure": "blocks_table"}
    found = []
    shared = [r for r in records if r.spec.settings["architecture"] == "784-500-10"]
    if shared:
        percent = [100 * (value - 1) for value in shared[0].result["speedup_vs_fastest"]]
        ours = Interval(percent[0], percent[1], percent[2], shared[0].spec.settings["repeats"], 0.95)
        note = "784-500-10, one mask for 32 examples, 12.5% active, policy included, over the fastest dense engine"
        found.append(Answer("Ds4.06", ours, "forward_speedup_percent", note, **place))
    if group := of(records, batch=128, mask="per-example", activity_asked=0.125):
        note = "3072-800-800-800-10, 12.5% active, batch 128, policy included, over the fastest dense engine"
        found.append(Answer("Fs41.01", speedup(group), "kernel_speedup", note, **place))
    if group := of(records, batch=1, activity_asked=0.0625):
        note = "3072-800-800-800-10, 6.25% active, batch 1, policy included, over the fastest dense engine"
        found.append(Answer("Sfc.01", speedup(group), "forward_speedup", note, **place))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Figures and tables of notebook 05 that are made from timed rows."""
    return dict.fromkeys(("blocks_sparsity", "blocks_surface", "blocks_table"), records)
