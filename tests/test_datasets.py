"""Loading of the data sets: real files where they are, tiny files in the official layouts, and every bad input."""

import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import io
import os
import struct
import tarfile
import threading
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
from scipy.io import loadmat, savemat
from sklearn.datasets import load_digits

from condcomp_lib import datasets, formats
from condcomp_lib.datasets import DataError, UnofficialCopy
from condcomp_lib.errors import UsageError
from condcomp_lib.formats import Part

REAL = os.environ.get("CONDCOMP_DATA")
FILES = {"mnist": "train-images-idx3-ubyte.gz", "svhn": "train_32x32.mat", "cifar10": "data_batch_1.bin"}
TAR = "cifar-10-binary.tar.gz"

# Counts of the tiny data sets' parts and the ranges of their splits.
TINY = {
    "mnist": ({"train": 12, "test": 5}, {"standard": ((("train", 0, 8),), (("train", 8, 12),), (("test", 0, 5),))}),
    "svhn": (
        {"train": 20, "test": 6, "extra": 7},
        {
            "standard": ((("train", 0, 12),), (("train", 12, 16),), (("train", 16, 20),)),
            "official": ((("train", 0, 16),), (("train", 16, 20),), (("test", 0, 6),)),
            "official+extra": ((("train", 0, 16), ("extra", 0, 7)), (("train", 16, 20),), (("test", 0, 6),)),
        },
    ),
    "cifar10": ({"train": 10, "test": 4}, {"standard": ((("train", 0, 7),), (("train", 7, 10),), (("test", 0, 4),))}),
}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No test reads the user's folders, and each sees its first warning."""
    monkeypatch.setenv("CONDCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONDCOMP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    datasets._warn_unofficial.cache_clear()


# Tiny files in the official layouts


def idx(array, kind=8):
    head = bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes())


def mat(**variables):
    stream = io.BytesIO()
    savemat(stream, variables, do_compression=True)
    return stream.getvalue()


def tar(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def examples(name, seed=0):
    """Random images uint8 [n, c, h, w] and labels of each part of a tiny data set."""
    rng = np.random.default_rng(seed)
    shape = datasets.SOURCES[name].shape
    return {
        part: (rng.integers(0, 256, (count, *shape), np.uint8), rng.permutation(np.arange(count) % 10))
        for part, count in TINY[name][0].items()
    }


def encode(name, raw):
    """The bytes of the official files that hold `raw`."""
    files = {}
    for part, (images, labels) in raw.items():
        named = datasets.SOURCES[name].parts[part].files
        if name == "mnist":
            files[named[0]], files[named[1]] = idx(images[:, 0]), idx(labels.astype(np.uint8))
        elif name == "svhn":
            y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
            files[named[0]] = mat(X=images.transpose(2, 3, 1, 0), y=y)
        else:
            records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], axis=1)
            files.update(
                {file: piece.tobytes() for file, piece in zip(named, np.split(records, len(named)), strict=True)}
            )
    return files


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def list_sums(folder):
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A function that writes a tiny data set into $CONDCOMP_DATA and makes its files the official ones."""

    def make(name, to=None, official=True, **changes):
        raw, (counts, protocols) = examples(name), TINY[name]
        files, folder = encode(name, raw), to or tmp_path / "data" / name
        source = datasets.SOURCES[name]
        tiny_source = dataclasses.replace(
            source,
            parts={part: Part(count, source.parts[part].files) for part, count in counts.items()},
            protocols=protocols,
            md5={file: hashlib.md5(content).hexdigest() for file, content in files.items()} if official else {},
            **changes,
        )
        monkeypatch.setitem(datasets.SOURCES, name, tiny_source)
        write(folder, files)
        return folder, raw

    return make


def make_official(monkeypatch, name, file, content):
    md5 = {file: hashlib.md5(content).hexdigest()}
    monkeypatch.setitem(datasets.SOURCES, name, dataclasses.replace(datasets.SOURCES[name], md5=md5))


def plain(name, raw, ranges):
    """The splits' features as the documentation defines them, in float64 and without any care for memory."""
    pick = [np.concatenate([raw[part][0][start:stop] for part, start, stop in split]) / 255 for split in ranges]
    axes = {"mnist": None, "cifar10": (0, 2, 3)}
    out = []
    for images in pick:
        if name == "svhn":
            mean, sd = images.mean((1, 2, 3), keepdims=True), images.std((1, 2, 3), keepdims=True)
        else:
            mean, sd = (f(pick[0], axis=axes[name], keepdims=True) for f in (np.mean, np.std))
        out.append(((images - mean) / sd).reshape(len(images), -1))
    return out


