"""Runs: how one is named, what is kept of it, and where.

A `RunSpec` is plain data; the hash of its canonical JSON names the run. A `RunStore` keeps one JSON file per finished
run and, where the run has arrays, one `.npz` beside it. Files appear whole or not at all, so a process killed at any
moment leaves every finished run intact. Provenance lies beside the result and is not part of the name.

The artefact cache (trained weights, shared by all studies) is a `RunStore` too, in the user's cache instead of the
repository: training a target is a run whose arrays are the weights. One mechanism for both means one set of
guarantees, and weights never pass through a pickle (`numpy.load` with `allow_pickle=False`).
"""

import contextlib
import functools
import hashlib
import io
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd

from condcomp_lib.files import SpecError, StoreError, canonical_json, store_error, write_atomically
from condcomp_lib.provenance import environment, provenance

SCHEMA = 1
LEFTOVER_SECONDS = 3600  # a temporary file this old belongs to a process that was killed

# fmt: off
COLUMNS = [
    "study", "recipe", "dataset", "data_note", "architecture", "pretraining", "partitioner", "groups", "scope",
    "estimator", "decision", "decision_draws", "epochs", "target_seed", "partition_seed", "policy_seed", "split",
    "target_accuracy", "accuracy", "accuracy_ratio", "activity", "activity_by_layer", "compute", "control_width",
    "control_accuracy", "seconds",
]
# fmt: on


class CorruptRecord(UserWarning):
    """A stored run that does not match its checksum; it is reported, never used, and computed anew."""


@dataclass(frozen=True)
class RunSpec:
    """What a run is: the study, the version of its recipe, and every setting that changes its result.

    `settings` holds strings, booleans, integers, finite floats, None, and lists or string-keyed dicts of them.
    1 and 1.0 are different settings.

    >>> RunSpec("start", 1, {"dataset": "digits", "target_seed": 0}).name
    '40ad0f22d88eff61a2c4'
    """

    study: str
    recipe: int
    settings: Mapping[str, Any] = field(hash=False)

    def __post_init__(self) -> None:
        for key in self.settings:
            if key in ("study", "recipe"):
                raise SpecError(f"setting {key!r} is a field of the run itself; choose another name")
        object.__setattr__(self, "settings", json.loads(canonical_json(dict(self.settings), "settings")))

    @functools.cached_property
    def name(self) -> str:
        """Twenty hexadecimal digits: the start of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_dict(), "spec").encode()).hexdigest()[:20]

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data, as it stands in a record."""
        return {"study": self.study, "recipe": self.recipe, "settings": dict(self.settings)}


@dataclass(frozen=True)
class Outcome:
    """What computing a run returns.

    `result` is plain data; `data` says which data it saw (`note`, `checksum`); `uses` the runs it builds on, by role
    (`Record.cite`); `seconds` its own time where that is less than the whole (None: the whole is measured).
    """

    result: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] | None = None
    data: Mapping[str, str] | None = None
    uses: Mapping[str, Mapping[str, Any]] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Record:
    """One finished run as it lies in a store."""

    spec: RunSpec
    result: Mapping[str, Any]
    provenance: Mapping[str, Any]
    arrays_file: Path | None = None

    @property
    def name(self) -> str:
        """The run's name: its spec's hash."""
        return self.spec.name

    def arrays(self) -> dict[str, np.ndarray]:
        """The run's arrays (an empty dict where it has none)."""
        if self.arrays_file is None:
            return {}
        with np.load(self.arrays_file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}

    def cite(self) -> dict[str, Any]:
        """What a run that builds on this one records of it."""
        kept = ("commit", "dirty", "code", "threads", "data_checksum", "seconds")
        return {"name": self.name, **{key: self.provenance[key] for key in kept}}

    def flat(self) -> dict[str, Any]:
        """One row of the flat table: the spec's settings, the results, data note and seconds."""
        return {
            "study": self.spec.study,
            "recipe": self.spec.recipe,
            "data_note": self.provenance.get("data_note"),
            "seconds": self.provenance.get("seconds"),
            **self.spec.settings,
            **self.result,
        }


