"""The project itself: pins, README, weight, and that the layers and docstrings are what they should be."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from condcomp_lib import __version__, paths, readme

ROOT = paths.root()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;]+)")


def pins(lines):
    return {found[1].lower().replace("_", "-"): found[2] for line in lines if (found := PIN.match(line.strip()))}


def locked():
    return pins((ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines())


def wanted():
    project = PYPROJECT["project"]
    return pins([*project["dependencies"], *project["optional-dependencies"]["dev"]])


def test_every_dependency_is_pinned_exactly_and_stands_in_the_lock():
    project = PYPROJECT["project"]
    given = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert len(wanted()) == len(given)
    assert {name: locked().get(name) for name in wanted()} == wanted()


def test_every_line_of_the_lock_is_an_exact_pin():
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        assert PIN.match(line), line


def test_every_dependency_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, version in wanted().items():
        assert re.search(rf'"{name}=={re.escape(version)}",\s+# .+', text), name


def test_the_conda_environment_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "-r requirements.lock" in pip
    assert "-e ." in pip
    assert any(re.match(r"python=3\.1[1-9]", str(entry)) for entry in environment["dependencies"])
    assert locked()["torch"] == wanted()["torch"] == "2.13.0"


def test_the_installed_versions_are_the_locked_ones():
    from importlib.metadata import version

    for name, pin in wanted().items():
        assert version(name).split("+")[0] == pin, name


def test_readme_says_what_the_stored_runs_say():
    readme.check()


def test_a_stale_readme_is_noticed():
    with pytest.raises(readme.CondcompError, match="has 0 parts"):
        readme.fill("no markers", {"times": "new"})
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stale = re.sub(r"(<!-- begin targets -->\n)", r"\1 ", text)
    assert readme.fill(stale, readme.blocks()) == text != stale


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_versions_agree():
    assert PYPROJECT["project"]["version"] == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_repository_stays_light():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert max(sizes.values()) < 2_000_000
    assert sum(sizes.values()) < 60_000_000


def test_modules_stay_short():
    for path in (ROOT / "condcomp_lib").rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 380, path.name


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"setup", "reproduce", "test", "lab", "paper", "bench", "lint", "clean", "help"} <= listed


def test_importing_the_command_is_quick_because_it_imports_nothing_heavy():
    program = "import sys, condcomp_lib.cli; print([m for m in ('torch', 'pandas', 'papermill') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
