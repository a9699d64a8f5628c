"""Launcher protocol: the description of a job, and the functions that every launcher implements."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fm_core.config import RunConfig
from fm_core.launch.job import CONTROL_VARIABLE, EPOCH_VARIABLE, JOB_VARIABLE, LOGS_VARIABLE, Job
from fm_core.run.process_identity import ProcessIdentity
from fm_core.run.resource_limits import available_cores


@dataclass(frozen=True)
class StageJob:
    """The work of one stage that runs as a job."""

    control: Path
    """Control directory of the job: its handle, lock, status and STOP file."""
    logs: Path
    stage: str
    worker: str
    """Entry point of a rank, "module:function", called with the configuration and the Rank."""
    config: RunConfig
    complete: Callable[[], bool]
    """Whether the stage is complete; called after the last process has ended, whatever the exit codes."""
    meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context that is entered when a job is submitted or attached to, and exited after the last restart."""
    durable_progress: Callable[[], int] = lambda: 0
    """Amount of durable work, in any unit; a new maximum resets the count of restarts."""
    collective: bool = False
    """Whether the ranks form a process group, for which they need a rendezvous store."""
    before_submit: Callable[[], None] = lambda: None
    """Called before a job is submitted, while no other start can submit one; a UserError prevents it."""


@dataclass(frozen=True)
class JobSpec:
    """Specification of one job for a launcher."""

    job: Job
    """The handle, as far as known before the start."""
    control: Path
    logs: Path
    worker: str
    """Entry point of a rank, "module:function"."""
    config_file: Path
    config: RunConfig
    collective: bool = False
    """Whether the ranks form a process group."""


@dataclass(frozen=True)
class JobStatus:
    """Whether a job is alive."""

    alive: bool
    """Whether it runs or is queued."""
    reason: str = ""
    """Why it does not run yet, as a message to the user."""


class Launcher(Protocol):
    """A way to launch jobs; each is a module of this package."""

    def submit(self, spec: JobSpec) -> Job:
        """Start the ranks. Raises UserError for problems that are known before the start."""
        ...

    def poll(self, job: Job) -> JobStatus:
        """Whether the job runs or is queued."""
        ...

    def cancel(self, job: Job, control: Path, grace: float) -> None:
        """Ask the ranks to save and exit; kill remaining processes after `grace` seconds."""
        ...

    def collect(self, job: Job, control: Path) -> list[str]:
        """Collect exit records after the job has ended; return messages about lost hosts."""
        ...

    def cleanup(self, job: Job) -> None:
        """End the remaining processes of a dead job before its directory is used again."""
        ...


def worker_command(stage: str, worker: str, config_file: Path) -> list[str]:
    """Arguments of Python that start one rank."""
    return ["-m", "fm_core.launch.worker_main", stage, worker, str(config_file)]


def job_config_file(control: Path, logs: Path, stage: str) -> Path:
    """File with the configuration of a job, which its ranks read.

    It is in the control directory. For training, whose control directory is the run directory, it is in the
    logs. Several jobs of a run may sample and score at a time.
    """
    return (logs if control.resolve() == logs.parent.resolve() else control) / f"{stage}.yaml"


def with_agent(job: Job, pid: int) -> Job:
    """The handle with the identity of its agent, a process on this host."""
    return job.model_copy(update=ProcessIdentity.of(pid).facts())


def worker_environment(job: Job, control: Path, logs: Path | None, processes_on_host: int) -> dict[str, str]:
    """Environment variables of an agent and its ranks; without `logs` they write to their standard output.

    If the job specifies no threads, the cores of this host are divided among its processes.
    """
    threads = job.threads or max(1, available_cores() // processes_on_host)
    return {
        JOB_VARIABLE: job.id,
        EPOCH_VARIABLE: str(job.epoch),
        CONTROL_VARIABLE: str(control.resolve()),
        LOGS_VARIABLE: str(logs.resolve()) if logs else "",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "DO_NOT_TRACK": "1",
    }
