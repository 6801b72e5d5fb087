"""Data sets as standardised arrays: digits, MNIST, SVHN and CIFAR-10, from checked files.

Where files come from: the first folder of `paths.data_folders()` whose subfolder of the data set's name holds all of
them, else a checksummed download into the user's cache.

What is trusted: a file with the official md5 ("official"), or one that the `SHA256SUMS` beside it lists and whose sum
holds ("unofficial copy": loading it warns once, and `Dataset.note` says so). Anything else is a DataError.

How features are made: pixels are scaled to [0, 1], standardised, and flattened channels first (channel, row, column).

- digits, mnist: one mean and one standard deviation over all pixels of the training images.
- cifar10: one mean and one standard deviation for each colour channel of the training images.
- svhn: every image by its own mean and standard deviation, because lighting and contrast differ from photo to photo far
  more than from digit to digit. Nothing is fitted.

Validation and test images are standardised with the training images' numbers and never add to them.
"""

import errno
import functools
import hashlib
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from condcomp_lib import formats, paths
from condcomp_lib.errors import unknown
from condcomp_lib.formats import SOURCES, DataError, Examples, Ranges, Shape, Source

__all__ = ["NAMES", "SOURCES", "DataError", "Dataset", "Split", "UnofficialCopy", "check", "fetch", "load"]

NAMES = ("digits", "mnist", "svhn", "cifar10")
Floats = npt.NDArray[np.float32]
CHUNK = 256  # images turned into floats at a time: a few megabytes, which stay in the processor's cache
GREY_LEVEL = 1 / 255  # least standard deviation divided by, so that an image of one colour becomes zeros


class UnofficialCopy(UserWarning):
    """The files are a copy whose own checksums hold, but not the official release."""


@dataclass(frozen=True, eq=False)
class Split:
    """Examples of one purpose: standardised `x` float32 [examples, features], classes `y` int64 [examples]."""

    x: Floats
    y: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set ready for training.

    `shape` is (channels, height, width) of an image, `classes` the number of classes, `note` where the data come from
    ("official", "unofficial copy", "embedded in scikit-learn"), `checksum` 16 hex digits that name the exact files.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    shape: Shape
    classes: int
    note: str
    checksum: str


def load(
    name: str, protocol: str = "standard", *, folders: Sequence[Path] | None = None, download: bool = True
) -> Dataset:
    """Load a data set, split and standardised as the module's description says.

    `name` is one of NAMES. `protocol` says which examples are for what; every data set has "standard":

    - digits: 1,077 / 360 / 360 (train / valid / test) of one fixed permutation
    - mnist: first 50,000 / last 10,000 of the training file, official test file
    - cifar10: first 45,000 / last 5,000 of the training files, official test file
    - svhn: 57,257 / 6,000 / 10,000, contiguous in the official *training* file only, even where the others lie beside
      it, so that a run means the same on every machine
    - svhn "official": training file less its last 6,000 / these / official test file; "official+extra" adds the 531,131
      extra digits to train, which takes 10 GB of memory

    `folders` replaces `paths.data_folders()`; `download=False` never touches the network.

    Returns a Dataset. Raises UsageError for an unknown name or protocol, DataError for missing, damaged or untrusted
    files. Warns UnofficialCopy once per process and data set.

    >>> load("digits").train.x.shape
    (1077, 64)
    """
    source = _source(name, protocol)
    ranges = source.protocols[protocol]
    if source.kind == "embedded":
        parts, checksum = _embedded()
        note = "embedded in scikit-learn"
    else:
        folder, files = _locate(name, protocol, folders, download)
        sums, official = formats.verify(source, folder, files)
        if not official:
            _warn_unofficial(name, folder)
        note = "official" if official else "unofficial copy"
        checksum = _short("".join(f"{sums[file]}  {file}\n" for file in sorted(sums)))
        parts = formats.read_parts(source, folder, files, _parts(source, protocol))
    shift, scale = _fit(source, parts, ranges[0])
    train, valid, test = (_split(source, parts, stretch, shift, scale) for stretch in ranges)
    return Dataset(name, train, valid, test, source.shape, 10, note, checksum)


