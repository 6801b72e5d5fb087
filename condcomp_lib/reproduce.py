"""Headless execution of the notebooks, and the checks that follow it.

A notebook's source is its `py:percent` text. For an execution the text becomes a temporary `.ipynb`, papermill runs it
in a process of its own with typed parameters, and the result lies under `build/<profile>/`. The paired `.ipynb` beside
the text is an executed reference of the paper profile, written by `write_reference` only.
"""

import base64
import concurrent.futures
import io
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError
from PIL import Image
from tqdm.auto import tqdm
from traitlets.config import Config

from condcomp_lib import manifest, paths, studies
from condcomp_lib.errors import CondcompError, UsageError, unknown
from condcomp_lib.files import write_atomically
from condcomp_lib.widgets import VIEW

TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}


class NotebookError(CondcompError):
    """A notebook failed, or is not in the form that the runner needs."""


@dataclass(frozen=True)
class Execution:
    """One notebook's execution: where the executed copy lies, how long it took, and the error if it failed."""

    notebook: str
    output: Path
    seconds: float
    error: str | None = None


def names(folder: Path | None = None) -> list[str]:
    """The notebooks by name, in reading order."""
    return sorted(path.stem for path in (folder or paths.notebooks()).glob("[0-9][0-9]_*.py"))


def select(wanted: Sequence[str] | None, folder: Path | None = None) -> list[str]:
    """The wanted notebooks (all by default); raises UsageError for one that does not exist."""
    known = names(folder)
    for name in wanted or ():
        if name not in known:
            raise unknown("notebook", name, known)
    return [name for name in known if not wanted or name in wanted]


def profile_parameters(profile: str, folder: Path | None = None) -> dict[str, Any]:
    """The parameters that a profile gives to every notebook, from `notebooks/params/<profile>.yaml`."""
    path = (folder or paths.notebooks()) / "params" / f"{paths.check_profile(profile)}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def read(name: str, folder: Path | None = None) -> nbformat.NotebookNode:
    """The notebook made from its text, cells named by position so that equal texts give equal files."""
    path = (folder or paths.notebooks()) / f"{name}.py"
    notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    notebook.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02}"
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(f"{path.name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one")
    return notebook


def check_parameters(path: Path, given: Mapping[str, Any]) -> None:
    """Raise UsageError when a parameter is unknown to the notebook at `path` or has another type than it declares."""
    known = papermill.inspect_notebook(str(path))
    for name, value in given.items():
        if name not in known:
            raise unknown("parameter", name, known)
        declared = known[name]["inferred_type_name"]
        allowed = TYPES.get(declared)
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and declared != "bool")):
            raise UsageError(f"parameter {name!r} is a {declared}, not {value!r} ({type(value).__name__})")


def execute(
    wanted: Sequence[str],
    profile: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    jobs: int = 1,
    folder: Path | None = None,
    output: Path | None = None,
) -> list[Execution]:
    """Execute notebooks, each in its own process, `jobs` at a time; failures are in the result, not raised.

    `parameters` go to every notebook (None: those of the profile). Parameters are checked for all of them first.
    """
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {jobs}")
    output = output or paths.build() / profile
    output.mkdir(parents=True, exist_ok=True)
    paths.store(profile)  # the quick profile's temporary folder is made here, once, and shared with the notebooks
    given = dict(profile_parameters(profile, folder) if parameters is None else parameters)
    with tempfile.TemporaryDirectory(prefix="condcomp-notebooks-") as temporary:
        sources = {name: Path(temporary) / f"{name}.ipynb" for name in wanted}
        for name, source in sources.items():
            nbformat.write(read(name, folder), source)
            check_parameters(source, given)
        # A fresh process per notebook: papermill changes the working directory of the whole process.
        with concurrent.futures.ProcessPoolExecutor(
            jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool:
            tasks = [pool.submit(_execute, name, source, output, given) for name, source in sources.items()]
            finished = concurrent.futures.as_completed(tasks)
            for _ in tqdm(finished, total=len(tasks), unit="notebook", desc=f"notebooks, profile {profile}"):
                pass
            return [_result(task, name, output) for task, name in zip(tasks, sources, strict=True)]


def _result(task: "concurrent.futures.Future[Execution]", name: str, output: Path) -> Execution:
    try:
        return task.result()
    except concurrent.futures.BrokenExecutor:
        error = f"{name}: its process was killed, perhaps for want of memory"
        return Execution(name, output / f"{name}.ipynb", 0.0, error)


def _execute(name: str, source: Path, output: Path, parameters: Mapping[str, Any]) -> Execution:
    started, target, error = time.perf_counter(), output / source.name, None
    try:
        papermill.execute_notebook(
            str(source), str(target), dict(parameters), kernel_name="python3", progress_bar=False, cwd=str(output),
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),  # else the kernel warns of plain text
        )  # fmt: skip
    except PapermillExecutionError as failure:
        line = failure.source.strip().splitlines()[0] if failure.source.strip() else ""
        error = f"{name}, cell {failure.cell_index} ({line!r}): {failure.ename}: {failure.evalue}"
    except Exception as failure:  # the kernel died or would not start: say so for this notebook, run the others
        error = f"{name}: {type(failure).__name__}: {failure}"
    return Execution(name, target, time.perf_counter() - started, error)


def check_promises(wanted: Iterable[str], profile: str, *, since: float = 0.0) -> list[str]:
    """What is wrong with the figures and tables that the notebooks' studies promise (see `manifest.check`)."""
    wrong = []
    for name in studies.NAMES:
        if studies.get(name).notebook in wanted:
            wrong += manifest.check(studies.promised(name, profile), profile, since=since)
    return wrong


def light(png: str) -> str:
    """A figure's PNG (base64) with a palette of 128 colours, about a third of its size; figures/ keeps the full one."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        stream = io.BytesIO()
        image.convert("RGB").quantize(128).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def write_reference(execution: Execution, folder: Path | None = None) -> Path:
    """Make the executed notebook the reference beside its text, without timestamps and tools' traces.

    The execution must have run without injected parameters, so that reference and text stay a pair.
    """
    notebook = nbformat.read(execution.output, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            raise NotebookError(f"{execution.notebook} was executed with injected parameters; a reference uses its own")
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(VIEW, None)  # a widget means nothing without its kernel; its picture stays
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = light(output.data["image/png"])
        if not cell.metadata.get("tags", ["keep"]):
            del cell.metadata["tags"]
    path = (folder or paths.notebooks()) / f"{execution.notebook}.ipynb"
    write_atomically(path, (nbformat.writes(notebook) + "\n").encode())
    return path
