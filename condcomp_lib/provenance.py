"""Where a result comes from: code, versions, threads, data and time, recorded beside it and never part of its name."""

import datetime
import functools
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from condcomp_lib import __version__, paths
from condcomp_lib.errors import CondcompError


def provenance(data: Mapping[str, str] | None, seconds: float) -> dict[str, Any]:
    """Plain data to lie beside a result; `data` gives the data set's `note` and `checksum`."""
    torch = sys.modules.get("torch")
    return {
        **_environment(),
        "threads": torch.get_num_threads() if torch else None,
        "device": "cpu",
        "data_note": (data or {}).get("note"),
        "data_checksum": (data or {}).get("checksum"),
        "seconds": round(seconds, 3),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def _environment() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "scikit-learn")}
    commit = _git("rev-parse", "HEAD")
    # Only what can change a result counts: the store itself grows while a sweep runs.
    changed = _git("status", "--porcelain", "--", "condcomp_lib", "pyproject.toml", "requirements.lock")
    return {
        "condcomp": __version__,
        "commit": commit or "unknown",
        "dirty": bool(changed) if commit else None,
        "python": platform.python_version(),
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=paths.root(), capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, CondcompError):
        return None
    return done.stdout.strip()
