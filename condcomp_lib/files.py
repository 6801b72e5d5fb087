"""Plain data as canonical JSON, files that appear whole or not at all, and compiled functions kept in numba's cache."""

import errno
import json
import os
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from condcomp_lib.errors import CondcompError


class SpecError(CondcompError):
    """A specification or result that is not plain, finite data."""


class StoreError(CondcompError):
    """The store cannot be read or written, or holds records of a newer schema."""

    fatal = True


def canonical_json(value: Any, where: str) -> str:
    """Sorted, compact JSON of plain finite data; raises SpecError that names the offending place."""
    _check_plain(value, where)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either all of it or what it held before, whatever happens meanwhile."""
    if path.is_dir():
        raise StoreError(f"{path} is a folder; give the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise store_error(path, error) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _check_plain(value: Any, where: str) -> None:
    if value is None or type(value) in (str, bool, int):
        return
    if type(value) is float:
        if not np.isfinite(value):
            raise SpecError(f"{where} is {value}; only finite numbers can be stored (None where there is none)")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise SpecError(f"{where} has the key {key!r}; keys are strings")
            _check_plain(item, f"{where}.{key}")
    else:
        raise SpecError(f"{where} is a {type(value).__module__}.{type(value).__name__}; convert it to plain data")


def store_error(path: Path, error: OSError) -> StoreError:
    """The one clear line for a file that cannot be read or written."""
    elsewhere = "set CONDCOMP_STORE (runs), CONDCOMP_CACHE (weights) or CONDCOMP_FIGURES to a writable folder"
    remedies = {
        errno.ENOSPC: "free some space and start again, finished runs are kept",
        errno.EROFS: f"the file system is read-only; {elsewhere}",
        errno.EACCES: f"permission denied; {elsewhere}",
    }
    remedy = remedies.get(error.errno or 0, "check that its folder exists and can be written")
    return StoreError(f"cannot use {path}: {error.strerror or error}; {remedy}")


def cached(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` compiled by numba with these options at its first call, and kept in numba's cache where that can be
    written."""
    import numba

    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError as error:
        warnings.warn(f"numba's cache cannot be written ({error}): kernels are compiled anew in every process; set "
                      "NUMBA_CACHE_DIR to a folder that can be", stacklevel=2)  # fmt: skip
        return numba.njit(nogil=True, error_model="numpy", **options)(function)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` to be used inside compiled ones, where its text takes the place of the call: calls cost more than they
    look, since arrays are passed by many words and counted where references are."""
    import numba

    return numba.njit(nogil=True, error_model="numpy", boundscheck=False, inline="always")(function)
