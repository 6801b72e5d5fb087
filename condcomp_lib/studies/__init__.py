"""Studies: the runs, tables and figures of one paper section, one module each.

A study module defines `STUDY`. Functions go from records to numbers; drawing and formatting lie above, in `plots` and
`tables`.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from condcomp_lib import datasets, paths, published, sweep
from condcomp_lib.claims import Claim
from condcomp_lib.errors import CondcompError, unknown
from condcomp_lib.published import Answer
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore

NAMES = ("start",)

# Which notebook takes up which part of the papers, by the start of the ids in `published.csv`.
NOTEBOOKS = {
    "Pt": "03_pretraining", "Ps5.": "01_partitioning", "Ps51": "01_partitioning", "Ps52": "01_partitioning",
    "Ps55": "03_pretraining", "Ds4.06": "05_block_speedups", "Ds": "06_joint_training",
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
    beside published ids; `claims(records)` its claims; `promises(profile)` names the figures and tables that its
    notebook must write; `tolerance(record)` how far a recomputed result may differ, by field.
    """

    name: str
    title: str
    notebook: str
    specs: Callable[[str], list[RunSpec]]
    compute: Compute
    answers: Callable[[Sequence[Record]], list[Answer]]
    claims: Callable[[Sequence[Record]], list[Claim]]
    promises: Callable[[str], list[str]]
    tolerance: Callable[[Record], dict[str, float]]


def get(name: str) -> Study:
    """The study of that name; raises UsageError listing the known ones."""
    if name not in NAMES:
        raise unknown("study", name, NAMES)
    return importlib.import_module(f"condcomp_lib.studies.{name}").STUDY


def run(name: str, profile: str, **options: Any) -> list[Record]:
    """Compute what the store of `profile` lacks of the study (options as for `sweep.sweep`); return its records."""
    study = get(name)
    compute = functools.partial(study.compute, artefacts=RunStore(paths.artefacts(profile)))
    return sweep.sweep(study.specs(profile), compute, RunStore(paths.store(profile)), **options)


def records(name: str, profile: str, *, partial: bool = False) -> list[Record]:
    """The study's records for a notebook.

    Quick profile: computed now where the temporary store lacks them. Paper profile: read from the store; runs it lacks
    raise MissingRuns with the command that computes them, or are left out with `partial=True`.
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
    """Recompute a random sample of the study's stored runs; `artefacts` is an empty cache, so nothing is reused."""
    study = get(name)
    compute = functools.partial(study.compute, artefacts=artefacts)
    return sweep.audit(records(name, profile, partial=True), compute, study.tolerance, sample=sample, seed=seed)


@functools.lru_cache(maxsize=1)
def dataset(name: str) -> datasets.Dataset:
    """The data set by name, kept in memory between the runs of one worker (the last one only)."""
    return datasets.load(name)


def inputs(item: str, name: str, profile: str) -> list[Record]:
    """The records that a figure or table is made from: its study's, or those of all studies for the overview."""
    return everything(profile) if item == "overview" else records(name, profile, partial=True)


def everything(profile: str) -> list[Record]:
    """The stored records of all studies, as far as they are there."""
    return [record for name in NAMES for record in records(name, profile, partial=True)]


def overview() -> list[dict[str, Any]]:
    """One row per published id with this companion's number from the paper profile's store, or "not yet"."""
    answers = [a for name in NAMES for a in get(name).answers(records(name, "paper", partial=True))]
    return published.overview(answers)


def items() -> list[dict[str, str]]:
    """One row per part of a paper: its notebook, figure, command, and how many of its ids are answered."""
    answers = {a.id: a for name in NAMES for a in get(name).answers(records(name, "paper", partial=True))}
    groups: dict[tuple[str, str], list[str]] = {}
    for row in published.load().values():
        groups.setdefault((row.paper, row.where), []).append(row.id)
    rows = []
    for (paper, where), ids in groups.items():
        found = [answers[id] for id in ids if id in answers]
        planned = {next(n for start, n in NOTEBOOKS.items() if id.startswith(start)) for id in ids}
        books = sorted(planned | {a.notebook for a in found})
        there = {study.notebook: study.name for study in map(get, NAMES)}
        rows.append({
            "paper item": f"{paper}, {where}",
            "notebook": ", ".join(book if book in there else f"{book} (not yet)" for book in books),
            "figure": ", ".join(sorted({a.figure for a in found})) or "not yet",
            "command": ", ".join(f"condcomp run {there[book]}" for book in books if book in there) or "not yet",
            "answered": f"{len(found)} of {len(ids)}",
        })  # fmt: skip
    return rows
