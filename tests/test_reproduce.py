"""The runner: notebooks executed headlessly, parameters, failures, references, and the whole command."""

import functools
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from condcomp_lib import claims, cli, paths, reproduce, runs, studies
from condcomp_lib.errors import UsageError
from condcomp_lib.reproduce import NotebookError

HEAD = """\
# %% tags=["parameters"]
profile: str = "paper"
count: int = 1
rate: float = 0.5
fast: bool = False
"""


START = ("--notebook", "00_start_here")


def condcomp(*arguments, **environment):
    """The command in a process of its own, as a user types it."""
    command = [sys.executable, "-c", "from condcomp_lib.cli import main; main()", *arguments]
    given = {**os.environ, **{key: str(value) for key, value in environment.items()}}
    return subprocess.run(command, capture_output=True, text=True, env=given, check=False)


@pytest.fixture
def folder(tmp_path):
    books = tmp_path / "notebooks"
    (books / "params").mkdir(parents=True)
    (books / "params" / "quick.yaml").write_text("profile: quick\n")
    (books / "01_good.py").write_text(HEAD + "\n# %%\nprint(profile, count)\n")
    (books / "02_bad.py").write_text(HEAD + '\n# %%\nx = 1\n\n# %%\nraise ValueError("no such luck")\n')
    return books


def text_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    return [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]