ALL_PROTOCOLS = [(name, protocol) for name, (_, protocols) in TINY.items() for protocol in protocols]


@pytest.mark.parametrize(("name", "protocol"), ALL_PROTOCOLS)
def test_tiny_official_files_are_split_and_standardised_as_documented(tiny, name, protocol):
    _, raw = tiny(name)
    data = datasets.load(name, protocol)
    ranges = TINY[name][1][protocol]
    assert data.note == "official"
    assert (data.name, data.classes, data.shape) == (name, 10, datasets.SOURCES[name].shape)
    for split, features, stretch in zip(
        (data.train, data.valid, data.test), plain(name, raw, ranges), ranges, strict=True
    ):
        assert split.x.dtype == np.float32
        assert split.x.flags.c_contiguous
        assert split.y.dtype == np.int64
        np.testing.assert_allclose(split.x, features, atol=1e-5)
        np.testing.assert_array_equal(split.y, np.concatenate([raw[part][1][a:b] for part, a, b in stretch]))
        assert len(split) == len(split.x) == len(split.y)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_standardisation_is_fitted_on_train_only(tiny, name):
    folder, raw = tiny(name, official=False)
    list_sums(folder)
    with pytest.warns(UnofficialCopy):
        before = datasets.load(name)
    raw["test"][0][:] = 255
    raw["train"][0][-3:] = 0  # validation examples
    write(folder, encode(name, raw))
    list_sums(folder)
    after = datasets.load(name)
    np.testing.assert_array_equal(before.train.x, after.train.x)
    assert (before.test.x != after.test.x).any()
    assert before.checksum != after.checksum


@pytest.mark.parametrize("name", TINY)
def test_images_of_one_colour_become_finite_features(tiny, name):
    folder, raw = tiny(name, official=False)
    raw["train"][0][:] = 7
    write(folder, encode(name, raw))
    list_sums(folder)
    with pytest.warns(UnofficialCopy):
        data = datasets.load(name)
    np.testing.assert_allclose(data.train.x, 0, atol=1e-6)
    assert np.isfinite(data.test.x).all()


def test_svhn_standard_is_the_same_with_and_without_the_other_files(tiny):
    folder, _ = tiny("svhn")
    with_others = datasets.load("svhn")
    for file in ("test_32x32.mat", "extra_32x32.mat"):
        (folder / file).unlink()
    without = datasets.load("svhn", download=False)
    np.testing.assert_array_equal(with_others.train.x, without.train.x)
    assert with_others.checksum == without.checksum
    with pytest.raises(DataError, match=r"lacks test_32x32\.mat; .*data fetch svhn --protocol official`"):
        datasets.load("svhn", "official", download=False)


def test_splits_larger_than_a_chunk_are_whole(tiny, monkeypatch):
    tiny("svhn")
    whole = datasets.load("svhn", "official+extra")
    monkeypatch.setattr(datasets, "CHUNK", 3)
    np.testing.assert_array_equal(whole.train.x, datasets.load("svhn", "official+extra").train.x)


# Digits


