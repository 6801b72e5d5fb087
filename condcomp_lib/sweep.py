"""Sweeps: compute what a store lacks, in parallel, resumably; and the audit, which computes stored runs once more.

Every worker writes its finished run into the store itself, so stopping a sweep (Ctrl-C, a crash, `kill -9`) loses at
most the runs in progress, and starting it again computes only what is missing.
"""

import concurrent.futures
import contextlib
import functools
import importlib
import math
import random
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
from joblib.parallel import BACKENDS, EXTERNAL_BACKENDS
from tqdm.auto import tqdm

from condcomp_lib.errors import CondcompError, UsageError, unknown
from condcomp_lib.provenance import environment
from condcomp_lib.runs import Outcome, Record, RunSpec, RunStore

CONNECT_SECONDS = 10  # in which a Dask scheduler must answer

KILLED = (
    "a worker process was killed, perhaps for want of memory; finished runs are stored: start again, with fewer jobs "
    "if memory is short"
)

Compute = Callable[[RunSpec], Outcome]
Answer = tuple[str, bool, str, bool]  # a run's name, whether it is stored, what failed, whether others are pointless
Answers = Generator[Answer, None, None]
Run = Callable[[RunSpec], Answer]
Tolerance = Callable[[Record], Mapping[str, Any]]


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
    scheduler: str | None = None,
    progress: bool = True,
) -> list[Record]:
    """Return the records of `specs`, computing those that `store` lacks.

    Arguments: `compute` is a module-level function (workers import it); `jobs` the number of workers (None: one per
    core); `threads` the torch threads of each worker, one by default because results depend on it; `backend` any name
    joblib knows but "threading" ("loky": processes; "sequential"), or "dask" once dask.distributed has a client, or
    with the address of a `scheduler`, "tcp://...": all workers of that cluster, which may come and go meanwhile, have
    one thread each and share the store's folder.
    Raises SweepError after all other runs have finished when some failed, and at once where going on is pointless (no
    data, no room, changed code); UsageError for an unknown backend.

    >>> import tempfile
    >>> toy = [RunSpec("toy", 1, {"seed": seed}) for seed in range(3)]
    >>> store = RunStore(tempfile.mkdtemp())
    >>> len(sweep(toy, lambda spec: Outcome({"accuracy": 0.5}), store, jobs=1, progress=False))
    3
    """
    with connected(backend, scheduler):
        check_backend(backend)
        return _swept(list(specs), compute, store, jobs, threads, backend, progress)


def _swept(
    specs: list[RunSpec], compute: Compute, store: RunStore, jobs: int | None, threads: int, backend: str,
    progress: bool,
) -> list[Record]:  # fmt: skip
    wanted = {spec.name: spec for spec in specs}
    store.clean()
    found = {name: record for name, spec in wanted.items() if (record := store.get(spec)) is not None}
    missing = [spec for name, spec in wanted.items() if name not in found]
    # Workers record the code of this process, and refuse to run other code under its name.
    store = RunStore(store.folder, environment())
    failures: dict[str, str] = {}
    # The bar's clock starts with this sweep, so the time left is that of the missing runs only.
    with tqdm(total=len(missing), unit="run", disable=not (progress and missing)) as bar:
        bar.set_description(f"{len(found)} of {len(wanted)} runs stored" if found else "runs")
        # What another sweep is computing is left for a second pass, so that two sweeps share the work.
        for wait in (False, True):
            finished = _pass(missing, compute, store, backend, jobs or joblib.cpu_count(), threads, wait)
            missing = []
            for name, done, failure in finished:
                if not done and not failure:
                    missing.append(wanted[name])
                    continue
                if failure:
                    failures[name] = failure
                    bar.write(failure, file=sys.stderr)
                bar.update()
    if failures:
        first = next(iter(failures))
        reason = failures[first].strip().splitlines()[-1]
        raise SweepError(
            f"{len(failures)} of {len(wanted) - len(found)} runs failed, the rest is stored; first: "
            f"{wanted[first].study} {dict(wanted[first].settings)}: {reason}"
        )
    return [found.get(name) or _must(store, spec) for name, spec in wanted.items()]


@contextlib.contextmanager
def connected(backend: str, scheduler: str | None) -> Iterator[None]:
    """A client of the Dask scheduler at an address, where one is given.

    Raises UsageError where nobody answers there, or another backend is asked for.
    """
    if scheduler is None:
        yield
        return
    if backend != "dask":
        raise UsageError(f"a scheduler goes with backend 'dask', not with {backend!r}")
    distributed = _distributed()
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_SECONDS)
    except (OSError, ValueError, TimeoutError) as error:
        told = f"no Dask scheduler answers at {scheduler!r}; an address looks like tcp://127.0.0.1:8786"
        raise UsageError(told) from error
    with client:
        yield


def _distributed() -> Any:
    """The package dask.distributed; raises UsageError where it is not installed."""
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise UsageError("backend 'dask' needs dask.distributed; install it with: pip install distributed") from error


def check_backend(backend: str) -> None:
    """Raise UsageError for a backend that joblib does not know or that sweeps cannot use."""
    known = sorted({*BACKENDS, *EXTERNAL_BACKENDS} - {"threading"})  # threads would share torch's thread count
    if backend not in known:
        raise unknown("backend", backend, known)
    if backend == "dask":
        try:
            _distributed().get_client()
        except ValueError as error:
            raise UsageError("backend 'dask' needs a client; make one with: distributed.Client(...)") from error


