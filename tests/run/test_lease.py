import multiprocessing
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from fm_core.errors import LeaseLostError
from fm_core.run import lease as module
from fm_core.run.lease import HEARTBEAT_SECONDS, STALE_SECONDS, HolderState, Lease
from fm_core.storage.atomic_files import read_json, write_json

ELSEWHERE = {"host": "elsewhere", "host_id": "another boot/4026531836"}
WATCHED = 3 * HEARTBEAT_SECONDS


class Clocks:
    """The time since boot and the wall clock of one host."""

    def __init__(self, wall=1_700_000_000.0):
        self.now, self.wall = 1000.0, wall

    def sleep(self, seconds):
        self.now += seconds
        self.wall += seconds

    def lease(self, path):
        return Lease(path, lambda: self.now, lambda: self.wall)


@pytest.fixture
def clocks():
    return Clocks()


@pytest.fixture
def lease(tmp_path, clocks):
    return clocks.lease(tmp_path / "lock")


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def rewrite(lease, *removed, **facts):
    record = read_json(lease.path)
    for key in ("schema", *removed):
        record.pop(key)
    write_json(lease.path, {**record, **facts})


def watch(lease, clocks, seconds):
    """The last state of a start that looks every second."""
    state = lease.look()[0]
    for _ in range(int(seconds)):
        if state is not HolderState.UNDECIDED:
            break
        clocks.sleep(1.0)
        state = lease.look()[0]
    return state


def test_a_live_process_holds_what_it_took(lease, sleeper):
    assert lease.holder() is None
    lease.take(sleeper.pid, stage="train", job="a1")
    holder = lease.holder()
    assert (holder["pid"], holder["stage"], holder["job"]) == (sleeper.pid, "train", "a1")
    assert lease.process() == psutil.Process(sleeper.pid)


def test_dead_processes_hold_nothing(lease, sleeper):
    lease.take(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    # Not waited for: a zombie is dead, too.
    assert psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE
    assert lease.holder() is None
    sleeper.wait()
    assert lease.holder() is None
    assert lease.look()[0] is HolderState.FREE


def test_a_later_process_with_the_same_number_holds_nothing(lease, sleeper):
    lease.take(sleeper.pid)
    ticks = read_json(lease.path)["start_ticks"]
    rewrite(lease, start_ticks=ticks - 1)
    assert lease.holder() is None
    assert lease.process() is None
    rewrite(lease, start_ticks=ticks)
    assert lease.holder() is not None


def test_a_step_of_the_clock_changes_nothing_for_a_process_of_this_host(lease, sleeper, clocks, monkeypatch):
    """psutil computes the start of a process from the boot time, which moves with the clock."""
    lease.take(sleeper.pid)
    start = psutil.Process(sleeper.pid).create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: start + 3600)
    clocks.wall += 3600
    assert lease.look()[0] is HolderState.HELD
    assert lease.process().pid == sleeper.pid


def test_a_frozen_process_of_this_host_holds_its_lease(lease, sleeper, clocks):
    lease.take(sleeper.pid)
    psutil.Process(sleeper.pid).suspend()
    clocks.sleep(10 * STALE_SECONDS)
    assert lease.look()[0] is HolderState.HELD


@pytest.mark.parametrize("other", [ELSEWHERE, {"host_id": "same host name/4026532000"}])
@pytest.mark.parametrize("skew", [-3600, -121, 0, 121, 3600])
def test_a_holder_elsewhere_is_alive_if_its_record_changes_whatever_its_clock(lease, clocks, other, skew):
    """A container with this host's name and another PID namespace is elsewhere, too."""
    lease.take(os.getpid(), job="a1")
    rewrite(lease, **other)
    there = Clocks(clocks.wall + skew)
    assert lease.look()[0] is HolderState.UNDECIDED
    clocks.sleep(HEARTBEAT_SECONDS)
    there.lease(lease.path).heartbeat(job="a1")
    assert lease.look()[0] is HolderState.HELD


@pytest.mark.parametrize("skew", [-3600, 0, 3600])
def test_a_holder_elsewhere_is_dead_once_its_record_did_not_change_for_three_heartbeats(lease, clocks, skew):
    lease.take(os.getpid())
    rewrite(lease, **ELSEWHERE, heartbeat=clocks.wall + skew)
    assert watch(lease, clocks, WATCHED - 1) is HolderState.UNDECIDED
    assert watch(lease, clocks, 1) is HolderState.FREE