def fetch(name: str, protocol: str = "standard") -> list[Path]:
    """Make sure that the files of a data set are there: search `paths.data_folders()`, download what lacks.

    Returns the files' paths (none for digits). Raises UsageError for unknown names, DataError when a download fails or
    a file is not to be trusted.

    >>> fetch("digits")
    []
    """
    source = _source(name, protocol)
    if source.kind == "embedded":
        return []
    folder, files = _locate(name, protocol, None, download=True)
    formats.verify(source, folder, files)
    return [folder / file for file in files]


def check(name: str, folders: Sequence[Path] | None = None) -> list[str]:
    """Check the files of a data set as `load` would find them, checksums and contents, without the network.

    Returns lines for a reader: each folder, its files with size and standing, and the protocols that lack files. Raises
    UsageError for an unknown name, DataError when a file is damaged or the standard protocol lacks one.

    >>> check("digits")
    ['digits: embedded in scikit-learn, nothing to check']
    """
    source = _source(name, "standard")
    if source.kind == "embedded":
        return [f"{name}: embedded in scikit-learn, nothing to check"]
    places: dict[Path, dict[str, None]] = {}  # files by folder, as an ordered set
    lines, absent = [], []
    for protocol in source.protocols:
        try:
            folder, files = _locate(name, protocol, folders, download=False)
        except _Missing:
            if protocol == "standard":
                raise
            absent.append(f"{name}: the files of protocol {protocol!r} are not all there, which only it needs")
            continue
        places.setdefault(folder, {}).update(dict.fromkeys(files))
    for folder, found in places.items():
        lines.append(f"{name}: {folder}")
        for file in found:
            official = formats.verify(source, folder, (file,))[1]
            standing = "official" if official else f"unofficial copy, its {formats.SUMS} holds"
            lines.append(f"  {file}: {(folder / file).stat().st_size:,} bytes, {standing}")
        for part in source.parts:  # one at a time, for the sake of memory
            if source.archive in found or set(source.parts[part].files) <= found.keys():
                formats.read_parts(source, folder, tuple(found), [part])
                lines.append(f"  {part}: {source.parts[part].count:,} examples, readable")
    return lines + absent


def present(name: str) -> bool:
    """Whether all files of a data set's standard protocol lie here; none is read.

    >>> present("digits")
    True
    """
    if _source(name, "standard").kind == "embedded":
        return True
    try:
        _locate(name, "standard", None, download=False)
    except _Missing:
        return False
    return True


class _Missing(DataError):
    """Files are not there, which `check` forgives where `load` does not."""


def _source(name: str, protocol: str) -> Source:
    if name not in SOURCES:
        raise unknown("data set", name, NAMES)
    if protocol not in SOURCES[name].protocols:
        raise unknown(f"protocol of {name}", protocol, SOURCES[name].protocols)
    return SOURCES[name]


def _parts(source: Source, protocol: str) -> list[str]:
    used = {part for ranges in source.protocols[protocol] for part, _, _ in ranges}
    return [part for part in source.parts if part in used]


def _locate(name: str, protocol: str, folders: Sequence[Path] | None, download: bool) -> tuple[Path, tuple[str, ...]]:
    """The first folder that has all files of a protocol, and these files; downloads them where no folder has."""
    source = SOURCES[name]
    single = tuple(file for part in _parts(source, protocol) for file in source.parts[part].files)
    layouts = [(source.archive,), single] if source.archive else [single]
    wanted = [Path(folder) / name for folder in (paths.data_folders() if folders is None else folders)]
    lacks = []
    for folder in wanted:
        for files in layouts:
            with formats.reading(folder):
                missing = [file for file in files if not (folder / file).is_file()]
            if not missing:
                return folder, files
        lacks.append(f"{folder} lacks {', '.join(missing)}" + (f" (or {source.archive})" if source.archive else ""))
    if not download:
        command = f"condcomp data fetch {name}" + ("" if protocol == "standard" else f" --protocol {protocol}")
        raise _Missing(f"{name}: {'; '.join(lacks)}; run `{command}`, or {_by_hand(name)}")
    return _download(name, layouts[0]), layouts[0]


