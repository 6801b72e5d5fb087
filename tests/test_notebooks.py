"""What every committed notebook must be, and that the notebook check notices a wrong stored output."""

import re
import subprocess
import sys

import jupytext
import nbformat
import pytest

from condcomp_lib import paths, reproduce

NAMES = reproduce.names()


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def reference(name):
    return nbformat.read(paths.notebooks() / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def test_every_text_has_its_reference_and_none_is_left_over():
    assert sorted(path.stem for path in paths.notebooks().glob("*.ipynb")) == NAMES


def test_every_code_cell_was_executed_in_order_without_an_error(reference):
    assert [cell.execution_count for cell in code(reference)] == list(range(1, len(code(reference)) + 1))
    for cell in code(reference):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", "a warning or progress bar stands in the reference"


def test_there_is_one_typed_and_commented_cell_of_parameters(reference):
    tagged = [cell for cell in code(reference) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: (str|int|float|bool) = .+  # .+", line)


def test_text_and_reference_are_a_pair(name, reference):
    text = (paths.notebooks() / f"{name}.py").read_text(encoding="utf-8")
    cells = jupytext.reads(text, fmt="py:percent").cells
    assert [(c.cell_type, c.source) for c in reference.cells] == [(c.cell_type, c.source) for c in cells]
    assert [c.metadata.get("tags", []) for c in reference.cells] == [c.metadata.get("tags", []) for c in cells]


def test_a_reference_is_light_and_keeps_no_traces(name, reference):
    assert (paths.notebooks() / f"{name}.ipynb").stat().st_size < 1_000_000
    assert "papermill" not in reference.metadata
    assert not any({"papermill", "execution"} & set(cell.metadata) for cell in reference.cells)


def test_notebooks_state_call_and_show(name):
    """No class or training loop in a notebook, and no function over ten lines; but for a user's own model, which must
    be plain torch code that knows nothing of the library."""
    text = (paths.notebooks() / f"{name}.py").read_text(encoding="utf-8")
    theirs = "" if name == "07_your_own_network" else r"|^class |\.backward\(\)"
    assert not re.search(rf"getcwd|chdir{theirs}", text, re.MULTILINE)
    for function in re.findall(r"^def .*(?:\n(?:[ \t].*|$))*", text, re.MULTILINE):
        assert len(function.strip().splitlines()) <= 10


def test_the_profiles_parameters_are_those_of_the_notebook(name, tmp_path):
    path = tmp_path / "notebook.ipynb"
    nbformat.write(reproduce.read(name), path)
    for profile in paths.PROFILES:
        reproduce.check_parameters(path, reproduce.profile_parameters(profile))


def nbval(path):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--nbval-lax",
            str(path),
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(path.parent),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=path.parent,
    )


def test_a_wrong_stored_output_makes_the_notebook_check_fail(tmp_path):
    """On the real start page: as committed it passes, with one digit changed in a checked output it fails."""
    notebook = nbformat.read(paths.notebooks() / "00_start_here.ipynb", as_version=4)
    checked = [cell for cell in code(notebook) if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert len(checked) >= 3
    # The first checked cell needs the imports only: keep these, so that the test takes seconds.
    notebook.cells = [code(notebook)[0], checked[0]]
    path = tmp_path / "copy.ipynb"
    nbformat.write(notebook, path)
    good = nbval(path)
    assert good.returncode == 0, good.stdout
    output = checked[0].outputs[0]
    assert "0.186" in output.text
    output.text = output.text.replace("0.186", "0.187")
    nbformat.write(notebook, path)
    bad = nbval(path)
    assert bad.returncode == 1, bad.stdout
    assert "0.187" in bad.stdout