def test_digits_are_one_permutation_of_the_embedded_set():
    data = datasets.load("digits")
    splits = (data.train, data.valid, data.test)
    assert [len(split) for split in splits] == [1077, 360, 360]
    assert (data.note, data.shape, data.classes) == ("embedded in scikit-learn", (1, 8, 8), 10)
    assert data.train.x.dtype == np.float32
    assert data.train.x.mean(dtype=float) == pytest.approx(0, abs=1e-5)
    assert data.train.x.std(dtype=float) == pytest.approx(1, abs=1e-5)
    assert abs(data.test.x.mean(dtype=float)) > 1e-5
    x, y = np.concatenate([split.x for split in splits]), np.concatenate([split.y for split in splits])
    bunch = load_digits()
    mean, sd = (f(bunch.data[np.random.default_rng(0).permutation(1797)[:1077]]) for f in (np.mean, np.std))
    expected = {(row.astype(int).tobytes(), label) for row, label in zip(bunch.data, bunch.target, strict=True)}
    found = {(np.rint(row * sd + mean).astype(int).tobytes(), label) for row, label in zip(x, y, strict=True)}
    assert found == expected


def test_digits_are_the_same_each_time():
    first, second = datasets.load("digits"), datasets.load("digits")
    np.testing.assert_array_equal(first.train.x, second.train.x)
    assert first.checksum == second.checksum
    assert len(first.checksum) == 16


# Real files


@functools.cache
def real_labels(name):
    folder = Path(REAL) / name
    if name == "mnist":
        parts = [
            gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:] for part in ("train", "t10k")
        ]
        return np.frombuffer(b"".join(parts), np.uint8)
    if name == "svhn":
        return loadmat(folder / "train_32x32.mat", variable_names=["y"])["y"].ravel() % 10
    files = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    return np.concatenate([np.fromfile(folder / file, np.uint8)[::3073] for file in files])


