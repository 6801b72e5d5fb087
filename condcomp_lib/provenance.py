"""Where a result comes from: code, versions, threads, data and time, recorded beside it and never part of its name."""

import datetime
import functools
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from condcomp_lib import __version__, paths
from condcomp_lib.errors import CondcompError

# Modules that only tell of results: changing them changes no result.
TELLING = ("bench", "cli", "manifest", "plots", "readme", "reproduce", "tables", "time_plots", "widgets")


def provenance(environment: Mapping[str, Any], data: Mapping[str, str] | None, seconds: float) -> dict[str, Any]:
    """Plain data to lie beside a result; `data` gives the data set's `note` and `checksum`."""
    torch = sys.modules.get("torch")
    return {
        **environment,
        "threads": torch.get_num_threads() if torch else None,
        "device": "cpu",
        "data_note": (data or {}).get("note"),
        "data_checksum": (data or {}).get("checksum"),
        "seconds": round(seconds, 3),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def environment() -> dict[str, Any]:
    """The code and versions of this process, as they were when it first asked.

    `code` is a digest of the sources that can change a result; `dirty` says whether they differ from `commit`.
    """
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "scikit-learn", "numba")}
    commit = _git("rev-parse", "HEAD")
    changed = (_git("status", "--porcelain", "--", "condcomp_lib", "requirements.lock") or "").splitlines()
    return {
        "condcomp": __version__,
        "commit": commit or "unknown",
        "dirty": any(Path(line[3:]).stem not in TELLING for line in changed) if commit else None,
        "code": _code_digest(),
        "python": platform.python_version(),
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _code_digest() -> str:
    package = Path(__file__).parent
    sources = sorted(path for path in package.rglob("*.py") if path.stem not in TELLING)
    lines = (f"{path.relative_to(package).as_posix()} {sha256(path.read_bytes()).hexdigest()}" for path in sources)
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]  # a worker that is killed must not leave the index locked
    try:
        done = subprocess.run(command, cwd=paths.root(), capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, CondcompError):
        return None
    return done.stdout.rstrip()
