"""Sweeps: resuming, failures, two at once, kill -9 at random moments; and the audit."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_child import compute, processes, specs

from condcomp_lib.datasets import DataError
from condcomp_lib.errors import CondcompError, UsageError
from condcomp_lib.provenance import environment
from condcomp_lib.runs import Outcome, RunSpec, RunStore, table
from condcomp_lib.sweep import SweepError, audit, sweep

CHILD = Path(__file__).with_name("sweep_child.py")


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "store")


def fail_on_two(spec):
    if spec.settings["target_seed"] == 2:
        raise ValueError("two is bad")
    return Outcome({"accuracy": 0.5})


def start(store, jobs, count, log=""):
    child = subprocess.Popen(
        [sys.executable, str(CHILD), str(store.folder), str(jobs), str(count)],
        env={**os.environ, "SWEEP_CHILD_LOG": str(log)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout.readline() == "ready\n"
    return child


def contents(store):
    """Every finished record as bytes; reading each also proves that it is whole."""
    with_errors = {record.name: record for record in store.records()}
    files = {path.stem: path.read_bytes() for path in store.folder.glob("toy/*.json")}
    assert set(files) == set(with_errors)  # a half record would be reported as a warning, which is an error here
    return files


def test_kill_9_at_random_moments_loses_no_finished_run(store, tmp_path):
    count, moments, before = 600, random.Random(0), {}
    for attempt in range(25):
        child = start(store, jobs=2 if attempt % 5 == 0 else 1, count=count)
        time.sleep(moments.uniform(0.0, 1.2 if attempt % 5 == 0 else 0.35))
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        after = contents(store)
        assert {name: after[name] for name in before} == before
        before = after
    assert 0 < len(before) < count, "the kills must fall into the sweep, or this test shows nothing"
    resumed = sweep(specs(count), compute, store, jobs=1, progress=False)
    straight = sweep(specs(count), compute, RunStore(tmp_path / "straight"), jobs=1, progress=False)
    columns = [column for column in table(straight).columns if column != "seconds"]
    assert table(resumed)[columns].equals(table(straight)[columns])
    assert contents(store) | before == contents(store)


def test_two_sweeps_on_one_store_share_the_work(store, tmp_path):
    log = tmp_path / "log"
    first, second = start(store, 1, 60, log), start(store, 1, 60, log)
    for child in (first, second):
        output, errors = child.communicate(timeout=120)
        assert (output, child.returncode) == ("done\n", 0), errors
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(seed) for seed, _ in lines) == list(range(60))
    assert len({process for _, process in lines}) == 2, "one of the sweeps computed nothing"
    assert len(contents(store)) == 60


def test_processes_and_sequential_give_the_same_records(store, tmp_path):
    parallel = sweep(specs(6), compute, store, jobs=2, progress=False)
    straight = sweep(specs(6), compute, RunStore(tmp_path / "other"), backend="sequential", progress=False)
    assert [(r.name, r.result) for r in parallel] == [(r.name, r.result) for r in straight]


def test_a_finished_sweep_computes_nothing_and_keeps_the_order(store):
    wanted = specs(5)[::-1]
    sweep(wanted, compute, store, jobs=1, progress=False)
    again = sweep(wanted, lambda spec: pytest.fail("computed"), store, jobs=1, progress=False)
    assert [record.spec for record in again] == wanted


def test_one_bad_run_does_not_stop_the_others(store, capsys):
    with pytest.raises(SweepError, match=r"1 of 4 runs failed.*'target_seed': 2.*ValueError: two is bad"):
        sweep(specs(4), fail_on_two, store, jobs=1, progress=False)
    assert len(list(store.records())) == 3


def test_an_unknown_backend_lists_the_known_ones(store):
    for backend in ("cloud", "threading"):
        with pytest.raises(UsageError, match=rf"unknown backend '{backend}'; known: .*loky.*sequential"):
            sweep(specs(1), compute, store, backend=backend)


def test_workers_use_one_torch_thread(store):
    def threads(spec):
        import torch

        return Outcome({"accuracy": float(torch.get_num_threads())})

    pytest.importorskip("torch")
    assert [r.result["accuracy"] for r in sweep(specs(2), threads, store, jobs=2, progress=False)] == [1.0, 1.0]
    assert [r.provenance["threads"] for r in store.records()] == [1, 1]


def test_an_audit_agrees_with_itself_and_notices_a_changed_result(store):
    records = sweep(specs(8), compute, store, jobs=1, progress=False)
    rows = audit(records, compute, lambda record: {"accuracy": 1e-9}, sample=3)
    assert len(rows) == 3
    assert all(row.agrees for row in rows)
    changed = audit(records, lambda spec: Outcome({"accuracy": 0.9}), lambda record: {"accuracy": 0.01}, sample=99)
    assert len(changed) == 8
    assert not any(row.agrees for row in changed)
    missing = audit(records, lambda spec: Outcome({}), lambda record: {"accuracy": 0.01}, sample=1)
    assert not missing[0].agrees
    for known, sample in ((records, 0), ([], 3)):
        with pytest.raises(CondcompError, match="an audit needs at least one run"):
            audit(known, compute, lambda record: {}, sample=sample)


def test_an_audit_compares_lists_item_by_item_and_notices_other_data(store):
    data = {"note": "official", "checksum": "one"}
    curve = sweep(specs(1), lambda spec: Outcome({"curve": [0.1, 0.2]}, None, data), store, jobs=1, progress=False)

    def check(again, data=data):
        return audit(
            curve, lambda spec: Outcome({"curve": again}, None, data), lambda _: {"curve": [0.01] * 2}, sample=1
        )

    rows = check([0.1, 0.3])
    assert [(row.field, row.agrees, row.same_data) for row in rows] == [
        ("curve[0]", True, True),
        ("curve[1]", False, True),
    ]
    assert not any(row.agrees for row in check([0.1, 0.2, 0.3]))
    assert not any(row.same_data for row in check([0.1, 0.2], {"note": "unofficial copy", "checksum": "two"}))


def test_what_makes_going_on_pointless_stops_the_sweep_at_once(store):
    asked = []

    def no_data(spec):
        asked.append(spec)
        raise DataError("svhn: no files; fetch them")

    with pytest.raises(SweepError, match="svhn: no files; fetch them"):
        sweep(specs(5), no_data, store, jobs=1, progress=False)
    assert len(asked) == 1


def test_an_error_of_the_library_is_one_line_and_not_a_traceback(store, capsys):
    def refuse(spec):
        raise CondcompError("one clear line")

    with pytest.raises(SweepError, match=r"2 of 2 runs failed.*one clear line"):
        sweep(specs(2), refuse, store, jobs=1, progress=False)
    assert "Traceback" not in capsys.readouterr().err


def test_code_that_changed_meanwhile_is_not_run_under_the_old_name(store, monkeypatch):
    now = {**environment(), "code": "another"}
    answers = iter([environment(), now])
    monkeypatch.setattr("condcomp_lib.sweep.environment", lambda: next(answers))
    with pytest.raises(SweepError, match="the code changed while the sweep ran"):
        sweep(specs(3), compute, store, jobs=1, progress=False)
    assert not list(store.records())


def test_a_killed_worker_is_one_clear_line_and_finished_runs_stay(store):
    def die_on_three(spec):
        if spec.settings["target_seed"] == 3:
            while len(list(store.records())) < 3:  # let the others finish
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome({"accuracy": 0.5})

    with pytest.raises(SweepError, match="a worker process was killed"):
        sweep(specs(4), die_on_three, store, jobs=2, progress=False)
    assert len(list(store.records())) == 3


def test_dask_without_dask_says_what_to_install(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match="pip install distributed"):
        sweep(specs(1), compute, store, backend="dask")


@pytest.fixture
def cluster(tmp_path):
    """The scheduler of a Dask cluster on this machine: its process, its address, and what starts a worker. It gives up
    a run that has killed two of them."""
    pytest.importorskip("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(CHILD.parent), "SWEEP_CHILD_SECONDS": "0.1",
                   "SWEEP_CHILD_WORKERS": "2", "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}  # fmt: skip
    started = []

    def start(kind, *arguments):
        command = f"from distributed.cli.dask_{kind} import main; main()"
        started.append(subprocess.Popen(
            [sys.executable, "-c", command, *arguments, "--no-dashboard", "--host", "127.0.0.1"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        ))  # fmt: skip
        return started[-1]

    def worker(threads=1):
        own = str(tmp_path / str(len(started)))
        return start("worker", address, "--nthreads", str(threads), "--no-nanny", "--local-directory", own)

    scheduler = start("scheduler", "--port", address.rpartition(":")[2])
    yield SimpleNamespace(address=address, scheduler=scheduler, worker=worker)
    for process in started:
        process.kill()
        process.wait(timeout=30)


def test_a_worker_of_a_cluster_killed_in_mid_run_loses_nothing(store, cluster, tmp_path):
    log = tmp_path / "log"
    child = subprocess.Popen(
        [sys.executable, str(CHILD), str(store.folder), "2", "60", cluster.address],
        env={**os.environ, "SWEEP_CHILD_LOG": str(log)},  # the cluster gets the child's functions with their LOG
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert any(f"no worker yet; waiting for one: dask worker {cluster.address}" in line for line in child.stderr)
        workers = {cluster.worker().pid, cluster.worker().pid}
        deadline = time.monotonic() + 60
        while not log.exists() or len(processes(log)) < 2:
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline, "the workers got no runs"
            time.sleep(0.05)
        assert set(processes(log)) == workers  # it is they who compute, the second one, too
        before = contents(store)
        os.killpg(processes(log)[-1], signal.SIGKILL)
        out, said = child.communicate(timeout=120)
        assert child.returncode == 0, said
        assert out == "ready\ndone\n"
        after = contents(store)
        assert len(after) == 60
        assert before.items() <= after.items()
        ran = [int(line.split()[0]) for line in log.read_text().splitlines()]
        assert set(ran) == set(range(60))
        assert len(ran) <= 61  # only what the killed one was at is done again
    finally:
        child.kill()
        child.communicate()


def test_a_cluster_of_one_worker_computes_what_is_asked_of_it(store, cluster):
    own = cluster.worker().pid
    where = {"backend": "dask", "scheduler": cluster.address}
    found = sweep(specs(3), lambda _: Outcome({"process": os.getpid()}), store, progress=False, **where)
    assert [record.result["process"] for record in found] == [own] * 3


def test_runs_that_kill_their_workers_or_the_scheduler_are_one_clear_line(store, cluster):
    def kill(spec):
        os.kill(victims.get(spec.settings["target_seed"], os.getpid()), signal.SIGKILL)
        time.sleep(60)

    workers, victims = [cluster.worker(), cluster.worker()], {}
    with pytest.raises(SweepError, match="a worker process was killed"):
        sweep(specs(1), kill, store, backend="dask", scheduler=cluster.address, progress=False)
    assert [process.wait(timeout=30) for process in workers] == [-signal.SIGKILL] * 2
    cluster.worker()
    victims[0] = cluster.scheduler.pid
    with pytest.raises(SweepError, match="the Dask scheduler is gone"):
        sweep(specs(1), kill, store, backend="dask", scheduler=cluster.address, progress=False)


def test_a_worker_of_two_threads_is_refused(store, cluster):
    cluster.worker(2)
    with pytest.raises(SweepError, match=r"must have one thread \(--nthreads 1\), not 2 \(finished runs are stored\)"):
        sweep(specs(3), compute, store, backend="dask", scheduler=cluster.address, progress=False)
    assert not list(store.records())


def test_a_scheduler_that_is_not_there_or_not_asked_for_is_one_clear_line(store, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("condcomp_lib.sweep.CONNECT_SECONDS", 1)
    with pytest.raises(UsageError, match="a scheduler goes with backend 'dask', not with 'loky'"):
        sweep(specs(1), compute, store, scheduler="tcp://127.0.0.1:1")
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        with pytest.raises(UsageError, match="no Dask scheduler answers at"):
            sweep(specs(1), compute, store, backend="dask", scheduler=address)
    assert not list(store.records())


def test_a_spec_given_twice_is_one_run(store):
    assert len(sweep(specs(1) * 2, compute, store, jobs=1, progress=False)) == 1
    assert sweep([], compute, store, progress=False) == []
    assert RunSpec("toy", 1, {"dataset": "none", "target_seed": 0}) == specs(1)[0]
