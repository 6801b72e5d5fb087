"""The run store: names, atomic records, corruption, full and read-only folders, newer schemas."""

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condcomp_lib import files, runs, studies
from condcomp_lib.files import SpecError, StoreError
from condcomp_lib.provenance import environment
from condcomp_lib.runs import CorruptRecord, Outcome, RunSpec, RunStore

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SPEC = RunSpec("toy", 1, {"dataset": "none", "target_seed": 3})


def compute(spec):
    return Outcome({"accuracy": 0.25}, {"w": np.arange(6).reshape(2, 3)}, {"note": "official", "checksum": "abc"})


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "store")


@given(st.dictionaries(st.text().filter(lambda k: k not in ("study", "recipe")), PLAIN, max_size=4), st.randoms())
def test_a_name_depends_on_the_settings_and_not_on_their_order(settings, random):
    items = list(settings.items())
    random.shuffle(items)
    assert RunSpec("toy", 1, settings).name == RunSpec("toy", 1, dict(items)).name
    assert RunSpec("toy", 1, settings).name != RunSpec("toy", 2, settings).name
    assert RunSpec("toy", 1, settings).name != RunSpec("toy", 1, {**settings, "another": 1}).name


def test_changing_the_dict_afterwards_does_not_change_the_spec():
    settings = {"widths": [1, 2]}
    spec = RunSpec("toy", 1, settings)
    settings["widths"].append(3)
    assert spec.settings == {"widths": [1, 2]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": float("nan")}, r"settings\.rate is nan"),
        ({"rates": [0.1, float("inf")]}, r"settings\.rates\[1\] is inf"),
        ({"seed": np.int64(3)}, r"settings\.seed is a numpy\.int64"),
        ({"by": {1: 2}}, r"settings\.by has the key 1"),
        ({"recipe": 2}, "'recipe' is a field of the run itself"),
    ],
)
def test_settings_that_are_not_plain_are_refused(settings, message):
    with pytest.raises(SpecError, match=message):
        RunSpec("toy", 1, settings)


def test_a_run_comes_back_as_it_was(store):
    made = store.obtain(SPEC, compute)
    found = store.get(SPEC)
    assert found == made
    assert found.spec == SPEC
    assert found.result == {"accuracy": 0.25}
    np.testing.assert_array_equal(found.arrays()["w"], np.arange(6).reshape(2, 3))
    assert found.provenance["data_note"] == "official"
    assert {"commit", "dirty", "versions", "threads", "device", "seconds", "data_checksum"} <= set(found.provenance)
    assert [record.name for record in store.records()] == [SPEC.name]


def test_a_stored_run_is_not_computed_again(store):
    store.obtain(SPEC, compute)
    store.obtain(SPEC, lambda spec: pytest.fail("computed again"))


def test_the_same_run_twice_gives_identical_records_but_for_time(tmp_path):
    bodies = []
    for name in ("a", "b"):
        store = RunStore(tmp_path / name)
        store.obtain(SPEC, compute)
        body = json.loads(store.path(SPEC).read_text())
        for key in ("seconds", "finished"):
            del body["provenance"][key]
        del body["checksum"]
        bodies.append(body)
    assert bodies[0] == bodies[1]