@pytest.fixture(scope="module", params=[("mnist", 784), ("svhn", 3072), ("cifar10", 3072)], ids=lambda param: param[0])
def real(request):
    name, features = request.param
    if not REAL or not (Path(REAL) / name).is_dir():
        pytest.skip(f"the real {name} files are not in $CONDCOMP_DATA/{name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = datasets.load(name, folders=[Path(REAL)], download=False)
    return data, features, [warning.category for warning in caught]


SIZES = {"mnist": (50_000, 10_000, 10_000), "svhn": (57_257, 6_000, 10_000), "cifar10": (45_000, 5_000, 10_000)}


def test_real_files_have_the_documented_counts_and_contiguous_splits(real):
    data, features, _ = real
    splits = (data.train, data.valid, data.test)
    assert tuple(len(split) for split in splits) == SIZES[data.name]
    for split in splits:
        assert split.x.shape == (len(split), features)
        assert (split.x.dtype, split.y.dtype) == (np.float32, np.int64)
        assert split.x.flags.c_contiguous
        assert set(np.unique(split.y)) == set(range(10))
    np.testing.assert_array_equal(np.concatenate([split.y for split in splits]), real_labels(data.name))


def test_real_files_are_standardised_by_train(real):
    data, _, _ = real
    channels = data.shape[0]
    for channel in range(channels):
        train, test = (split.x.reshape(len(split), channels, -1)[:, channel] for split in (data.train, data.test))
        if data.name != "svhn":
            assert train.mean(dtype=float) == pytest.approx(0, abs=1e-5)
            assert train.std() == pytest.approx(1, abs=1e-4)
            assert abs(test.mean(dtype=float)) > 1e-4
    if data.name == "svhn":
        for split in (data.train, data.valid, data.test):
            sample = split.x[:: len(split) // 500]
            np.testing.assert_allclose(sample.mean(axis=1), 0, atol=1e-4)
            np.testing.assert_allclose(sample.std(axis=1), 1, atol=1e-3)


def test_real_files_say_whether_they_are_official(real):
    data, _, caught = real
    assert data.note == ("official" if UnofficialCopy not in caught else "unofficial copy")
    assert len(caught) <= 1


# Trust


@pytest.mark.parametrize("name", TINY)
def test_an_unofficial_copy_whose_sums_hold_is_named_and_warned_of_once(tiny, name):
    folder, _ = tiny(name, official=False)
    list_sums(folder)
    with pytest.warns(UnofficialCopy, match=f"{name}: .* is an unofficial copy"):
        data = datasets.load(name)
    assert data.note == "unofficial copy"
    assert datasets.load(name).note == "unofficial copy"  # a second warning would be an error here


@pytest.mark.parametrize("star", [" ", "*"])
def test_sums_are_read_in_both_forms_that_sha256sum_writes(tmp_path, star):
    (tmp_path / "SHA256SUMS").write_text(f"{'A' * 64} {star}a.bin\n\n{'b' * 64} {star}./b c.bin\r\n")
    assert formats.read_sums(tmp_path) == {"a.bin": "a" * 64, "b c.bin": "b" * 64}
    assert formats.read_sums(tmp_path / "nowhere") == {}


def test_the_official_archive_of_cifar10_is_read_in_place_of_single_files(tiny, monkeypatch):
    folder, raw = tiny("cifar10", official=False)
    files = encode("cifar10", raw)
    members = {f"cifar-10-batches-bin/{file}": files[file] for file in sorted(files, reverse=True)}
    content = tar({"../../evil.txt": b"evil", "cifar-10-batches-bin/readme.html": b"hello", **members})
    for file in files:
        (folder / file).unlink()
    write(folder, {TAR: content})
    make_official(monkeypatch, "cifar10", TAR, content)
    data = datasets.load("cifar10")
    assert data.note == "official"
    np.testing.assert_allclose(data.train.x, plain("cifar10", raw, TINY["cifar10"][1]["standard"])[0], atol=1e-5)
    np.testing.assert_array_equal(data.test.y, raw["test"][1])
    assert [path.name for path in folder.iterdir()] == [TAR]
    assert not list(folder.parents[1].rglob("evil.txt"))
    assert any(TAR in line and "official" in line for line in datasets.check("cifar10"))


ZEROS = {part: (np.zeros((n, 3, 32, 32), np.uint8), np.zeros(n, int)) for part, n in (("train", 10), ("test", 4))}
MEMBERS = encode("cifar10", ZEROS)
BAD_ARCHIVES = {
    "cut short": (tar(MEMBERS)[:-30], r"lacks test_batch\.bin"),
    "no archive": (b"hello", "damaged or cut short"),
    "lacks a member": (tar({k: v for k, v in MEMBERS.items() if k != "data_batch_3.bin"}), r"lacks data_batch_3\.bin"),
    "a link": (tar({**MEMBERS, "test_batch.bin": "/etc/passwd"}), r"lacks test_batch\.bin"),
    "short member": (
        tar({**MEMBERS, "test_batch.bin": b"abc"}),
        r"test_batch\.bin in it holds 3 bytes, expected 12,292",
    ),
    "label": (tar({**MEMBERS, "test_batch.bin": b"\x0a" * 12_292}), "label 10, expected 0 to 9"),
}


@pytest.mark.parametrize(("content", "expected"), BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
def test_a_bad_archive_is_refused_even_when_its_sum_holds(tiny, content, expected):
    folder, _ = tiny("cifar10", official=False)
    write(folder, {TAR: content})
    list_sums(folder)
    refused("cifar10", folder / TAR, expected)


def test_an_archive_cut_anywhere_is_refused(tmp_path):
    content = {file: np.random.default_rng(0).bytes(2_000) for file in ("a.bin", "b.bin")}
    whole, path = tar(content), tmp_path / TAR
    for size in (*range(0, len(whole) - 200, 97), len(whole)):
        path.write_bytes(whole[:size])
        if size == len(whole):
            assert formats.read_members(path, dict.fromkeys(content, 2_000)) == content
        else:
            with pytest.raises(DataError):
                formats.read_members(path, dict.fromkeys(content, 2_000))


# Bad input


def refused(name, path, expected):
    """`load` and `check` raise a one-line DataError that names the file, what is wrong, and a remedy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnofficialCopy)
        with pytest.raises(DataError, match=expected) as caught:
            datasets.load(name, download=False)
    with pytest.raises(DataError, match=expected):
        datasets.check(name)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert any(
        f"; {remedy}" in message for remedy in ("move it away and run", "write the file with", "check its", "run `")
    )


LABELS = "train-labels-idx1-ubyte.gz"
X, Y = np.zeros((32, 32, 3, 20), np.uint8), np.ones((20, 1), np.uint8)
BYTES = np.zeros((12, 28, 28), np.uint8)
WRONG = {  # data set, file, its content or what to do to it, message
    "mnist cut short": ("mnist", FILES["mnist"], lambda good: good[:-20], "damaged or cut short"),
    "mnist empty": ("mnist", FILES["mnist"], b"", "is no idx file"),
    "mnist not gzip": ("mnist", FILES["mnist"], b"hello", "damaged or cut short"),
    "mnist flipped bits": ("mnist", FILES["mnist"], lambda good: flip(good, len(good) // 2), "damaged or cut short"),
    "mnist floats": ("mnist", FILES["mnist"], idx(BYTES, kind=13), "no idx file of unsigned bytes with 3 dimensions"),
    "mnist other size": ("mnist", FILES["mnist"], idx(BYTES[:, 1:]), "header says 12 x 27 x 28, expected 12 x 28 x 28"),
    "mnist fewer images": ("mnist", FILES["mnist"], idx(BYTES[1:]), "header says 11 x 28 x 28, expected 12 x 28 x 28"),
    "mnist fewer labels": ("mnist", LABELS, idx(np.zeros(11, np.uint8)), "header says 11, expected 12"),
    "mnist more labels": ("mnist", LABELS, idx(np.zeros(13, np.uint8)), "header says 13, expected 12"),
    "mnist false header": (
        "mnist",
        LABELS,
        gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 12, 1))),
        "only 1 bytes, expected 12",
    ),
    "mnist too long": (
        "mnist",
        LABELS,
        gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 12)) + bytes(13)),
        "holds more bytes",
    ),
    "mnist label": ("mnist", LABELS, idx(np.full(12, 10, np.uint8)), "example 0 has label 10, expected 0 to 9"),
    "svhn cut short": ("svhn", FILES["svhn"], lambda good: good[: len(good) // 2], "train_32x32"),
    "svhn cut in the head": ("svhn", FILES["svhn"], lambda good: good[:50], "train_32x32"),
    "svhn empty": ("svhn", FILES["svhn"], b"", "train_32x32"),
    "svhn not MATLAB": ("svhn", FILES["svhn"], b"hello" * 200, "no readable MATLAB file"),
    "svhn HDF5": ("svhn", FILES["svhn"], bytes(124) + b"\x00\x02IM" + bytes(400), "no readable MATLAB file"),
    "svhn without y": ("svhn", FILES["svhn"], mat(X=X), "holds no variable y, expected X and y"),
    "svhn other size": ("svhn", FILES["svhn"], mat(X=X[1:], y=Y), "X is uint8 31 x 32 x 3 x 20, expected"),
    "svhn floats": ("svhn", FILES["svhn"], mat(X=X.astype(float), y=Y), "X is float64 .*, expected unsigned bytes"),
    "svhn fewer images": (
        "svhn",
        FILES["svhn"],
        mat(X=X[..., 1:], y=Y),
        "3 x 19, expected unsigned bytes 32 x 32 x 3 x 20",
    ),
    "svhn fewer labels": (
        "svhn",
        FILES["svhn"],
        mat(X=X, y=Y[1:]),
        "y is uint8 19 x 1, expected unsigned bytes 20 x 1",
    ),
    "svhn text labels": ("svhn", FILES["svhn"], mat(X=X, y=np.array(["a"] * 20)), "y is <U1"),
    "svhn label 0": ("svhn", FILES["svhn"], mat(X=X, y=Y * 0), "example 0 has label 0, expected 1 to 10"),
    "svhn label 11": ("svhn", FILES["svhn"], mat(X=X, y=Y * 11), "example 0 has label 11, expected 1 to 10"),
    "cifar10 cut short": ("cifar10", FILES["cifar10"], lambda good: good[:-1], "holds 6,145 bytes, expected 6,146"),
    "cifar10 empty": ("cifar10", FILES["cifar10"], b"", "holds 0 bytes, expected 6,146"),
    "cifar10 too long": ("cifar10", FILES["cifar10"], lambda good: good + good, "holds 12,292 bytes, expected 6,146"),
    "cifar10 label": (
        "cifar10",
        FILES["cifar10"],
        lambda good: b"\x0a" + good[1:],
        "example 0 has label 10, expected 0 to 9",
    ),
}


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


@pytest.mark.parametrize(("name", "file", "content", "expected"), WRONG.values(), ids=WRONG)
def test_a_damaged_file_is_refused_even_when_its_sum_holds(tiny, name, file, content, expected):
    folder, _ = tiny(name, official=False)
    path = folder / file
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    list_sums(folder)
    refused(name, path, expected)


@pytest.mark.parametrize("name", TINY)
def test_any_damage_of_bytes_is_a_data_error_or_harmless(tiny, name):
    folder, _ = tiny(name, official=False)
    path, rng = folder / FILES[name], np.random.default_rng(3)
    source, good = datasets.SOURCES[name], path.read_bytes()
    whole = formats.read_parts(source, folder, source.parts["train"].files, ["train"])["train"]
    places = [*range(0, min(len(good), 300), 9), *rng.integers(0, len(good), 20)]
    for place in places:
        for content in (good[:place], flip(good, place)):
            path.write_bytes(content)
            try:
                images, labels = formats.read_parts(source, folder, source.parts["train"].files, ["train"])["train"]
            except DataError:
                continue
            assert (images.shape, labels.shape) == (whole[0].shape, whole[1].shape)
            assert labels.min() >= 0
            assert labels.max() <= 9


@pytest.mark.parametrize("name", TINY)
def test_a_file_nothing_vouches_for_is_refused(tiny, name):
    folder, _ = tiny(name, official=True)
    path = folder / FILES[name]
    path.write_bytes(flip(path.read_bytes(), 30))
    refused(name, path, "its md5 is [0-9a-f]{32}, not the official [0-9a-f]{32}, and no SHA256SUMS beside it lists it")


def test_single_files_of_cifar10_have_no_official_checksum(tiny):
    folder, _ = tiny("cifar10", official=False)
    refused("cifar10", folder / FILES["cifar10"], "there is no official one, and no SHA256SUMS beside it lists it")


@pytest.mark.parametrize("name", TINY)
def test_a_file_whose_listed_sum_does_not_hold_is_refused(tiny, name):
    folder, _ = tiny(name, official=False)
    list_sums(folder)
    path = folder / FILES[name]
    path.write_bytes(flip(path.read_bytes(), 30))
    refused(name, path, "its sha256 is [0-9a-f]{64}, but SHA256SUMS beside it says [0-9a-f]{64}")


@pytest.mark.parametrize(
    "line", [b"hello", b"abc  a.gz", b"0" * 64, b"g" * 64 + b"  a.gz", b"0" * 64 + b"  ../a.gz", b"\xff\x00"]
)
def test_malformed_sums_are_refused(tiny, line):
    folder, _ = tiny("mnist", official=False)
    list_sums(folder)
    with (folder / "SHA256SUMS").open("ab") as file:
        file.write(line + b"\n")
    refused("mnist", folder / "SHA256SUMS", "line 5 is .*, expected '<64 hex digits>  <file name>'")


@pytest.mark.parametrize("name", TINY)
def test_missing_files_are_named_with_what_to_do(tiny, name):
    folder, _ = tiny(name)
    (folder / FILES[name]).unlink()
    refused(
        name,
        folder,
        f"lacks {FILES[name]}.*; run `condcomp data fetch {name}`, or put the files into .CONDCOMP_DATA/{name}/",
    )


def test_a_folder_in_a_files_place_is_a_missing_file(tiny):
    folder, _ = tiny("mnist")
    (folder / FILES["mnist"]).unlink()
    (folder / FILES["mnist"]).mkdir()
    refused("mnist", folder, f"lacks {FILES['mnist']}")


def test_an_unreadable_file_is_named(tiny, monkeypatch):
    folder, _ = tiny("mnist")
    path, original = folder / FILES["mnist"], Path.open

    def guarded(self, *args, **kwargs):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)
    refused("mnist", path, r"cannot be read \(Permission denied\)")


def test_too_little_memory_for_a_file_is_said_so(tiny, monkeypatch):
    tiny("svhn")

    def full(*args, **kwargs):
        raise MemoryError("Unable to allocate 1.5 GiB")

    monkeypatch.setattr("scipy.io.loadmat", full)
    with pytest.raises(DataError, match=r"train_32x32\.mat: reading it takes more memory than there is"):
        datasets.load("svhn")


@pytest.mark.parametrize("call", [datasets.load, datasets.check, datasets.fetch])
def test_unknown_data_sets_list_the_known_ones(call):
    with pytest.raises(UsageError, match="unknown data set 'imagenet'; known: cifar10, digits, mnist, svhn"):
        call("imagenet")


@pytest.mark.parametrize("name", datasets.NAMES)
def test_unknown_protocols_list_the_known_ones(name):
    known = ", ".join(sorted(datasets.SOURCES[name].protocols)).replace("+", r"\+")
    with pytest.raises(UsageError, match=f"unknown protocol of {name} 'mine'; known: {known}$"):
        datasets.load(name, "mine")


# Folders, check and fetch


def test_the_first_folder_with_all_files_is_taken(tiny, tmp_path):
    first, _ = tiny("mnist")
    second, _ = tiny("mnist", to=tmp_path / "cache" / "data" / "mnist")
    assert datasets.fetch("mnist")[0].parent == first
    assert datasets.load("mnist", folders=[tmp_path / "cache" / "data"], download=False).note == "official"
    (first / FILES["mnist"]).unlink()
    assert [path.parent for path in datasets.fetch("mnist")] == [second] * 4


def test_check_tells_where_and_what(tiny):
    folder, _ = tiny("svhn", official=False)
    list_sums(folder)
    (folder / "extra_32x32.mat").unlink()
    lines = datasets.check("svhn")
    assert lines[0] == f"svhn: {folder}"
    size = (folder / "test_32x32.mat").stat().st_size
    assert f"  test_32x32.mat: {size:,} bytes, unofficial copy, its SHA256SUMS holds" in lines
    assert "  train: 20 examples, readable" in lines
    assert "'official+extra'" in lines[-1]
    assert len(lines) == 6
    assert datasets.check("digits") == ["digits: embedded in scikit-learn, nothing to check"]


def test_check_calls_official_files_official(tiny, tmp_path):
    folder, _ = tiny("mnist")
    assert [line.endswith("official") for line in datasets.check("mnist", [folder.parent])][1:5] == [True] * 4


# Downloads


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        self.server.asked.append(Path(self.path).name)
        outputfile.write(content[: len(content) // 2] if self.server.breaks_off else content)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "served"))
    server.asked, server.breaks_off = [], False
    server.folder, server.url = tmp_path / "served", f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    with warnings.catch_warnings():  # a broken download leaves its connection to the garbage collector, which warns
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def nothing_left(tmp_path):
    return not [path for path in tmp_path.rglob("cache/**/*") if path.is_file()]


@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_missing_files_are_downloaded_and_found_again(tiny, server, tmp_path, name):
    _, raw = tiny(name, to=server.folder, url=server.url)
    data = datasets.load(name)
    assert data.note == "official"
    np.testing.assert_array_equal(data.train.y, raw["train"][1][: len(data.train)])
    used = {"mnist": 4, "svhn": 1}[name]
    assert len(server.asked) == used
    assert len(list((tmp_path / "cache" / "data" / name).iterdir())) == used
    assert datasets.load(name, download=False).checksum == data.checksum
    assert len(server.asked) == used


def test_a_protocol_downloads_only_what_it_lacks(tiny, server, tmp_path):
    tiny("svhn", to=server.folder, url=server.url)
    datasets.fetch("svhn")
    found = datasets.fetch("svhn", "official")
    assert server.asked == ["train_32x32.mat", "test_32x32.mat"]
    assert found == [tmp_path / "cache" / "data" / "svhn" / file for file in server.asked]


def test_cifar10_is_downloaded_as_its_archive(tiny, server, tmp_path, monkeypatch):
    _, raw = tiny("cifar10", to=tmp_path / "unused", url=server.url)
    content = tar(encode("cifar10", raw))
    write(server.folder, {TAR: content})
    make_official(monkeypatch, "cifar10", TAR, content)
    assert datasets.load("cifar10").note == "official"
    assert [path.name for path in datasets.fetch("cifar10")] == [TAR]
    assert server.asked == [TAR]


def fails_to_download(expected):
    with pytest.raises(DataError, match=expected) as caught:
        datasets.load("mnist")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_download_with_another_checksum_is_thrown_away(tiny, server, tmp_path):
    folder, _ = tiny("mnist", to=server.folder, url=server.url)
    write(folder, {FILES["mnist"]: b"a page that says the file has moved"})
    message = fails_to_download("is not the official file")
    assert server.url + FILES["mnist"] in message
    assert "put the files into $CONDCOMP_DATA/mnist/" in message
    assert nothing_left(tmp_path)


def test_a_download_that_breaks_off_is_thrown_away(tiny, server, tmp_path):
    tiny("mnist", to=server.folder, url=server.url)
    server.breaks_off = True
    assert server.url in fails_to_download("download of .* failed")
    assert nothing_left(tmp_path)


def test_a_file_the_server_does_not_have_is_named(tiny, server, tmp_path):
    folder, _ = tiny("mnist", to=server.folder, url=server.url)
    (folder / FILES["mnist"]).unlink()
    assert "404" in fails_to_download(f"download of {server.url}{FILES['mnist']} failed")
    assert nothing_left(tmp_path)


def test_no_network_says_which_url_and_what_to_do(tiny, server, tmp_path):
    tiny("mnist", to=tmp_path / "unused", url="http://127.0.0.1:1/")
    message = fails_to_download(r"download of http://127\.0\.0\.1:1/.* failed \(ConnectionError: .*refused")
    assert "put the files into $CONDCOMP_DATA/mnist/" in message
    assert nothing_left(tmp_path)


def test_a_full_disk_leaves_nothing_half_written(tiny, tmp_path, monkeypatch):
    tiny("mnist", to=tmp_path / "unused")

    def fill(self, url, output_file, pooch):
        Path(output_file).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", fill)
    message = fails_to_download(
        r"cannot write .* \(No space left on device\); free some space there or set CONDCOMP_CACHE"
    )
    assert str(tmp_path / "cache" / "data" / "mnist") in message
    assert nothing_left(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tiny, tmp_path):
    tiny("mnist", to=tmp_path / "unused")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data").write_text("a file where a folder should be")
    fails_to_download("cannot write .*; check its permissions or set CONDCOMP_CACHE")
