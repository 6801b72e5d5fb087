"""Where things lie. Every path of the project comes from here, never from the working directory.

Environment variables move what need not lie in a checkout: `CONDCOMP_DATA` (the data sets), `CONDCOMP_CACHE` (downloads
and trained weights), `CONDCOMP_STORE` (the finished runs of the paper profile), `CONDCOMP_QUICK_STORE` (those of the
quick profile, otherwise a temporary folder of the process) and `CONDCOMP_FIGURES` (figures and tables).
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs

from condcomp_lib.errors import CondcompError, UsageError, unknown

PROFILES = ("quick", "paper")


VARIABLES = ("CONDCOMP_DATA", "CONDCOMP_CACHE", "CONDCOMP_STORE", "CONDCOMP_QUICK_STORE", "CONDCOMP_FIGURES")


def check_environment() -> None:
    """Raise UsageError when one of the environment variables names a folder by a relative path."""
    for variable in VARIABLES:
        _given(variable)


def root() -> Path:
    """The repository: the folder that holds `notebooks/`, `data/` and `figures/`.

    Raises CondcompError when the library was installed without its repository.
    """
    folder = Path(__file__).resolve().parents[1]
    if not (folder / "notebooks").is_dir():
        raise CondcompError(
            f"{folder} holds no notebooks/: this command needs a checkout (git clone, then pip install -e .)"
        )
    return folder


def check_profile(profile: str) -> str:
    """Return `profile` when it is known, raise UsageError otherwise."""
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    return profile


def notebooks() -> Path:
    """Folder of the notebooks' texts and executed references."""
    return root() / "notebooks"


def published_csv() -> Path:
    """The papers' numbers by id."""
    return root() / "data" / "published.csv"


def verdicts_csv() -> Path:
    """The recorded verdict of every claim, of both profiles."""
    return root() / "data" / "verdicts.csv"


def figures(profile: str) -> Path:
    """Folder of the figures and tables of one profile (`figures/quick` is not under version control)."""
    return (_given("CONDCOMP_FIGURES") or root() / "figures") / check_profile(profile)


def build() -> Path:
    """Folder of executed notebooks and other throw-away results."""
    return root() / "build"


def cache() -> Path:
    """The user's cache: `$CONDCOMP_CACHE`, else the system's usual place."""
    return _given("CONDCOMP_CACHE") or Path(platformdirs.user_cache_dir("condcomp"))


def timing_lock() -> Path:
    """The lock file of whoever measures time on this machine."""
    cache().mkdir(parents=True, exist_ok=True)
    return cache() / "timing.lock"


def data_folders() -> list[Path]:
    """Folders searched for data sets, in order: `$CONDCOMP_DATA` where set, then the user cache."""
    given = _given("CONDCOMP_DATA")
    return ([given] if given else []) + [cache() / "data"]


def store(profile: str) -> Path:
    """Folder of the finished runs of one profile."""
    if check_profile(profile) == "quick":
        return _quick() / "runs"
    return _given("CONDCOMP_STORE") or root() / "data" / "runs"


def artefacts(profile: str) -> Path:
    """Folder of trained weights: in the user's cache for the paper profile, beside the temporary runs for quick."""
    return _quick() / "artefacts" if check_profile(profile) == "quick" else cache() / "artefacts"


def _quick() -> Path:
    return _given("CONDCOMP_QUICK_STORE") or _process_folder()


def _given(variable: str) -> Path | None:
    """The folder that an environment variable names. A relative one would mean another place in every notebook."""
    value = os.environ.get(variable)
    if not value:
        return None
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise UsageError(f"{variable} is {value!r}; give an absolute path")
    return path


@functools.cache
def _process_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="condcomp-quick-"))
    # Sweeps' worker processes must meet the same folder, so its name goes into the environment they inherit.
    os.environ["CONDCOMP_QUICK_STORE"] = str(folder)
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not take the folder from its parent
        shutil.rmtree(folder, ignore_errors=True)