def test_parameters_reach_the_notebook_and_a_failure_names_cell_and_error(folder, tmp_path):
    good, bad = reproduce.execute(
        ["01_good", "02_bad"], "quick", {"profile": "quick", "count": 7}, folder=folder, output=tmp_path / "out", jobs=2
    )
    assert good.error is None
    assert text_outputs(good.output) == ["quick 7\n"]
    assert bad.error == "02_bad, cell 3 ('raise ValueError(\"no such luck\")'): ValueError: no such luck"
    assert bad.output.exists()  # the notebook as far as it came, for the reader to look into


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 3}, "unknown parameter 'epochs'; known: count, fast, profile, rate"),
        ({"count": 1.5}, r"parameter 'count' is a int, not 1.5 \(float\)"),
        ({"count": True}, "parameter 'count' is a int, not True"),
        ({"profile": 3}, "parameter 'profile' is a str, not 3"),
        ({"fast": "yes"}, "parameter 'fast' is a bool, not 'yes'"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(folder, tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        reproduce.execute(["01_good"], "quick", given, folder=folder, output=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.ipynb"))


def test_a_whole_number_is_a_float_too(folder, tmp_path):
    (done,) = reproduce.execute(["01_good"], "quick", {"rate": 1}, folder=folder, output=tmp_path / "out")
    assert done.error is None


def test_exactly_one_parameters_cell_is_needed(folder):
    (folder / "03_none.py").write_text("# %%\nprint(1)\n")
    with pytest.raises(NotebookError, match=r"03_none\.py has 0 cells tagged 'parameters'"):
        reproduce.read("03_none", folder)


def test_a_reference_carries_no_traces_and_no_injected_parameters(folder, tmp_path):
    (plain,) = reproduce.execute(["01_good"], "quick", {}, folder=folder, output=tmp_path / "out")
    path = reproduce.write_reference(plain, folder)
    first = path.read_bytes()
    assert b"papermill" not in first
    assert b"iopub" not in first
    (again,) = reproduce.execute(["01_good"], "quick", {}, folder=folder, output=tmp_path / "out")
    assert reproduce.write_reference(again, folder).read_bytes() == first
    (injected,) = reproduce.execute(["01_good"], "quick", {"count": 2}, folder=folder, output=tmp_path / "out")
    with pytest.raises(NotebookError, match="injected parameters"):
        reproduce.write_reference(injected, folder)


def test_unknown_notebooks_list_the_known_ones(folder):
    with pytest.raises(UsageError, match="unknown notebook '09_none'; known: 01_good, 02_bad"):
        reproduce.select(["09_none"], folder)
    assert reproduce.select(None, folder) == ["01_good", "02_bad"]


@pytest.mark.timeout(
    900
)  # every notebook's quick runs from nothing: minutes, and more on a machine that does other work
def test_the_whole_quick_profile_from_scratch_and_that_every_claim_has_a_recorded_verdict(tmp_path, monkeypatch):
    """One test, so that the quick runs are computed once."""
    store = tmp_path / "quick-store"
    done = condcomp(
        "reproduce", "--profile", "quick", CONDCOMP_FIGURES=tmp_path / "figures", CONDCOMP_QUICK_STORE=store
    )
    assert done.returncode == 0, done.stderr
    for name in reproduce.names():
        assert f"{name:<24}" in done.stdout
    assert "claims of start:" in done.stdout
    assert f"figures and tables: {tmp_path / 'figures' / 'quick'}" in done.stdout
    for study in map(studies.get, studies.NAMES):
        for item in study.promises([]):
            assert (tmp_path / "figures" / "quick" / f"{item}.json").exists()
    monkeypatch.setenv("CONDCOMP_QUICK_STORE", str(store))
    records = functools.partial(studies.records, partial=True)  # a study's first pass may be partial
    judged = {
        profile: [c for name in studies.NAMES for c in studies.get(name).claims(records(name, profile))]
        for profile in ("quick", "paper")
    }
    for profile, found in judged.items():
        claims.check_verdicts(found, profile)
    assert {claim.id for found in judged.values() for claim in found} == set(claims.recorded())


# Names of clipping areas in an SVG, and the checksum of one in its sidecar: matplotlib makes them of the last digits of
# positions, which the layout's solver rounds in other ways from one process to another. The picture is the same.
CLIP = re.compile(rb'(url\(#|id="|\.svg": ")(?:p[0-9a-f]{10}|[0-9a-f]{64})')


@pytest.mark.figures
def test_paper_figures_are_byte_identical_when_made_again(tmp_path):
    """`make notebooks` has just made them again; elsewhere than where they were made they are made once more."""

    def contents(folder):
        return {path.name: CLIP.sub(rb"\1", path.read_bytes()) for path in folder.iterdir()}

    committed, again = contents(paths.root() / "figures" / "paper"), contents(paths.build() / "nbval" / "paper")
    assert set(committed) == set(again)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):  # rounding may move a pixel there
        done = condcomp("reproduce", "--profile", "paper", CONDCOMP_FIGURES=tmp_path)
        assert done.returncode == 0, done.stderr
        committed = contents(tmp_path / "paper")
    assert [name for name in committed if committed[name] != again[name]] == []


def test_a_figure_that_no_longer_fits_the_store_is_noticed(monkeypatch):
    monkeypatch.delenv("CONDCOMP_FIGURES")  # the committed figures
    assert reproduce.check_promises(reproduce.names(), "paper") == []
    wrong = reproduce.check_promises(reproduce.names(), "paper", since=4e9)
    assert any("start_skipping: promised, but not written by this execution" in line for line in wrong)


def test_a_failing_notebook_makes_the_command_fail(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "notebooks", lambda: folder)
    monkeypatch.setattr(paths, "build", lambda: tmp_path / "build")
    monkeypatch.setattr(sys, "argv", ["condcomp", "reproduce", "--profile", "quick"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert "failed: 02_bad, cell 3" in err
    assert "no such luck" in err
    assert "01_good" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "strat"],
            "unknown study 'strat'; known: blocks, ",
        ),
        (
            ["runs", "strat"],
            "unknown study 'strat'; known: blocks, ",
        ),
        (
            ["audit", "strat"],
            "unknown study 'strat'; known: blocks, ",
        ),
        (["reproduce", "--notebook", "99"], "unknown notebook '99'; known: 00_start_here"),
        (["reproduce", "--profile", "fast"], "unknown profile 'fast'; known: paper, quick"),
        (["reproduce", *START, "-p", "epochs=3"], "unknown parameter 'epochs'; known: example, profile"),
        (["reproduce", *START, "-p", "example=three"], "parameter 'example' is a int, not 'three'"),
        (["reproduce", *START, "-p", "nonsense"], "--parameter takes name=value, not 'nonsense'"),
        (["reproduce", *START, "-p", "example=[1"], "'[1' is no value"),
        (["reproduce", *START, "-p", "profile=paper"], "the profile is chosen by --profile"),
        (["reproduce", "-p", "example=3"], "--parameter goes with --notebook, one of: 00_start_here"),
        (["reproduce", "--reference"], "--reference goes with --profile paper"),
        (["data", "check", "imagenet"], "unknown data set 'imagenet'"),
        (["run", "start", "--backend", "cloud"], "unknown backend 'cloud'"),
        (["run", "start", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["run", "start", "--profile", "quick"], "the quick profile's runs are temporary"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_unknown_names_end_with_exit_code_2_and_what_is_known(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["condcomp", *arguments])
    monkeypatch.delenv("CONDCOMP_QUICK_STORE")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_runs_as_csv_have_the_columns_of_the_flat_table():
    lines = condcomp("runs", "start", "--csv").stdout.splitlines()
    assert lines[0].startswith(",".join(runs.COLUMNS))
    assert lines[0].endswith(",current")
    assert sum(line.endswith(",True") for line in lines) == len(studies.get("start").specs("paper"))


def test_a_relative_folder_is_refused_because_it_would_mean_several(monkeypatch):
    done = condcomp("reproduce", CONDCOMP_FIGURES="out")
    assert done.returncode == 2
    assert "CONDCOMP_FIGURES is 'out'; give an absolute path" in done.stderr


def test_a_json_file_that_is_a_folder_is_one_clear_line(tmp_path):
    done = condcomp("bench", "store", "--runs", "2", "--json", str(tmp_path))
    assert done.returncode == 1
    assert "is a folder; give the name of a file" in done.stderr
    assert "Traceback" not in done.stderr


def test_data_check_and_bench_store_say_what_they_found(tmp_path):
    assert "digits" in condcomp("data", "check", "digits").stdout
    done = condcomp("bench", "store", "--runs", "5", "--json", str(tmp_path / "bench.json"))
    assert set(json.loads((tmp_path / "bench.json").read_text())) == {"runs", "write_ms", "read_ms", "list_ms"}
    assert "write_ms" in done.stdout


def test_an_audit_finds_a_planted_error(tmp_path):
    """Quick-profile runs, stored as if they were the paper's, so that the audit needs no data set and no time."""
    program = textwrap.dedent("""
        import sys
        from condcomp_lib import cli, studies
        from condcomp_lib.studies import start
        for name in ("NETWORKS", "SEEDS"):
            getattr(start, name)["paper"] = getattr(start, name)["quick"]
        cli.main()
    """)
    environment = {**os.environ, "CONDCOMP_STORE": str(tmp_path / "store")}

    def audit(*arguments):
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert audit("run", "start", "--profile", "paper").returncode == 0
    sound = audit("audit", "--sample", "1")
    assert sound.returncode == 0, sound.stderr
    assert "DISAGREES" not in sound.stdout
    assert "best_ratio[3]" in sound.stdout
    assert "1 runs recomputed" in sound.stdout
    # One run of the three gets a wrong accuracy: it must not widen its own tolerance.
    store = runs.RunStore(tmp_path / "store")
    record = min(store.records("start"), key=lambda record: record.name)
    result = {**record.result, "accuracy": record.result["accuracy"] - 0.2}
    store.put(record.spec, runs.Outcome(result, None, {"note": "official", "checksum": "other"}), seconds=1.0)
    wrong = audit("audit", "--sample", "3")
    assert wrong.returncode == 1
    assert wrong.stdout.count("DISAGREES (from another copy of the data)") == 1
    assert "1 recomputed numbers differ" in wrong.stderr


def test_the_command_is_installed():
    assert (Path(sys.executable).parent / "condcomp").exists()
