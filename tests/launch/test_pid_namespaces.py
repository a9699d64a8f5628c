"""Containers of one host name with PID namespaces of their own never run two jobs in one directory."""

import signal
import time
from pathlib import Path

from fm_core.launch.job import submitted
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import read_json

PATIENT, HASTY = 10.0, 0.3
"""Intervals of the heartbeat in seconds."""


def until(happened):
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_second_container_is_refused_while_the_first_sends_heartbeats(pid_namespaces):
    first = pid_namespaces.start(HASTY)
    job = pid_namespaces.wait_for_ranks()
    ended, errors = pid_namespaces.result(pid_namespaces.start(PATIENT))
    assert ended["kind"] == "UserError"
    assert "is in use by process" in ended["message"]
    assert "\n" not in ended["message"]
    assert "waiting up to 30 s to see whether it still sends a heartbeat" in errors
    assert submitted(pid_namespaces.control).id == job
    assert len(pid_namespaces.processes(job)) == 3  # the agent and two ranks
    (pid_namespaces.control / "STOP").touch()
    assert pid_namespaces.result(first)[0]["kind"] == "StopRequested"


def test_a_container_that_is_recreated_waits_and_takes_over(pid_namespaces):
    first = pid_namespaces.start(PATIENT)
    job = pid_namespaces.wait_for_ranks()
    # While this is open, the kernel gives the number of the namespace, by which it is known, to no other.
    with Path(f"/proc/{pid_namespaces.supervisor(first).pid}/ns/pid").open("rb"):
        pid_namespaces.supervisor(first).kill()  # and with it, all of the namespace
        first.wait()
        until(lambda: not pid_namespaces.processes(job))
        second = pid_namespaces.start(HASTY)
        assert pid_namespaces.wait_for_ranks() != job
    assert read_json(pid_namespaces.control / "lock")["epoch"] == 2
    (pid_namespaces.control / "STOP").touch()
    ended, errors = pid_namespaces.result(second)
    assert ended["kind"] == "StopRequested"
    assert "whether it still sends a heartbeat" in errors


def test_a_frozen_container_that_thaws_ends_its_job_and_leaves_that_of_its_successor_alone(pid_namespaces):
    control = pid_namespaces.control
    frozen = pid_namespaces.start(PATIENT)
    old = pid_namespaces.wait_for_ranks()
    supervisor, ranks = pid_namespaces.supervisor(frozen), pid_namespaces.processes(old)
    for process in (supervisor, *ranks):
        process.send_signal(signal.SIGSTOP)
    successor = pid_namespaces.start(HASTY)
    new = pid_namespaces.wait_for_ranks()
    assert new != old
    for process in ranks:
        process.send_signal(signal.SIGCONT)
    until(lambda: not pid_namespaces.processes(old))  # without their supervisor
    assert f"{control} was taken over by process" in (control / "logs" / "pretend-0.log").read_text()
    supervisor.send_signal(signal.SIGCONT)
    ended, _ = pid_namespaces.result(frozen)
    assert ended["kind"] == "LeaseLostError"
    assert f"{control} was taken over by process" in ended["message"]
    assert "\n" not in ended["message"]
    # What belongs to the successor is as it was.
    assert submitted(control).id == new
    assert Lease(control / "lock").record()["job"] == new
    assert len(pid_namespaces.processes(new)) == 3
    assert not (control / "STOP").exists()
    assert list(control.glob("*.end.json")) == []
    (control / "STOP").touch()
    assert pid_namespaces.result(successor)[0]["kind"] == "StopRequested"
