"""The data sets' files: where they are published, how they are cut into splits, read, and trusted or not.

Every reader knows how many examples of which shape it is to find, and raises DataError (one line: the file, what was
found and expected, the remedy) for anything else. Nothing is unpickled and no archive is extracted to the disk.
"""

import gzip
import hashlib
import math
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from condcomp_lib.errors import CondcompError

SUMS = "SHA256SUMS"
Shape = tuple[int, int, int]  # channels, height, width
Examples = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # images [n, channels, height, width], labels [n]
Ranges = tuple[tuple[str, int, int], ...]  # (part, first example, one past the last) for each stretch of a split


@dataclass(frozen=True)
class Part:
    """`count` examples as published in `files` (for idx files: the images, then the labels)."""

    count: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What a data set is published as: its parts, and for each protocol the ranges of train, valid and test."""

    kind: str  # format: embedded, idx, mat or records
    shape: Shape
    scaling: str  # what shares a mean and a standard deviation: all, channel or image
    parts: dict[str, Part]
    protocols: dict[str, tuple[Ranges, Ranges, Ranges]]
    url: str = ""  # before each file's name
    md5: dict[str, str] = field(default_factory=dict)  # official
    archive: str = ""  # one file published in place of the parts' files
    peak: int = 255  # value of the brightest pixel


SOURCES = {
    "digits": Source(
        kind="embedded",
        shape=(1, 8, 8),
        scaling="all",
        parts={"all": Part(1797)},
        protocols={"standard": ((("all", 0, 1077),), (("all", 1077, 1437),), (("all", 1437, 1797),))},
        peak=16,
    ),
    "mnist": Source(
        kind="idx",
        shape=(1, 28, 28),
        scaling="all",
        parts={
            "train": Part(60_000, ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")),
            "test": Part(10_000, ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")),
        },
        protocols={"standard": ((("train", 0, 50_000),), (("train", 50_000, 60_000),), (("test", 0, 10_000),))},
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        md5={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "svhn": Source(
        kind="mat",
        shape=(3, 32, 32),
        scaling="image",
        parts={
            "train": Part(73_257, ("train_32x32.mat",)),
            "test": Part(26_032, ("test_32x32.mat",)),
            "extra": Part(531_131, ("extra_32x32.mat",)),
        },
        # Digits of one photo are neighbours in the file. Only contiguous ranges keep them in one split.
        protocols={
            "standard": ((("train", 0, 57_257),), (("train", 57_257, 63_257),), (("train", 63_257, 73_257),)),
            "official": ((("train", 0, 67_257),), (("train", 67_257, 73_257),), (("test", 0, 26_032),)),
            "official+extra": (
                (("train", 0, 67_257), ("extra", 0, 531_131)),
                (("train", 67_257, 73_257),),
                (("test", 0, 26_032),),
            ),
        },
        url="http://ufldl.stanford.edu/housenumbers/",
        md5={
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
            "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
        },
    ),
    "cifar10": Source(
        kind="records",
        shape=(3, 32, 32),
        scaling="channel",
        parts={
            "train": Part(50_000, tuple(f"data_batch_{number}.bin" for number in range(1, 6))),
            "test": Part(10_000, ("test_batch.bin",)),
        },
        protocols={"standard": ((("train", 0, 45_000),), (("train", 45_000, 50_000),), (("test", 0, 10_000),))},
        url="https://www.cs.toronto.edu/~kriz/",
        md5={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        archive="cifar-10-binary.tar.gz",
    ),
}


class DataError(CondcompError):
    """A data set is missing, damaged or not what its name promises. The message is one line and names the remedy."""

    fatal = True


def damaged(path: Path, what: str) -> DataError:
    """The error for a file that is there but wrong; `path` is `<folder>/<data set>/<file>`.

    >>> str(damaged(Path("data/mnist/a.gz"), "is empty")).split(";")[0]
    'data/mnist/a.gz: is empty'
    """
    what = " ".join(what.split())  # other libraries' messages may run over several lines
    return DataError(
        f"{path}: {what}; move it away and run `condcomp data fetch {path.parent.name}`, or put an intact copy there"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is read into DataError."""
    try:
        yield
    except (EOFError, zlib.error, tarfile.TarError, gzip.BadGzipFile) as error:
        raise damaged(path, f"is damaged or cut short ({error})") from error
    except OSError as error:
        if error.errno is None:  # raised by a parser, not by the system
            raise damaged(path, f"is damaged or cut short ({error})") from error
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from error


