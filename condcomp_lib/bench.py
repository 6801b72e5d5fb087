"""What `condcomp bench` measures: speed lives here, never in a test."""

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from condcomp_lib import paths
from condcomp_lib.errors import CondcompError
from condcomp_lib.runs import Outcome, RunSpec, RunStore


def store(count: int) -> dict[str, float]:
    """What the run store costs: milliseconds a run to write `count` runs, to find them again, and to list them."""
    specs = [RunSpec("bench", 1, {"seed": seed}) for seed in range(count)]
    with tempfile.TemporaryDirectory(prefix="condcomp-bench-") as folder:
        runs = RunStore(folder)
        return {
            "runs": float(count),
            "write_ms": _ms(lambda: [runs.obtain(spec, lambda _: Outcome({"accuracy": 0.5})) for spec in specs], count),
            "read_ms": _ms(lambda: [runs.get(spec) for spec in specs], count),
            "list_ms": _ms(lambda: list(runs.records()), count),
        }


def commands() -> dict[str, Any]:
    """Clone the committed state into an empty folder and time what a newcomer types there, set-up apart.

    Raises CondcompError when a command fails, so this is the fresh-clone check too.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="condcomp-clone-") as folder:
        clone = Path(folder) / "condcomp"
        _run(["git", "clone", "--quiet", str(paths.root()), str(clone)], Path(folder))
        for command, what in (
            ("make setup", "set-up, once (part of the first of the two commands)"),
            ("make reproduce", "all notebooks, both profiles"),
            ("make test", "every test"),
        ):
            started = time.perf_counter()
            _run(command.split(), clone)
            rows.append({"command": f"`{command}`", "what": what, "seconds": round(time.perf_counter() - started)})
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return {"machine": machine, "rows": rows}


def _run(command: list[str], folder: Path) -> None:
    # The clone makes its own environment; what this one has set must not leak into it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VIRTUAL_ENV", "MAKE"))}
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise CondcompError(f"{' '.join(command)} failed in a fresh clone (exit code {done.returncode})")


def _ms(work: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started) / count