def _pass(
    specs: list[RunSpec], compute: Compute, store: RunStore, backend: str, jobs: int, threads: int, wait: bool
) -> Iterator[tuple[str, bool, str]]:
    """Run what can be run; yields (name, whether it is stored, failure). Raises when going on is pointless."""
    if not specs:
        return
    run = functools.partial(_one, store, compute=compute, threads=threads, wait=wait)
    answers = _on_cluster(run, specs) if backend == "dask" else _by_joblib(run, specs, backend, jobs, threads)
    with contextlib.closing(answers):
        for name, done, failure, fatal in answers:
            if fatal:
                raise SweepError(f"{failure} (finished runs are stored)")
            yield name, done, failure


def _by_joblib(run: Run, specs: list[RunSpec], backend: str, jobs: int, threads: int) -> Answers:
    jobs = min(jobs, len(specs))
    name = "sequential" if jobs == 1 and backend == "loky" else backend
    options = {"inner_max_num_threads": threads} if name == "loky" else {}
    with joblib.parallel_config(backend=name, n_jobs=jobs, **options):
        try:
            yield from joblib.Parallel(return_as="generator_unordered")(joblib.delayed(run)(spec) for spec in specs)
        except concurrent.futures.BrokenExecutor as error:
            raise SweepError(KILLED) from error


def _on_cluster(run: Run, specs: list[RunSpec]) -> Answers:
    """Not by joblib: it computes in this process what is for a cluster of one worker, and has no use for later ones."""
    distributed = _distributed()
    client = distributed.get_client()
    if not client.nthreads():
        address = client.scheduler.address
        tqdm.write(f"no worker yet; waiting for one: dask worker {address} --nthreads 1", file=sys.stderr)
    futures = client.map(functools.partial(_in_worker, run), specs, pure=False)
    try:
        for _, answer in distributed.as_completed(futures, with_results=True):
            if isinstance(answer, BaseException):  # of a run that was called off, for the connection is lost
                raise SweepError("the Dask scheduler is gone; finished runs are stored: start again when it is back")
            yield answer
    except distributed.KilledWorker as error:
        raise SweepError(KILLED) from error
    finally:
        client.cancel(futures)


def _in_worker(run: Run, spec: RunSpec) -> Answer:
    threads = _distributed().get_worker().state.nthreads
    if threads > 1:
        return spec.name, False, f"a Dask worker must have one thread (--nthreads 1), not {threads}", True
    return run(spec)


@dataclass(frozen=True)
class AuditRow:
    """One recomputed number of an audit beside the stored one."""

    name: str
    field: str
    stored: float
    recomputed: float
    allowed: float
    same_data: bool

    @property
    def agrees(self) -> bool:
        """Whether the two differ by no more than the stated tolerance."""
        return math.isfinite(self.recomputed) and abs(self.stored - self.recomputed) <= self.allowed


def audit(
    records: Iterable[Record], compute: Compute, tolerance: Tolerance, *, sample: int, seed: int = 0
) -> list[AuditRow]:
    """Compute a random sample of stored runs from scratch and compare field by field.

    `tolerance(record)` names the compared fields of the result (numbers or lists of them) with the largest difference
    each may have, in the same shape; `compute` must not reuse trained weights (give it an empty artefact cache).
    `sample` larger than the store audits all of it. Raises CondcompError when there is nothing to audit.
    """
    known = sorted(records, key=lambda record: record.name)
    if sample < 1 or not known:
        raise CondcompError(f"an audit needs at least one run: sample {sample} of {len(known)} stored")
    rows = []
    for record in tqdm(random.Random(seed).sample(known, min(sample, len(known))), unit="run", desc="audit"):
        with torch_threads(record.provenance.get("threads") or 1):
            outcome = compute(record.spec)
        same = (outcome.data or {}).get("checksum") == record.provenance.get("data_checksum")
        for field, allowed in tolerance(record).items():
            stored, limits = np.atleast_1d(record.result[field]), np.atleast_1d(allowed)
            again = np.atleast_1d(outcome.result.get(field, math.nan))
            again = again if again.shape == stored.shape else np.full(stored.shape, math.nan)
            for index, (old, new, limit) in enumerate(zip(stored, again, limits, strict=True)):
                label = field if len(stored) == 1 else f"{field}[{index}]"
                rows.append(AuditRow(record.name, label, float(old), float(new), float(limit), same))
    return rows


def _one(store: RunStore, spec: RunSpec, compute: Compute, threads: int, wait: bool) -> Answer:
    """Compute one run in a worker; an error comes back as text, so that one bad run does not stop the others."""
    try:
        if store.made_by and store.made_by["code"] != environment()["code"]:
            return spec.name, False, "the code changed while the sweep ran: start it again", True
        with torch_threads(threads):
            return spec.name, store.try_obtain(spec, compute, wait=wait) is not None, "", False
    except CondcompError as error:
        return spec.name, False, str(error), error.fatal
    except Exception:
        return spec.name, False, traceback.format_exc(), False


def _must(store: RunStore, spec: RunSpec) -> Record:
    record = store.get(spec)
    if record is None:
        raise SweepError(f"run {spec.name} of {spec.study} vanished from {store.folder} while the sweep ran")
    return record


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """So many threads of torch inside, as many as before after it."""
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