def test_two_threads_on_one_store_compute_a_run_once(store):
    counted = []

    def slow(spec):
        counted.append(1)
        threading.Event().wait(0.1)
        return Outcome({"accuracy": 0.5})

    threads = [threading.Thread(target=store.obtain, args=(SPEC, slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 1


@pytest.mark.parametrize(
    "damage", ["half", "empty", "bit", "number", "array", "no array", "another run", "not an object"]
)
def test_a_corrupt_record_is_reported_kept_aside_and_computed_anew(store, damage):
    store.obtain(SPEC, compute)
    path = store.path(SPEC)
    text, arrays = path.read_bytes(), store.get(SPEC).arrays_file
    if damage == "array":
        arrays.write_bytes(arrays.read_bytes()[:-1])
    elif damage == "no array":
        arrays.unlink()
    elif damage == "another run":
        other = RunSpec("toy", 1, {"target_seed": 9})
        store.obtain(other, compute)
        path.write_bytes(store.path(other).read_bytes())
    else:
        path.write_bytes({
            "half": text[: len(text) // 2],
            "empty": b"",
            "bit": bytes([text[0] ^ 1]) + text[1:],
            "number": text.replace(b"0.25", b"0.95"),
            "not an object": b"[1, 2]",
        }[damage])  # fmt: skip
    with pytest.warns(CorruptRecord, match=str(path)):
        assert store.get(SPEC) is None
    with pytest.warns(CorruptRecord):
        again = store.obtain(SPEC, compute)
    assert again.result == {"accuracy": 0.25}
    # Damaged arrays are simply written anew, and with them the record is whole again.
    assert path.with_suffix(".corrupt").exists() == ("array" not in damage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get(SPEC) == again


def test_a_corrupt_record_is_left_out_of_lists(store):
    for seed in range(3):
        store.obtain(RunSpec("toy", 1, {"target_seed": seed}), compute)
    store.path(RunSpec("toy", 1, {"target_seed": 1})).write_text("{")
    with pytest.warns(CorruptRecord):
        assert len(list(store.records("toy"))) == 2


def test_a_record_of_a_newer_schema_is_a_clear_error_and_stays(store):
    store.obtain(SPEC, compute)
    path = store.path(SPEC)
    body = json.loads(path.read_text()) | {"schema": runs.SCHEMA + 1}
    path.write_text(json.dumps(body))
    for use in (lambda: store.get(SPEC), lambda: store.obtain(SPEC, compute), lambda: list(store.records())):
        with pytest.raises(StoreError, match=f"has schema {runs.SCHEMA + 1}.*upgrade condcomp"):
            use()
    assert json.loads(path.read_text()) == body


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only"), (errno.EACCES, "permission denied")],
)
def test_a_store_that_cannot_be_written_is_one_clear_line(store, monkeypatch, code, message):
    store.obtain(RunSpec("toy", 1, {"target_seed": 0}), compute)

    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(StoreError, match=message) as raised:
        store.obtain(SPEC, compute)
    assert "\n" not in str(raised.value)
    assert store.get(SPEC) is None
    assert not list(store.folder.glob("*/.*.tmp"))
    assert len(list(store.records())) == 1


def test_a_store_below_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot use .*check that its folder exists"):
        RunStore(tmp_path / "file").obtain(SPEC, compute)


def test_a_really_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on file size set by the kernel stands for a full disk: the write itself fails half-way."""
    program = textwrap.dedent("""
        import resource, sys
        import numpy as np
        from condcomp_lib.runs import Outcome, RunSpec, RunStore
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        noise = np.random.default_rng(0).random(10_000)
        RunStore(sys.argv[1]).obtain(RunSpec("toy", 1, {}), lambda spec: Outcome({}, {"noise": noise}))
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "StoreError: cannot use" in done.stderr
    assert not [path for path in tmp_path.glob("toy/*") if path.is_file()]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_results_that_repeat_the_spec_or_are_not_plain_are_refused(store):
    with pytest.raises(SpecError, match="repeats target_seed"):
        store.obtain(SPEC, lambda spec: Outcome({"target_seed": 1}))
    with pytest.raises(SpecError, match=r"result\.accuracy is nan"):
        store.obtain(SPEC, lambda spec: Outcome({"accuracy": float("nan")}))
    with pytest.raises(SpecError, match="array 'w' holds Python objects"):
        store.obtain(SPEC, lambda spec: Outcome({}, {"w": np.array([{}], dtype=object)}))
    assert store.get(SPEC) is None


def test_old_leftovers_are_cleaned_and_young_ones_stay(store):
    store.obtain(SPEC, compute)
    old, young = (store.folder / "toy" / f".{name}.json.1.ab.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    assert store.clean() == 1
    assert young.exists()
    assert not old.exists()


def test_the_flat_table_has_the_common_columns_first(store):
    store.obtain(SPEC, lambda spec: Outcome({"accuracy": 0.5, "own": 1}))
    table = runs.table(store.records())
    assert list(table.columns) == [*runs.COLUMNS, "own"]
    assert table.iloc[0][["study", "recipe", "dataset", "target_seed", "accuracy", "own"]].tolist() == [
        "toy", 1, "none", 3, 0.5, 1,
    ]  # fmt: skip


def test_the_digest_follows_results_and_not_provenance(tmp_path):
    first, second, third = (RunStore(tmp_path / name) for name in "abc")
    first.put(SPEC, Outcome({"accuracy": 0.5}), seconds=1.0)
    second.put(SPEC, Outcome({"accuracy": 0.5}), seconds=2.0)
    third.put(SPEC, Outcome({"accuracy": 0.6}), seconds=1.0)
    assert runs.digest(first.records()) == runs.digest(second.records()) != runs.digest(third.records())


def test_weights_never_pass_through_a_pickle(store):
    store.obtain(SPEC, compute)
    arrays = store.get(SPEC).arrays_file
    with np.load(arrays, allow_pickle=False) as stored:
        assert stored["w"].dtype == np.arange(1).dtype


@pytest.mark.parametrize("name", studies.NAMES)
@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_every_run_of_a_studys_table_is_another_one(name, profile):
    names = [spec.name for spec in studies.get(name).specs(profile)]
    assert names
    assert len(set(names)) == len(names)


def test_looking_up_the_commit_leaves_the_repository_alone(tmp_path, monkeypatch):
    """A worker killed while it looks must not leave a lock behind; git writes the index anew unless told not to."""
    (tmp_path / "condcomp_lib").mkdir()
    kept, index = tmp_path / "condcomp_lib" / "kept.py", tmp_path / ".git" / "index"
    kept.write_text("1")
    for arguments in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm kept"):
        subprocess.run(["git", *arguments.split()], cwd=tmp_path, check=True)
    os.utime(kept, (0, 0))  # which git takes for a change until it has looked into the file
    monkeypatch.setattr("condcomp_lib.paths.root", lambda: tmp_path)
    before = index.read_bytes()
    assert environment.__wrapped__()["dirty"] is False
    assert index.read_bytes() == before
