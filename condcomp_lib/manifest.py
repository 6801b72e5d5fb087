"""Figures and tables on disk: written with their provenance, and checked against what was promised.

Beside every figure or table lies `<name>.json`, its provenance sidecar: the runs it was made from, a digest of what
they say, and the checksum of each file. It holds no time and no commit, so that the same stored results give the same
bytes; the runs' own records say when and by which code they were computed. "Older than its inputs" is judged by that
digest, not by file times, which a checkout does not keep.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from condcomp_lib import __version__, paths
from condcomp_lib.errors import CondcompError
from condcomp_lib.files import write_atomically
from condcomp_lib.runs import Record, digest


class ManifestError(CondcompError):
    """A promised figure or table is missing, altered, or does not match the stored runs."""


def save(name: str, files: Mapping[str, bytes], records: Sequence[Record], profile: str) -> list[Path]:
    """Write the files of one figure or table and its sidecar into the profile's folder; returns the files' paths.

    `files` maps a suffix (".png") to the content; `records` are the runs that the content was made from.
    """
    folder = paths.figures(profile)
    written = []
    for suffix, content in files.items():
        written.append(folder / f"{name}{suffix}")
        write_atomically(written[-1], content)
    sidecar = {
        "name": name,
        "profile": profile,
        "files": {f"{name}{suffix}": hashlib.sha256(content).hexdigest() for suffix, content in sorted(files.items())},
        "inputs": digest(records),
        "runs": sorted(record.name for record in records),
        "data": sorted({f"{r.spec.settings.get('dataset')}: {r.provenance.get('data_note')}" for r in records}),
        "made_with": {"condcomp": __version__, "matplotlib": importlib.metadata.version("matplotlib")},
    }
    write_atomically(folder / f"{name}.json", (json.dumps(sidecar, indent=1, sort_keys=True) + "\n").encode())
    return written


def check(promised: Mapping[str, Sequence[Record]], profile: str, *, since: float = 0.0) -> list[str]:
    """What is wrong with the promised figures and tables, one line each; an empty list when all is well.

    Arguments: `promised` the stored records that each figure or table is made from; `since` a file time (seconds):
    sidecars last written before it were not made by the execution under check.
    """
    folder, wrong = paths.figures(profile), []
    for name, records in promised.items():
        sidecar = folder / f"{name}.json"
        try:
            known = json.loads(sidecar.read_text(encoding="utf-8"))
            files, inputs = dict(known["files"]), known["inputs"]
        except FileNotFoundError:
            wrong.append(f"{name}: promised, but {sidecar.name} is missing from figures/{profile}")
            continue
        except (ValueError, KeyError, TypeError):
            wrong.append(f"{name}: {sidecar.name} is not a provenance sidecar")
            continue
        for file, checksum in files.items():
            path = folder / file
            if not path.exists():
                wrong.append(f"{name}: {file} is missing from figures/{profile}")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
                wrong.append(f"{name}: {file} is not the file its sidecar describes")
        if inputs != digest(records):
            wrong.append(f"{name}: made from other results than the store holds now")
        elif sidecar.stat().st_mtime < since:
            wrong.append(f"{name}: promised, but not written by this execution")
    return wrong
