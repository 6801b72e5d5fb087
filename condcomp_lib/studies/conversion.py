"""Your own network: plain torch models with odd widths made lazy by `lazify`, at every activity one may ask for."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from condcomp_lib import stats, studies
from condcomp_lib.claims import Claim, judge
from condcomp_lib.conversion import lazify
from condcomp_lib.datasets import Dataset, Split
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore
from condcomp_lib.studies.blocks import on_this_machine
from condcomp_lib.studies.policy_results import no_answers
from condcomp_lib.sweep import torch_threads
from condcomp_lib.training import accuracy, shelf

RECIPE = 2
NOTEBOOK = "07_your_own_network"
NETS: dict[str, dict[str, tuple[int, ...]]] = {
    "quick": {"digits": (127, 93)},
    "paper": {"mnist": (1201, 1003), "svhn": (1021, 807, 603)},
}
LEARNING: dict[str, dict[str, int]] = {
    "digits": {"epochs": 30, "batch": 32},
    "mnist": {"epochs": 6, "batch": 128},
    "svhn": {"epochs": 8, "batch": 128},
}
ACTIVITIES = {"quick": (0.25,), "paper": (0.02, 0.05, 0.1, 0.25, 0.5, 0.8)}
MAIN = 0.25  # the activity that is repeated with other seeds, and with fine-tuning
SEEDS = {"quick": 1, "paper": 2}
SECONDS = 170.0  # for one conversion, all told
LONG = {"svhn": 480.0}  # ... where fine-tuning is not done by then
THREADS = {"quick": 1, "paper": 2}
FROZEN, TUNED, LONGER = "policy only", "fine-tuned", "fine-tuned longer"
NEAR, LEAST, LEAST_TUNED, FASTER = 0.01, 0.95, 0.99, 3.0  # what is promised


def specs(profile: str) -> list[RunSpec]:
    """One run per network, activity, way and seed."""
    found = []
    for dataset, hidden in NETS[profile].items():
        rows = [(activity, FROZEN, 0) for activity in ACTIVITIES[profile]]
        rows += [(MAIN, FROZEN, seed) for seed in range(1, SEEDS[profile])]
        rows += [(MAIN, TUNED, seed) for seed in range(SEEDS[profile])] if profile == "paper" else []
        rows += [(MAIN, LONGER, seed) for seed in range(SEEDS[profile])] if dataset in LONG else []
        for activity, way, seed in rows:
            seconds = LONG[dataset] if way == LONGER else SECONDS
            settings = {"dataset": dataset, "architecture": "-".join(map(str, hidden)), "learning": LEARNING[dataset],
                        "activity_asked": activity, "method": way, "seconds": seconds,
                        "threads": THREADS[profile], "split": "test", "target_seed": seed}  # fmt: skip
            found.append(RunSpec("conversion", RECIPE, settings))
    return found


def plain_model(inputs: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """A model as users have them, normalised and with dropout, of plain torch layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for below, width in zip([inputs, *hidden], hidden, strict=False):
        layers += [nn.Linear(below, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], classes))


def learned(settings: Mapping[str, Any], data: Dataset, artefacts: RunStore) -> nn.Sequential:
    """The trained model of a run, from the artefact cache or trained now by a plain loop."""
    own = {key: settings[key] for key in ("dataset", "architecture", "learning", "target_seed")}
    torch.manual_seed(settings["target_seed"])
    model = plain_model(data.train.x.shape[1], list(map(int, settings["architecture"].split("-"))), data.classes)

    def trained(_: RunSpec) -> Outcome:
        x, y = pictures(data.train, data), torch.from_numpy(data.train.y)
        how = settings["learning"]
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, how["epochs"])
        for _epoch in range(how["epochs"]):
            for rows in torch.randperm(len(x)).split(how["batch"]):
                loss = cross_entropy(model.train()(x[rows]), y[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            schedule.step()
        return Outcome({}, {name: value.numpy() for name, value in model.state_dict().items()})

    record = shelf(artefacts, data).obtain(RunSpec("plain-models", 1, own), trained)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in record.arrays().items()})
    return model.eval()


def pictures(split: Split, data: Dataset) -> torch.Tensor:
    """The examples as images (float32, examples x channels x height x width)."""
    return torch.from_numpy(split.x).reshape(-1, *data.shape)


def compute(spec: RunSpec, artefacts: RunStore) -> Outcome:
    """Train (or fetch) a plain model, convert it with the examples that it has learned from, measure on test data."""
    settings = spec.settings
    data = studies.dataset(settings["dataset"])
    model, started = learned(settings, data, artefacts), time.perf_counter()
    given, test = ((pictures(split, data), torch.from_numpy(split.y)) for split in (data.train, data.test))
    with torch_threads(settings["threads"]):
        fast = lazify(model, given, settings["activity_asked"], finetune=settings["method"] != FROZEN, test=test,
                      seconds=settings["seconds"], seed=settings["target_seed"], progress=False)  # fmt: skip
    seconds = time.perf_counter() - started
    # Measured here again, from what users see: the model as it is, and the network's answers.
    scores, mask = fast.evaluate(torch.from_numpy(data.test.x))
    assert fast.report is not None
    with torch.inference_mode():
        full = accuracy(lambda x: model(x.reshape(-1, *data.shape)), data.test)
    right = (scores.argmax(1) == torch.from_numpy(data.test.y)).double().mean().item()
    result = {
        "target_accuracy": full,
        "accuracy": right,
        "accuracy_ratio": right / full,
        "activity": fast.lazy.partition.activity(mask).mean().item(),
        "compute": fast.lazy.compute(mask),
        "conversion_seconds": seconds,
        "report": fast.report,
        **on_this_machine(),
    }
    return Outcome(result, None, {"note": data.note, "checksum": data.checksum}, None, seconds)