def digests(path: Path) -> tuple[str, str]:
    """md5 and sha256 of a file as hex digits, in one pass. Raises DataError when it cannot be read."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            md5.update(block)
            sha256.update(block)
    return md5.hexdigest(), sha256.hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """The sha256 by name of every file that `folder`/SHA256SUMS lists; empty when there is no such file.

    Raises DataError for a line that is not 64 hex digits, a space, a space or star, and a file name.
    """
    path = folder / SUMS
    with reading(path):
        if not path.is_file():
            return {}
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    sums = {}
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?([^/]+)", line.rstrip())
        if match:
            sums[match[2]] = match[1].lower()
        elif line.strip():
            raise DataError(
                f"{path}: line {number} is {line[:40]!r}, expected '<64 hex digits>  <file name>'; "
                f"write the file with `sha256sum` or remove it"
            )
    return sums


def verify(source: Source, folder: Path, files: Sequence[str]) -> tuple[dict[str, str], bool]:
    """The files' sha256 by name, and whether all of them are official.

    A file that is not official must be listed in the SHA256SUMS beside it, with its true sum; else DataError.
    """
    sums, official = {}, True
    for file in files:
        path = folder / file
        md5, sums[file] = digests(path)
        if md5 == source.md5.get(file):
            continue
        official = False
        listed = read_sums(folder).get(file)
        if listed is None:
            known = f"not the official {source.md5[file]}" if file in source.md5 else "and there is no official one"
            raise damaged(path, f"its md5 is {md5}, {known}, and no {SUMS} beside it lists it")
        if listed != sums[file]:
            raise damaged(path, f"its sha256 is {sums[file]}, but {SUMS} beside it says {listed}")
    return sums, official


def read_parts(source: Source, folder: Path, files: Sequence[str], parts: Sequence[str]) -> dict[str, Examples]:
    """Images uint8 [n, channels, height, width] and labels int64 [n] of each of `parts`, read from `files` in `folder`.

    Raises DataError for a damaged file.
    """
    if source.kind == "records":
        return _read_records(source, folder, files, parts)
    found: dict[str, Examples] = {}
    for name in parts:
        part = source.parts[name]
        first, last = folder / part.files[0], folder / part.files[-1]
        if source.kind == "mat":
            found[name] = read_mat(first, part.count, source.shape)
        else:
            images = read_idx(first, (part.count, *source.shape[1:]))
            labels = read_idx(last, (part.count,)).astype(np.int64)
            found[name] = images[:, None], check_labels(last, labels, 0, 9)
    return found


def _read_records(source: Source, folder: Path, files: Sequence[str], parts: Sequence[str]) -> dict[str, Examples]:
    record = 1 + math.prod(source.shape)
    sizes = {f: record * part.count // len(part.files) for part in source.parts.values() for f in part.files}
    archived = read_members(folder / source.archive, sizes) if source.archive in files else None
    found: dict[str, Examples] = {}
    for name in parts:
        part = source.parts[name]
        if archived is None:
            blobs = [(folder / file, read_sized(folder / file, sizes[file])) for file in part.files]
        else:
            blobs = [(folder / source.archive, archived[file]) for file in part.files]
        found[name] = read_records(blobs, source.shape)
    return found


def read_idx(path: Path, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """One gzipped idx file of unsigned bytes, the format of MNIST.

    `shape` is what must be found, examples first: (60000, 28, 28) for images, (60000,) for labels. Returns uint8 of
    that shape. Raises DataError for anything else.
    """
    start = 4 + 4 * len(shape)
    size = math.prod(shape)
    with reading(path), gzip.open(path) as file:
        head = file.read(start)
        if len(head) < start or head[:4] != bytes((0, 0, 8, len(shape))):
            raise damaged(path, f"is no idx file of unsigned bytes with {len(shape)} dimensions")
        found = struct.unpack(f">{len(shape)}I", head[4:])
        if found != tuple(shape):
            raise damaged(path, f"its header says {_by(found)}, expected {_by(shape)}")
        body = file.read(size + 1)  # one more: a longer file shows, and at the end gzip compares its own checksum
    if len(body) != size:
        raise damaged(path, f"holds {'more' if len(body) > size else f'only {len(body):,}'} bytes, expected {size:,}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read_mat(path: Path, count: int, shape: Shape) -> Examples:
    """One MATLAB file of SVHN: X uint8 (height, width, channels, `count`) and y (`count`, 1) with labels 1 to 10.

    Label 10 means digit 0 and is returned as 0. The images are a view into MATLAB's layout, not a copy.
    """
    from scipy.io import loadmat  # a third of a second that only this reader needs

    with reading(path), path.open("rb") as file:
        try:
            found = loadmat(file, variable_names=("X", "y"))
        except OSError:
            raise
        except MemoryError as error:
            raise DataError(f"{path}: reading it takes more memory than there is ({error}); free some") from error
        except Exception as error:  # scipy's parser meets damaged bytes with nearly any type of exception
            raise damaged(path, f"is no readable MATLAB file ({type(error).__name__}: {error})") from error
    channels, height, width = shape
    for key, expected in (("X", (height, width, channels, count)), ("y", (count, 1))):
        if key not in found:
            raise damaged(path, f"holds no variable {key}, expected X and y")
        array = found[key]
        if array.shape != expected or array.dtype.kind not in "ui" or (key == "X" and array.dtype != np.uint8):
            raise damaged(path, f"{key} is {array.dtype} {_by(array.shape)}, expected unsigned bytes {_by(expected)}")
    labels = check_labels(path, found["y"].ravel().astype(np.int64), 1, 10)
    return found["X"].transpose(3, 2, 0, 1), labels % 10


def read_records(blobs: Sequence[tuple[Path, bytes]], shape: Shape) -> Examples:
    """The records of CIFAR-10's binary files, one after the other: a label byte, then the pixels channel by channel.

    `blobs`: the bytes of each file, whose number is already checked, with the path that errors name.
    """
    pieces = []
    for path, blob in blobs:
        pieces.append(np.frombuffer(blob, np.uint8).reshape(-1, 1 + math.prod(shape)))
        check_labels(path, pieces[-1][:, 0].astype(np.int64), 0, 9)
    images = np.concatenate([piece[:, 1:] for piece in pieces]).reshape(-1, *shape)
    return images, np.concatenate([piece[:, 0] for piece in pieces]).astype(np.int64)


def read_sized(path: Path, size: int) -> bytes:
    """All bytes of a file that must have exactly `size` of them; DataError otherwise."""
    with reading(path), path.open("rb") as file:
        blob = file.read(size + 1)
    if len(blob) != size:
        raise damaged(path, f"holds {path.stat().st_size:,} bytes, expected {size:,}")
    return blob


def read_members(archive: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """The files of a gzipped tar by name, read into memory; `sizes` names them and says how many bytes each must have.

    Folders inside the archive do not matter and other members are passed over. Raises DataError when one is missing,
    not a plain file, or of another size.
    """
    found: dict[str, bytes] = {}
    with reading(archive), tarfile.open(archive, "r|gz") as tar:  # as a stream: members come in the archive's order
        for member in tar:
            name = PurePosixPath(member.name).name
            if name not in sizes or not member.isfile():
                continue
            if member.size != sizes[name]:
                raise damaged(archive, f"{name} in it holds {member.size:,} bytes, expected {sizes[name]:,}")
            file = tar.extractfile(member)
            found[name] = file.read() if file else b""
    if missing := [name for name, size in sizes.items() if len(found.get(name, b"")) != size]:
        raise damaged(archive, f"lacks {', '.join(missing)}")
    return found


def check_labels(path: Path, labels: npt.NDArray[np.int64], lowest: int, highest: int) -> npt.NDArray[np.int64]:
    """Return `labels` when all lie from `lowest` to `highest`, raise DataError that names the first other one."""
    wrong = np.flatnonzero((labels < lowest) | (labels > highest))
    if wrong.size:
        where = f"example {wrong[0]:,} has label {labels[wrong[0]]}"
        raise damaged(path, f"{where}, expected {lowest} to {highest}")
    return labels


def _by(shape: Sequence[int]) -> str:
    return " x ".join(f"{size:,}" for size in shape)
