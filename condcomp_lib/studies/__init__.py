"""Studies: the runs, tables and figures of one paper section, one module each.

A study module defines `STUDY`. Functions go from records to numbers; drawing and formatting lie above, in `plots` and
`tables`.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from condcomp_lib import datasets, paths, published, sweep
from condcomp_lib.claims import Claim
from condcomp_lib.errors import CondcompError, unknown
from condcomp_lib.provenance import environment
from condcomp_lib.published import Answer
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore

NAMES = (
    "start",
    "targets",
    "partitioning",
    "partitioning-splits",
    "partitioning-ladder",
    "policies",
    "policies-dpg",
    "policies-bias",
    "policies-search",
    "pretraining",
    "pretraining-search",
    "pretraining-cost",
    "pretraining-variance",
    "coactivation",
    "blocks",
    "blocks-accuracy",
    "joint",
    "joint-search",
    "joint-switches",
    "joint-first",
    "joint-time",
    "conv",
    "conv-time",
    "explorer",
    "conversion",
)

NOISE = "noise"  # stands for a data set where runs only measure time: standard normal numbers

# Which notebook takes up which part of the papers, by the start of the ids in `published.csv`.
NOTEBOOKS = {
    "Pt": "03_pretraining", "Ps5.": "01_partitioning", "Ps51": "01_partitioning", "Ps52": "01_partitioning",
    "Ps55.01": "03_pretraining", "Ps55": "04_coactivation", "Ds4.06": "05_block_speedups", "Ds": "06_joint_training",
    "Fs41": "05_block_speedups", "Fs": "06_joint_training", "Ff": "06_joint_training",
    "Sconv": "06_joint_training", "Send": "00_start_here", "Sfc": "05_block_speedups",
}  # fmt: skip


class Compute(Protocol):
    """How a study computes one run, with trained weights taken from and kept in `artefacts`."""

    def __call__(self, spec: RunSpec, artefacts: RunStore) -> Outcome:
        """Make the run of `spec`."""
        ...


class MissingRuns(CondcompError):
    """Stored runs that a notebook of the paper profile needs and does not compute by surprise."""


@dataclass(frozen=True)
class Study:
    """What the other parts ask of a study.

    `specs(profile)` is the run table; `compute(spec, artefacts)` makes one run; `answers(records)` are its numbers
    beside published ids; `claims(records)` its claims; `promises(records)` names the figures and tables that its
    notebook must write, with the records that each is made from; `audited` the fields that an audit compares.
    """

    name: str
    title: str
    notebook: str
    specs: Callable[[str], list[RunSpec]]
    compute: Compute
    answers: Callable[[Sequence[Record]], list[Answer]]
    claims: Callable[[Sequence[Record]], list[Claim]]
    promises: Callable[[Sequence[Record]], dict[str, Sequence[Record]]]
    audited: tuple[str, ...]


def get(name: str) -> Study:
    """The study of that name; raises UsageError listing the known ones."""
    if name not in NAMES:
        raise unknown("study", name, NAMES)
    study: Study = importlib.import_module(f"condcomp_lib.studies.{name.replace('-', '_')}").STUDY
    return study


def family(name: str) -> list[str]:
    """The study of that name and those whose names go on from it after a hyphen; "all" stands for every study.

    >>> family("partitioning")
    ['partitioning', 'partitioning-splits', 'partitioning-ladder']
    """
    if name == "all":
        return list(NAMES)
    return [get(name).name, *(other for other in NAMES if other.startswith(f"{name}-"))]


def run(name: str, profile: str, **options: Any) -> list[Record]:
    """Compute what the store of `profile` lacks of the study (options as for `sweep.sweep`); return its records."""
    study, store = get(name), RunStore(paths.store(profile))
    if not options.get("scheduler"):  # what a cluster can do is known once it answers
        sweep.check_backend(options.get("backend", "loky"))
    for data in {spec.settings["dataset"] for spec in missing(name, profile)} - {NOISE}:
        datasets.fetch(data)  # once, here: a data set that cannot be had is one error, not one of every worker
    artefacts = RunStore(paths.artefacts(profile), environment())
    return sweep.sweep(study.specs(profile), functools.partial(study.compute, artefacts=artefacts), store, **options)


def missing(name: str, profile: str) -> list[RunSpec]:
    """The runs of the study's table that the store of `profile` lacks."""
    store = RunStore(paths.store(profile))
    return [spec for spec in get(name).specs(profile) if store.get(spec) is None]


def records(name: str, profile: str, *, partial: bool = False) -> list[Record]:
    """The study's records for a notebook.

    Quick profile: computed now where the temporary store lacks them. Paper profile: read from the store; runs it lacks
    raise MissingRuns with the command that computes them, or are left out with `partial=True` (`missing` lists them).
    """
    if paths.check_profile(profile) == "quick":
        return run(name, profile)
    wanted, store = get(name).specs(profile), RunStore(paths.store(profile))
    found = [record for spec in wanted if (record := store.get(spec)) is not None]
    if len(found) < len(wanted) and not partial:
        raise MissingRuns(
            f"{len(wanted) - len(found)} of {len(wanted)} runs of study {name!r} are not in {store.folder}; "
            f"compute them with: condcomp run {name} --profile {profile}"
        )
    return found