def _groups(records: Sequence[Record]) -> dict[tuple[str, str, float], list[Record]]:
    found: dict[tuple[str, str, float], list[Record]] = {}
    for record in records:
        settings = record.spec.settings
        found.setdefault((settings["dataset"], settings["method"], settings["activity_asked"]), []).append(record)
    return found


def speed(record: Record, batch: int = 1) -> float:
    """How many times as fast as the fastest dense engine."""
    found: float = record.result["report"]["latency"][str(batch)]["speedup"]
    return found


def control(record: Record) -> float:
    """What the dense net of equal compute keeps of the accuracy, on the same examples."""
    found: float = record.result["report"]["control"]["ratio"]
    return found


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per network, way and activity: what is kept on test data, at which activity, and in which time."""
    return [
        {
            "data": dataset,
            "network": group[0].spec.settings["architecture"],
            "way": way,
            "asked, %": f"{100 * asked:g}",
            "found, %": f"{100 * stats.interval([r.result['activity'] for r in group]).estimate:.1f}",
            "full accuracy": stats.interval([r.result["target_accuracy"] for r in group]),
            "ratio": stats.interval([r.result["accuracy_ratio"] for r in group]),
            "compute": stats.interval([r.result["compute"] for r in group]),
            "dense, equal compute": stats.interval([control(r) for r in group]),
            "speed-up, 1": f"{min(speed(r) for r in group):.1f}",
            "speed-up, 128": f"{min(speed(r, 128) for r in group):.1f}",
            "seconds": f"{max(r.result['conversion_seconds'] for r in group):.0f}",
            "seeds": len(group),
        }
        for (dataset, way, asked), group in _groups(records).items()
    ]


def fronts(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """For the figure: activity, accuracy ratio, speed-up of one example and of 128, and the accuracy ratio of the dense
    net of equal compute (runs x 5), by network and way."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for record in records:
        name = f"{record.spec.settings['dataset']}, {record.spec.settings['method']}"
        own = (record.result["activity"], record.result["accuracy_ratio"], speed(record), speed(record, 128))
        found.setdefault(name, []).append((*own, control(record)))
    return {name: np.array(rows) for name, rows in found.items()}


def finding(records: Sequence[Record]) -> str:
    """What conversions at the main activity keep and gain, as a Markdown list with its numbers filled in."""
    lines = []
    for row in table(records):
        if row["asked, %"] == f"{100 * MAIN:g}":
            lines.append(f"- **{row['data']}, {row['network']}, {row['way']}**: {row['found, %']}% of the neurons keep "
                         f"{row['ratio'].format(3)} of the accuracy at {row['compute'].format(2)} of the compute, "
                         f"{row['speed-up, 1']} times as fast one at a time and {row['speed-up, 128']} times in "
                         f"minibatches of 128; a dense net of equal compute keeps "
                         f"{row['dense, equal compute'].format(3)}. Conversion: {row['seconds']} s.")  # fmt: skip
    return "\n".join(lines)


def claims(records: Sequence[Record]) -> list[Claim]:
    """The promises: asked activity is met, accuracy kept, time saved. Brief runs on digits judge nothing."""
    found = []
    by_data: dict[str, list[float]] = {}
    for record in records:
        settings = record.spec.settings
        if settings["dataset"] != "digits":
            off = abs(record.result["activity"] - settings["activity_asked"])
            by_data.setdefault(settings["dataset"], []).append(off)
    for dataset, offs in by_data.items():
        statement = f"{dataset}: activity within a point of what was asked, 2% to 80%, on test data"
        found.append(judge(f"conversion.{dataset}.activity", "ours", statement, stats.interval(offs), below=NEAR))
    for (dataset, way, asked), group in _groups(records).items():
        if dataset == "digits" or asked != MAIN:
            continue
        name, id = f"{dataset}, {way}, {100 * asked:g}%", f"conversion.{dataset}.{way.replace(' ', '-')}"
        ratio = stats.interval([r.result["accuracy_ratio"] for r in group])
        least = LEAST if way == FROZEN else LEAST_TUNED
        found.append(judge(f"{id}.ratio", "ours", f"{name}: keeps {least:g} of the accuracy", ratio, above=least))
        more = stats.interval([r.result["accuracy_ratio"] - control(r) for r in group])
        found.append(judge(f"{id}.control", "ours", f"{name}: keeps more than a dense net of equal compute", more,
                           above=0.0))  # fmt: skip
        fast = stats.interval([speed(r) for r in group])
        statement = f"{name}, batch 1: {FASTER:g} times as fast as the fastest dense engine"
        found.append(judge(f"{id}.speed", "ours", statement, fast, above=FASTER))
    return found


def promises(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """Table and figure of notebook 07."""
    return dict.fromkeys(("conversion_table", "conversion_activity"), records)


STUDY = studies.Study(
    name="conversion",
    title="Your own network",
    notebook=NOTEBOOK,
    specs=specs,
    compute=compute,
    answers=no_answers,
    claims=claims,
    promises=promises,
    audited=("accuracy", "activity"),
)
