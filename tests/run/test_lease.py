import multiprocessing
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from fm_core.run import lease as module
from fm_core.run.lease import STALE_SECONDS, Lease, process_is
from fm_core.storage.atomic_files import read_json, write_json


@pytest.fixture
def lease(tmp_path):
    return Lease(tmp_path / "lock")


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def rewrite(lease, **facts):
    record = read_json(lease.path)
    record.pop("schema")
    write_json(lease.path, {**record, **facts})


def test_a_live_process_holds_what_it_took(lease, sleeper):
    assert lease.holder() is None
    lease.take(sleeper.pid, stage="train", job="a1")
    holder = lease.holder()
    assert (holder["pid"], holder["stage"], holder["job"]) == (sleeper.pid, "train", "a1")


def test_dead_processes_hold_nothing(lease, sleeper):
    lease.take(sleeper.pid)
    sleeper.kill()
    time.sleep(0.2)
    # Not waited for: a zombie is dead, too.
    assert psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE
    assert lease.holder() is None
    sleeper.wait()
    assert lease.holder() is None


def test_a_later_process_with_the_same_number_holds_nothing(lease, sleeper):
    lease.take(sleeper.pid)
    created = read_json(lease.path)["created"]
    rewrite(lease, created=created - 10)
    assert lease.holder() is None
    rewrite(lease, created=created)
    assert lease.holder() is not None


def test_a_process_is_itself_and_no_other():
    created = psutil.Process().create_time()
    assert process_is(os.getpid(), created)
    assert not process_is(os.getpid(), created + 60)
    assert not process_is(2**22 + 1, created)


def test_another_host_holds_while_its_heartbeat_is_recent(lease):
    lease.take(os.getpid())
    # The number of a process there says nothing here.
    rewrite(lease, host="elsewhere", pid=2**22 + 1, heartbeat=time.time() - STALE_SECONDS + 30)
    assert lease.holder()["host"] == "elsewhere"
    rewrite(lease, heartbeat=time.time() - STALE_SECONDS - 1)
    assert lease.holder() is None


def test_a_beat_renews_the_lease_and_keeps_its_facts(lease, monkeypatch):
    lease.take(os.getpid(), job="a1")
    rewrite(lease, host="elsewhere", heartbeat=time.time() - 2 * STALE_SECONDS)
    assert lease.holder() is None
    lease.heartbeat()
    assert lease.holder()["job"] == "a1"


def test_a_beat_without_a_lease_takes_none(lease):
    lease.heartbeat()
    assert not lease.path.exists()


def _look_and_take(path, start, results):
    lease = Lease(path)
    start.wait()
    with lease.guard():
        free = lease.holder() is None
        time.sleep(0.05)
        if free:
            lease.take(os.getpid())
    results.put(free)
    time.sleep(1)


def test_of_many_that_try_at_once_one_takes(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    path = tmp_path / "lock"
    many = [context.Process(target=_look_and_take, args=(path, start, results)) for _ in range(6)]
    for process in many:
        process.start()
    start.set()
    taken = [results.get(timeout=30) for _ in many]
    for process in many:
        process.join()
    assert sum(taken) == 1


def test_the_guard_is_free_again_after_an_error_and_after_death(lease):
    with pytest.raises(RuntimeError), lease.guard():
        raise RuntimeError
    child = os.fork()
    if child == 0:
        with lease.guard():
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    began = time.monotonic()
    with lease.guard():
        assert time.monotonic() - began < 5


def test_stale_is_longer_than_several_beats():
    assert module.STALE_SECONDS >= 3 * module.HEARTBEAT_SECONDS


def test_a_process_that_exits_does_not_wait_for_the_guard(lease):
    """The supervisor holds the guard while it ends the ranks of a dead job."""
    lease.take(os.getpid(), job="a")
    with lease.guard():  # of another open file: the heartbeat has to wait for it
        with lease.keep_alive(wait=False, job="a"):
            pass
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "lease")
        assert thread.daemon
    thread.join(60)
    assert not thread.is_alive()