class RunStore:
    """Finished runs in a folder: `<folder>/<study>/<name>.json`, arrays as `.npz` beside it.

    Several processes may use one store at once. Reading never writes, so a read-only store serves what it has.

    >>> import tempfile
    >>> store = RunStore(tempfile.mkdtemp())
    >>> store.obtain(RunSpec("toy", 1, {"seed": 0}), lambda spec: Outcome({"accuracy": 0.5})).result
    {'accuracy': 0.5}
    """

    def __init__(self, folder: Path | str, made_by: Mapping[str, Any] | None = None) -> None:
        """`made_by` is recorded with every run written (default: this process's `provenance.environment`)."""
        self.folder = Path(folder)
        self.made_by = made_by

    def path(self, spec: RunSpec) -> Path:
        """Where the record of `spec` lies or would lie."""
        return self.folder / spec.study / f"{spec.name}.json"

    def get(self, spec: RunSpec) -> Record | None:
        """The record of `spec`; None when there is none, or when it is corrupt (which is reported by a warning)."""
        return self._read(self.path(spec))

    def records(self, study: str | None = None) -> Iterator[Record]:
        """Every intact record of one study, or of all, in the order of their names."""
        for path in sorted(self.folder.glob(f"{study or '*'}/*.json")):
            record = self._read(path)
            if record is not None:
                yield record

    def put(self, spec: RunSpec, outcome: Outcome, seconds: float) -> Record:
        """Write a finished run. Raises StoreError when the store cannot be written; nothing half-written stays."""
        clash = sorted(set(outcome.result) & (set(spec.settings) | {"study", "recipe", "seconds", "data_note"}))
        if clash:
            raise SpecError(f"result repeats {', '.join(clash)}, which the spec or the store records already")
        path = self.path(spec)
        arrays = None
        if outcome.arrays is not None:
            packed = _pack(outcome.arrays)
            digest = hashlib.sha256(packed).hexdigest()
            # Named by content: a record can never meet the arrays of another process's run of the same spec.
            arrays = {"file": f"{spec.name}.{digest[:8]}.npz", "sha256": digest}
            write_atomically(path.with_name(arrays["file"]), packed)
        body = {
            "schema": SCHEMA,
            "spec": spec.to_dict(),
            "result": json.loads(canonical_json(dict(outcome.result), "result")),
            "arrays": arrays,
            "provenance": provenance(self.made_by or environment(), outcome.data, outcome.seconds or seconds)
            | {"uses": {role: dict(cited) for role, cited in (outcome.uses or {}).items()}},
        }
        body["checksum"] = _checksum(body)
        self._keep_corrupt(path)
        write_atomically(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
        return self._record(path, body)

    def obtain(self, spec: RunSpec, compute: Callable[[RunSpec], Outcome]) -> Record:
        """The stored record of `spec`, or the one made now by `compute`.

        A lock held by the system (released when its process dies, however it dies) lets only one process compute a run;
        the others wait and then read.
        """
        record = self.try_obtain(spec, compute, wait=True)
        assert record is not None
        return record

    def try_obtain(self, spec: RunSpec, compute: Callable[[RunSpec], Outcome], *, wait: bool = False) -> Record | None:
        """As `obtain`, but None at once when another process is computing the run and `wait` is false."""
        record = self.get(spec)
        if record is not None:
            return record
        lock = self.folder / spec.study / ".locks" / f"{spec.name}.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            guard = filelock.FileLock(lock)
            guard.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            return None
        except OSError as error:
            raise store_error(lock.parent.parent, error) from error
        try:
            with warnings.catch_warnings():  # a corrupt record was reported by the first look
                warnings.simplefilter("ignore", CorruptRecord)
                record = self.get(spec)
            if record is None:
                started = time.perf_counter()
                outcome = compute(spec)
                record = self.put(spec, outcome, time.perf_counter() - started)
            return record
        finally:
            guard.release()

    def clean(self) -> int:
        """Remove what killed processes left behind (old temporary files); returns how many."""
        removed = 0
        for path in self.folder.glob("*/.*.tmp"):
            with contextlib.suppress(OSError):  # a living process may rename its own file meanwhile
                if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink()
                    removed += 1
        return removed

    def _read(self, path: Path) -> Record | None:
        try:
            record, wrong = self._parse(path, path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise store_error(path, error) from error
        if wrong:
            _report(path, wrong)
        return record

    def _parse(self, path: Path, text: bytes) -> tuple[Record | None, str]:
        """The record, or None and what is wrong with it."""
        try:
            body = json.loads(text)
            schema = body["schema"]
            if isinstance(schema, int) and schema > SCHEMA:
                raise StoreError(f"{path} has schema {schema}; this version reads up to {SCHEMA}: upgrade condcomp")
            if body.pop("checksum") != _checksum(body):
                return None, "does not match its checksum"
            record = self._record(path, body)
        except (ValueError, KeyError, TypeError, AttributeError, SpecError) as error:
            return None, f"is not a run record ({type(error).__name__})"
        if record.name != path.stem:
            return None, f"holds another run than its name says ({record.name})"
        if record.arrays_file is not None:
            if not record.arrays_file.exists():
                return None, f"lacks its arrays ({record.arrays_file.name})"
            if hashlib.sha256(record.arrays_file.read_bytes()).hexdigest() != body["arrays"]["sha256"]:
                return None, f"has arrays that do not match their checksum ({record.arrays_file.name})"
        return record, ""

    @staticmethod
    def _record(path: Path, body: Mapping[str, Any]) -> Record:
        arrays = path.with_name(body["arrays"]["file"]) if body["arrays"] else None
        return Record(RunSpec(**body["spec"]), body["result"], body["provenance"], arrays)

    def _keep_corrupt(self, path: Path) -> None:
        """Move a corrupt record aside before it is replaced: its text may hold the only trace of what happened."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CorruptRecord)
            if path.exists() and self._read(path) is None:
                path.replace(path.with_suffix(".corrupt"))


def table(records: Iterable[Record]) -> pd.DataFrame:
    """The flat table of runs: the common columns first (empty where a run lacks one), then those of each study."""
    rows = [record.flat() for record in records]
    extra = sorted({key for row in rows for key in row} - set(COLUMNS))
    return pd.DataFrame(rows, columns=[*COLUMNS, *extra])


def digest(records: Iterable[Record]) -> str:
    """One hash over what the records say (spec and result, not provenance): the inputs of a figure or table."""
    lines = sorted(f"{r.name} {canonical_json(dict(r.result), 'result')}" for r in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]


def _pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    for key, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise SpecError(f"array {key!r} holds Python objects; store numbers, booleans or strings")
    stream = io.BytesIO()
    np.savez_compressed(stream, **{key: np.asarray(array) for key, array in arrays.items()})  # type: ignore[arg-type]
    return stream.getvalue()


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _report(path: Path, what: str) -> None:
    warnings.warn(f"{path} {what}; the run counts as missing and will be computed anew", CorruptRecord, stacklevel=3)