def test_a_heartbeat_is_detected_even_if_the_clock_stands_still(lease, clocks):
    lease.take(os.getpid(), job="a1")
    rewrite(lease, **ELSEWHERE)
    assert lease.look()[0] is HolderState.UNDECIDED
    clocks.lease(lease.path).heartbeat(job="a1")
    assert lease.look()[0] is HolderState.HELD


def test_time_in_which_the_watching_process_was_frozen_does_not_count(lease, clocks):
    lease.take(os.getpid())
    rewrite(lease, **ELSEWHERE)
    assert lease.look()[0] is HolderState.UNDECIDED
    clocks.sleep(3600)
    assert lease.look()[0] is HolderState.UNDECIDED
    assert watch(lease, clocks, WATCHED) is HolderState.FREE


def test_a_process_that_this_user_cannot_see_is_watched(lease, clocks, monkeypatch):
    """/proc may hide the processes of other users (hidepid)."""
    lease.take(os.getpid(), job="a1")

    def hidden(pid):
        raise FileNotFoundError(pid)

    monkeypatch.setattr("fm_core.run.process_identity._start_and_state", hidden)
    assert watch(lease, clocks, 5) is HolderState.UNDECIDED
    lease.heartbeat(job="a1")
    assert lease.look()[0] is HolderState.HELD


def old_record(clocks, **facts):
    me = psutil.Process()
    return {"host": os.uname().nodename, "pid": me.pid, "created": me.create_time()} | {
        "heartbeat": clocks.wall,
        **facts,
    }


def test_records_of_earlier_versions_are_checked_by_host_name_process_start_and_age(lease, clocks):
    write_json(lease.path, old_record(clocks))
    assert lease.look()[0] is HolderState.HELD
    assert lease.process().pid == os.getpid()
    write_json(lease.path, old_record(clocks, created=psutil.Process().create_time() - 60))
    assert lease.look()[0] is HolderState.FREE
    write_json(lease.path, old_record(clocks, host="elsewhere", heartbeat=clocks.wall - STALE_SECONDS - 1))
    assert lease.look()[0] is HolderState.FREE
    assert lease.process() is None


def test_a_recent_record_of_an_earlier_version_elsewhere_is_watched_until_it_is_stale(tmp_path, clocks):
    lease = clocks.lease(tmp_path / "lock")
    write_json(lease.path, old_record(clocks, host="elsewhere", heartbeat=clocks.wall - 100))
    assert watch(lease, clocks, 19) is HolderState.UNDECIDED
    assert watch(lease, clocks, 1) is HolderState.FREE
    lease = clocks.lease(tmp_path / "lock")
    write_json(lease.path, old_record(clocks, host="elsewhere"))
    assert lease.look()[0] is HolderState.UNDECIDED
    write_json(lease.path, old_record(clocks, host="elsewhere", heartbeat=clocks.wall + 10))
    assert lease.look()[0] is HolderState.HELD


def test_without_waiting_the_age_of_the_heartbeat_elsewhere_decides(lease, clocks):
    lease.take(os.getpid(), job="a1")
    rewrite(lease, **ELSEWHERE)
    assert lease.holder()["job"] == "a1"
    rewrite(lease, heartbeat=clocks.wall - STALE_SECONDS - 1)
    assert clocks.lease(lease.path).holder() is None


def test_a_heartbeat_renews_the_lease_and_keeps_its_facts(lease, clocks):
    lease.take(os.getpid(), job="a1")
    before = read_json(lease.path)
    clocks.sleep(10)
    lease.heartbeat(job="a1")
    after = read_json(lease.path)
    assert after == {**before, "heartbeat": clocks.wall, "beats": before["beats"] + 1}


def test_a_heartbeat_without_a_lease_takes_none(lease):
    with pytest.raises(FileNotFoundError):
        lease.heartbeat(job="a1")
    assert list(lease.path.parent.iterdir()) == []


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
    taken = [results.get(timeout=60) for _ in many]
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
    with lease.guard():
        pass


def test_stale_is_longer_than_several_heartbeats():
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


def test_the_renewing_thread_reports_once_that_the_lease_was_lost(lease, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    lease.take(os.getpid(), job="a")
    lost, notified = [], threading.Event()

    def on_lost(error):
        lost.append(error)
        notified.set()

    with lease.keep_alive(on_lost=on_lost, job="a") as check:
        check()
        with lease.guard():
            lease.take(os.getpid(), job="b")
        assert notified.wait(60)
        with pytest.raises(LeaseLostError, match=f"was taken over by process {os.getpid()} on"):
            check()
    assert len(lost) == 1
