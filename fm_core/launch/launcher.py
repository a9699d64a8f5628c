"""What a launcher is asked to start, and what it answers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from fm_core.config import RunConfig
from fm_core.launch.job import CONTROL_VARIABLE, JOB_VARIABLE, LOGS_VARIABLE, Job


@dataclass(frozen=True)
class JobSpec:
    """`python -m module config_file` as a number of ranks."""

    job: Job
    """The handle, as far as it is known before the start."""
    control: Path
    logs: Path
    module: str
    config_file: Path
    config: RunConfig


@dataclass(frozen=True)
class JobStatus:
    """What a job is doing."""

    alive: bool
    """Whether it runs or will run."""
    word: str = ""
    """Why it does not run yet, for a person."""


class Launcher(Protocol):
    """An engine that starts jobs; each is a module of this room."""

    def submit(self, task: JobSpec) -> Job:
        """Start the ranks. Raises UserError for what can be refused before."""
        ...

    def poll(self, job: Job) -> JobStatus:
        """Whether the job is going on."""
        ...

    def cancel(self, job: Job, control: Path, grace: float) -> None:
        """Ask the ranks to save and end, and see to it that all are gone; kills after `grace` seconds."""
        ...

    def collect(self, job: Job, control: Path) -> list[str]:
        """After the job ended: gather what its hosts left; what befell hosts, in words."""
        ...

    def cleanup(self, job: Job) -> None:
        """Before a directory is used again: see to it that no process of a dead job is left anywhere."""
        ...


def with_agent(job: Job, pid: int) -> Job:
    """The handle with its agent."""
    return job.model_copy(update={"pid": pid, "created": psutil.Process(pid).create_time()})


def worker_environment(job: Job, control: Path, logs: Path | None, here: int) -> dict[str, str]:
    """What an agent and its ranks find in their environment; without `logs` they speak to their output.

    `here`: processes on this host, among which its cores are divided where the job names no threads.
    """
    threads = job.threads or max(1, len(os.sched_getaffinity(0)) // here)
    return {
        JOB_VARIABLE: job.id,
        CONTROL_VARIABLE: str(control.resolve()),
        LOGS_VARIABLE: str(logs.resolve()) if logs else "",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "DO_NOT_TRACK": "1",
    }