def audit(name: str, profile: str, *, sample: int, artefacts: RunStore, seed: int = 0) -> list[sweep.AuditRow]:
    """Recompute a random sample of the study's stored runs; `artefacts` is an empty cache, so nothing is reused.

    Another machine rounds differently, and training amplifies that to the size of another seed: allowed is what four
    standard deviations of the difference of two seeds come to, estimated from the *other* stored runs that differ in
    their seeds only (so that a wrong run cannot widen its own tolerance), at least half a point and at most five.
    """
    study, known = get(name), records(name, profile, partial=True)
    compute = functools.partial(study.compute, artefacts=artefacts)

    def tolerance(record: Record) -> dict[str, Any]:
        others = [r for r in known if r.name != record.name and _but_for_seeds(r.spec) == _but_for_seeds(record.spec)]
        fields = [field for field in study.audited if field in record.result]
        if len(others) < 2:
            return {field: np.full(np.shape(record.result[field]), 0.05) for field in fields}
        spread = {field: np.std([other.result[field] for other in others], axis=0, ddof=1) for field in fields}
        return {field: np.clip(4 * math.sqrt(2) * deviation, 0.005, 0.05) for field, deviation in spread.items()}

    return sweep.audit(known, compute, tolerance, sample=sample, seed=seed)


def _but_for_seeds(spec: RunSpec) -> dict[str, Any]:
    """The settings that two repetitions share: all but the seeds, the names of runs that carry seeds themselves, and
    whether a control is trained."""
    own = ("target", "control")
    return {key: value for key, value in spec.settings.items() if not key.endswith("_seed") and key not in own}


@functools.lru_cache(maxsize=1)
def dataset(name: str) -> datasets.Dataset:
    """The data set by name, kept in memory between the runs of one worker (the last one only)."""
    return datasets.load(name)


def promised(name: str, profile: str) -> dict[str, Sequence[Record]]:
    """The figures and tables that the study's notebook must write, each with the records it is made from.

    Notebook 00 also writes the overview of all studies; it speaks of the paper profile only.
    """
    study = get(name)
    items = dict(study.promises(records(name, profile, partial=True)))
    return items | ({"overview": everything(profile)} if (name, profile) == ("start", "paper") else {})


def everything(profile: str) -> list[Record]:
    """The stored records of all studies, as far as they are there."""
    return [record for name in NAMES for record in records(name, profile, partial=True)]


def answers() -> list[Answer]:
    """All studies' numbers beside published ids, from the paper profile's store."""
    return [answer for name in NAMES for answer in get(name).answers(records(name, "paper", partial=True))]


def overview() -> list[dict[str, Any]]:
    """One row per published id with this companion's number, or "not yet"."""
    return published.overview(answers())


def progress() -> str:
    """One sentence on how complete the paper profile's store is."""
    counts = [(name, len(missing(name, "paper")), len(get(name).specs("paper"))) for name in NAMES]
    lacking = [f"{count} of {total} of {name}" for name, count, total in counts if count]
    total = sum(total for *_, total in counts)
    return f"Runs missing from the store: {', '.join(lacking)}." if lacking else f"All {total} runs are in the store."


def items() -> list[dict[str, str]]:
    """One row per part of a paper: its notebook, figure, command, and how many of its ids are answered."""
    by_id = {answer.id: answer for answer in answers()}
    groups: dict[str, list[str]] = {}
    for row in published.load().values():
        groups.setdefault(f"{row.paper}, {row.where}", []).append(row.id)
    commands: dict[str, list[str]] = {}
    for name in NAMES:
        commands.setdefault(get(name).notebook, []).append(f"`condcomp run {name}`")
    rows = []
    for item, ids in groups.items():
        found = [by_id[id] for id in ids if id in by_id]
        books = sorted({_planned(id) for id in ids} | {answer.notebook for answer in found})
        rows.append(
            {
                "paper item": item,
                "notebook": ", ".join(book if book in commands else f"{book} (not yet)" for book in books),
                "figure": ", ".join(sorted({answer.figure for answer in found})) or "not yet",
                "command": ", ".join(command for book in books for command in commands.get(book, [])) or "not yet",
                "answered": f"{len(found)} of {len(ids)}",
            }
        )
    return rows


def _planned(id: str) -> str:
    for beginning, notebook in NOTEBOOKS.items():
        if id.startswith(beginning):
            return notebook
    raise CondcompError(f"no notebook takes up the published id {id!r}; add its beginning to studies.NOTEBOOKS")
