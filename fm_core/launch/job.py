"""The handle of a job, and its processes on this host.

Every process of a job carries the job's id in its environment, so that all of them can be found.
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
"""How long ranks may take to save and exit after they were asked to stop; Prefect allows 30."""


class Job(Section):
    """The handle of a submitted job, kept in job.json."""

    id: str
    stage: str
    kind: Literal["debug", "local", "ssh", "slurm"] = "local"
    epoch: int = 0
    """Epoch of its lease, the fencing token; 0 for a job of an earlier version."""
    host: str
    """Where it was submitted."""
    host_id: str | None = None
    """Boot and PID namespace of that host: the pid means something only there."""
    pid: int | None = None
    """The agent on that host; none for Slurm, which has ids of its own, nor after the end of a debug job."""
    created: float | None = None
    """Start of the agent, in seconds since 1970."""
    start_ticks: int | None = None
    """Start of the agent, in clock ticks since boot: pid and start together name one process."""
    slurm: int | None = None
    """Slurm's number of the job."""
    processes: int
    """On all hosts together."""
    threads: int
    """CPU threads of each process; 0: each host divides its own cores."""
    log: str
    hosts: dict[str, int] = {}
    """Processes on each host, in the order of their ranks; empty where Slurm has not chosen yet."""
    logins: tuple[str, ...] = ()
    """USER@HOST of the hosts where ssh logs in as another user."""
    marks: dict[str, str] = {}
    """Marker files that every host must see, by the configuration key of their directory."""

    def host_of(self, rank: int) -> str:
        """Name of the host of a rank; that of the job where it is not known."""
        for host, processes in self.hosts.items():
            if rank < processes:
                return host
            rank -= processes
        return self.host


def submitted(control: Path) -> Job | None:
    """The job last submitted in a control directory, dead or alive."""
    record = read_json(control / "job.json")
    if record is None:
        return None
    record.pop("schema")
    return Job.model_validate(record)


def agent_lives(job: Job) -> bool:
    """Whether the process that was started for a job runs on this host: host, pid and start must match."""
    agent = ProcessIdentity.from_record(job.model_dump())
    if agent is None or not agent.here:
        return False
    _reap(agent.pid)
    return agent.alive() is True


def successor(job: Job, control: Path) -> dict[str, Any] | None:
    """The lease record, or the handle, of another job that has taken the control directory since.

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
    """Every live process of a job on this host, agent and orphans included."""
    return processes_marked(job.id, tunnel_mark(job.id))


def tunnel_mark(identifier: str) -> str:
    """The mark of the connections to a job's hosts: the submitting host may be one of those hosts."""
    return f"{identifier}.line"


def processes_marked(*marks: str) -> list[psutil.Process]:
    """Every live process on this host that carries one of the marks: a job's id or its tunnel mark."""
    return [process for process in psutil.process_iter() if is_marked(process, *marks)]


def is_marked(process: psutil.Process, *marks: str) -> bool:
    """Whether a process is alive and carries one of the marks."""
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and process.environ().get(JOB_VARIABLE) in marks
    except psutil.Error:
        return False


def end_processes(mark: str, grace: float, spare: frozenset[int] = frozenset()) -> None:
    """Ask the marked processes on this host to save and exit; kill what is left after `grace` seconds.

    Only those without a marked parent are asked: each of them passes the request on to its children.
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
    """Kill processes and wait until they are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def _reap(pid: int) -> None:
    # An agent that is our own child stays a zombie until it is waited for.
    with suppress(OSError):
        os.waitpid(pid, os.WNOHANG)
