"""The handle of a job, and its processes on this host.

Every process of a job has the job's id in its environment, by which all of them can be found.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from fm_core.config import Section
from fm_core.errors import UserError
from fm_core.run.lease import Lease
from fm_core.run.process_identity import ProcessIdentity
from fm_core.storage.atomic_files import read_json

JOB_VARIABLE = "FM_JOB"
CONTROL_VARIABLE = "FM_CONTROL"
LOGS_VARIABLE = "FM_LOGS"
EPOCH_VARIABLE = "FM_EPOCH"
GRACE_SECONDS = 25.0
"""Seconds in which ranks must save and exit after a request to stop; Prefect allows 30."""


class Job(Section):
    """The handle of a submitted job, kept in job.json."""

    id: str
    stage: str
    kind: Literal["debug", "local", "ssh", "slurm"] = "local"
    epoch: int = 0
    """Epoch of its lease, the fencing token; 0 for a job of an earlier version."""
    host: str
    """Host that submitted it."""
    host_id: str | None = None
    """Boot id and PID namespace of that host; the pid is meaningful only there."""
    pid: int | None = None
    """Process id of the agent on that host; None for Slurm, or after a debug job has ended."""
    created: float | None = None
    """Start of the agent, in seconds since 1970."""
    start_ticks: int | None = None
    """Start of the agent, in clock ticks since boot: pid and start together name one process."""
    slurm: int | None = None
    """Slurm's id of the job."""
    processes: int
    """Total over all hosts."""
    threads: int
    """CPU threads of each process; 0: each host divides its own cores among its processes."""
    log: str
    hosts: dict[str, int] = {}
    """Processes on each host, in rank order; empty until Slurm has allocated hosts."""
    logins: tuple[str, ...] = ()
    """USER@HOST of the hosts where ssh logs in as another user."""
    marks: dict[str, str] = {}
    """Marker files that every host must see, by the configuration key of their directory."""

    def host_of(self, rank: int) -> str:
        """Host name of a rank; that of the job if it is not known."""
        for host, processes in self.hosts.items():
            if rank < processes:
                return host
            rank -= processes
        return self.host


def submitted(control: Path) -> Job | None:
    """The job last submitted in a control directory, whether it is alive or not."""
    record = read_json(control / "job.json")
    if record is None:
        return None
    record.pop("schema")
    return Job.model_validate(record)


def agent_lives(job: Job) -> bool:
    """Whether the agent of a job runs on this host: host, pid and start must match."""
    agent = ProcessIdentity.from_record(job.model_dump())
    if agent is None or not agent.here:
        return False
    _reap(agent.pid)
    return agent.alive() is True


def successor(job: Job, control: Path) -> dict[str, Any] | None:
    """The lease record or handle of another job that has since taken the control directory, or None.

    If there is one, this job must not change anything there.
    """
    with suppress(OSError, UserError):
        record = Lease(control / "lock").record()
        if record is None and (latest := submitted(control)):
            record = {**latest.model_dump(), "job": latest.id}
        if record and record.get("job") not in (None, job.id):
            return record
    return None


def processes_of(job: Job) -> list[psutil.Process]:
    """Every live process of a job on this host, including the agent and orphans."""
    return processes_marked(job.id, tunnel_mark(job.id))


def tunnel_mark(identifier: str) -> str:
    """Mark of the connections to a job's hosts, distinct from the job's id: this host may be one of them."""
    return f"{identifier}.line"


def processes_marked(*marks: str) -> list[psutil.Process]:
    """Every live process on this host with one of the marks: a job's id or its tunnel mark."""
    return [process for process in psutil.process_iter() if is_marked(process, *marks)]


def is_marked(process: psutil.Process, *marks: str) -> bool:
    """Whether a process is alive and has one of the marks."""
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and process.environ().get(JOB_VARIABLE) in marks
    except psutil.Error:
        return False


def end_processes(mark: str, grace: float, spare: frozenset[int] = frozenset()) -> None:
    """Ask the marked processes on this host to save and exit; kill what is left after `grace` seconds.

    Only those without a marked parent are signaled, because each of them forwards the signal to its children.
    """

    def remaining() -> list[psutil.Process]:
        return [process for process in processes_marked(mark) if process.pid not in spare]

    processes = remaining()
    numbers = {process.pid for process in processes}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.ppid() not in numbers:
                process.terminate()
    deadline = time.monotonic() + grace
    while (processes := remaining()) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill(processes)


def kill(processes: list[psutil.Process]) -> None:
    """Kill processes and wait until they have ended."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def _reap(pid: int) -> None:
    # An agent that is a child of this process remains a zombie until it is reaped.
    with suppress(OSError):
        os.waitpid(pid, os.WNOHANG)
