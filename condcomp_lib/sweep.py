"""Sweeps: compute what a store lacks, in parallel, resumably; and the audit, which computes stored runs once more.

Every worker writes its finished run into the store itself, so stopping a sweep (Ctrl-C, a crash, `kill -9`) loses at
most the runs in progress, and starting it again computes only what is missing.
"""

import contextlib
import math
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import joblib
from joblib.parallel import BACKENDS, EXTERNAL_BACKENDS
from tqdm.auto import tqdm

from condcomp_lib.errors import CondcompError, unknown
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore

Compute = Callable[[RunSpec], Outcome]
Tolerance = Callable[[Record], Mapping[str, float]]


class SweepError(CondcompError):
    """Some runs of a sweep failed; the others are in the store."""


def sweep(
    specs: Iterable[RunSpec],
    compute: Compute,
    store: RunStore,
    *,
    jobs: int | None = None,
    threads: int = 1,
    backend: str = "loky",
    progress: bool = True,
) -> list[Record]:
    """Return the records of `specs`, computing those that `store` lacks.

    Arguments: `compute` is a module-level function (workers import it); `jobs` the number of workers (None: one per
    core); `threads` the torch threads of each worker, one by default because results depend on it; `backend` any name
    joblib knows ("loky": processes; "sequential"; "dask" once dask.distributed is installed and has a client).
    Raises SweepError after all other runs have finished when some failed, UsageError for an unknown backend.

    >>> toy = [RunSpec("toy", 1, {"seed": seed}) for seed in range(3)]
    >>> len(sweep(toy, lambda spec: Outcome({"accuracy": 0.5}), RunStore("/tmp/store")))  # doctest: +SKIP
    3
    """
    if backend not in BACKENDS and backend not in EXTERNAL_BACKENDS:
        raise unknown("backend", backend, [*BACKENDS, *EXTERNAL_BACKENDS])
    wanted = {spec.name: spec for spec in specs}
    store.clean()
    found = {name: record for name, spec in wanted.items() if (record := store.get(spec)) is not None}
    missing = [spec for name, spec in wanted.items() if name not in found]
    jobs = min(jobs or os.cpu_count() or 1, max(1, len(missing)))
    failures: dict[str, str] = {}
    # The bar's clock starts with this sweep, so the time left is that of the missing runs only.
    with (
        _workers(backend, jobs, threads),
        tqdm(total=len(missing), unit="run", disable=not (progress and missing)) as bar,
    ):
        bar.set_description(f"{len(found)} of {len(wanted)} runs stored" if found else "runs")
        tasks = (joblib.delayed(_one)(store, spec, compute, threads) for spec in missing)
        for name, failure in joblib.Parallel(return_as="generator_unordered")(tasks) if missing else ():
            if failure:
                failures[name] = failure
                bar.write(failure, file=sys.stderr)
            bar.update()
    if failures:
        first = next(iter(failures))
        reason = failures[first].strip().splitlines()[-1]
        raise SweepError(
            f"{len(failures)} of {len(missing)} runs failed, the rest is stored; first: "
            f"{wanted[first].study} {dict(wanted[first].settings)}: {reason}"
        )
    return [found.get(name) or _must(store, spec) for name, spec in wanted.items()]


@dataclass(frozen=True)
class AuditRow:
    """One recomputed number of an audit beside the stored one."""

    name: str
    field: str
    stored: float
    recomputed: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the two differ by no more than the stated tolerance."""
        return math.isfinite(self.recomputed) and abs(self.stored - self.recomputed) <= self.allowed


def audit(
    records: Iterable[Record], compute: Compute, tolerance: Tolerance, *, sample: int, seed: int = 0
) -> list[AuditRow]:
    """Compute a random sample of stored runs from scratch and compare field by field.

    `tolerance(record)` names the compared fields of the result with the largest difference each may have; `compute`
    must not reuse trained weights (give it an empty artefact cache). `sample` larger than the store audits all of it.
    """
    if sample < 1:
        raise CondcompError(f"an audit samples at least one run, not {sample}")
    known = sorted(records, key=lambda record: record.name)
    rows = []
    for record in tqdm(random.Random(seed).sample(known, min(sample, len(known))), unit="run", desc="audit"):
        with _torch_threads(record.provenance.get("threads") or 1):
            result = compute(record.spec).result
        for field, allowed in tolerance(record).items():
            rows.append(AuditRow(record.name, field, record.result[field], result.get(field, math.nan), allowed))
    return rows


def _one(store: RunStore, spec: RunSpec, compute: Compute, threads: int) -> tuple[str, str | None]:
    """Compute one run in a worker; an error comes back as text, so that one bad run does not stop the others."""
    try:
        with _torch_threads(threads):
            store.obtain(spec, compute)
    except Exception:
        return spec.name, traceback.format_exc()
    return spec.name, None


def _must(store: RunStore, spec: RunSpec) -> Record:
    record = store.get(spec)
    if record is None:
        raise SweepError(f"run {spec.name} of {spec.study} vanished from {store.folder} while the sweep ran")
    return record


@contextlib.contextmanager
def _workers(backend: str, jobs: int, threads: int) -> Iterator[None]:
    name = "sequential" if jobs == 1 and backend == "loky" else backend
    options = {"inner_max_num_threads": threads} if name == "loky" else {}
    with joblib.parallel_config(backend=name, n_jobs=jobs, **options):
        yield


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    torch = sys.modules.get("torch")  # a study that uses torch has imported it by the time its function is here
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