def _by_hand(name: str) -> str:
    return f"put the files into $CONDCOMP_DATA/{name}/"


def _download(name: str, files: Sequence[str]) -> Path:
    """Download the files that the user's cache lacks; a file appears there only when whole and of the right md5."""
    import pooch

    source, folder = SOURCES[name], paths.cache() / "data" / name
    downloader = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 18)
    for file in files:
        url = source.url + file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / file).is_file():
                pooch.retrieve(url, f"md5:{source.md5[file]}", fname=file, path=folder, downloader=downloader)
        except ValueError as error:
            reason = textwrap.shorten(str(error), 400)
            raise DataError(f"{name}: {url} is not the official file ({reason}); {_by_hand(name)}") from error
        except OSError as error:
            if error.errno is None and not isinstance(error, PermissionError):  # the errors of requests have no number
                reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
                raise DataError(f"{name}: download of {url} failed ({reason}); {_by_hand(name)}") from error
            remedy = "free some space there" if error.errno == errno.ENOSPC else "check its permissions"
            reason = error.strerror or str(error)
            raise DataError(f"{folder}: cannot write {file} ({reason}); {remedy} or set CONDCOMP_CACHE") from error
    return folder


@functools.cache  # a warning that is made an error is not remembered, and is raised again next time
def _warn_unofficial(name: str, folder: Path) -> None:
    message = f"{name}: {folder} is an unofficial copy: its own checksums hold, the official ones do not"
    warnings.warn(message, UnofficialCopy, stacklevel=3)


def _embedded() -> tuple[dict[str, Examples], str]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = bunch.images.astype(np.uint8)[order, None]
    labels = bunch.target.astype(np.int64)[order]
    return {"all": (images, labels)}, _short(images.tobytes() + labels.astype("<i8").tobytes())


def _short(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def _fit(source: Source, parts: dict[str, Examples], ranges: Ranges) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the training pixels in [0, 1], float32 [channels, 1, 1].

    Exact, from counts of the pixel values: a float copy of the images would take 16 times their memory. For "image"
    nothing is fitted: 0 and 1.
    """
    channels = source.shape[0]
    if source.scaling == "image":
        return np.zeros((channels, 1, 1), np.float32), np.ones((channels, 1, 1), np.float32)
    counts = np.zeros((channels, 256))
    for part, start, stop in ranges:
        for first in range(start, stop, CHUNK):
            chunk = parts[part][0][first : min(first + CHUNK, stop)]
            for channel in range(channels):
                counts[channel] += np.bincount(chunk[:, channel].ravel(), minlength=256)
    if source.scaling == "all":
        counts = np.broadcast_to(counts.sum(axis=0), counts.shape)
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / source.peak
    mean = share @ values
    sd = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
    shift, scale = mean[:, None, None], np.maximum(sd, GREY_LEVEL)[:, None, None]
    return shift.astype(np.float32), scale.astype(np.float32)


def _split(source: Source, parts: dict[str, Examples], ranges: Ranges, shift: Floats, scale: Floats) -> Split:
    """One split, standardised chunk by chunk straight into the array that is returned."""
    x = np.empty((sum(stop - start for _, start, stop in ranges), *source.shape), np.float32)
    done = 0
    for part, start, stop in ranges:
        for first in range(start, stop, CHUNK):
            chunk = parts[part][0][first : min(first + CHUNK, stop)]
            out = x[done : done + len(chunk)]
            np.divide(chunk, np.float32(source.peak), out=out)
            out -= shift
            out /= scale
            if source.scaling == "image":
                _own_standard(out)
            done += len(chunk)
    labels = [parts[part][1][start:stop] for part, start, stop in ranges]
    return Split(x.reshape(len(x), -1), np.concatenate(labels))


def _own_standard(images: Floats) -> None:
    """Standardise each image in place by its own mean and standard deviation."""
    flat = images.reshape(len(images), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    sd = np.sqrt(np.einsum("ij,ij->i", flat, flat) / flat.shape[1])
    flat /= np.maximum(sd, GREY_LEVEL)[:, None]
