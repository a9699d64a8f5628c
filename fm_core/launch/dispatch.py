"""Jobs of several processes: submit, poll, cancel, on this machine, over ssh or through Slurm.

A job does not depend on whoever submitted it: a supervisor that dies leaves it running, and the next
one attaches.
"""

import os
import socket
import uuid
from pathlib import Path

from fm_core.config import LaunchSection, load_config
from fm_core.launch import local, slurm, ssh
from fm_core.launch.hostfile import read_hostfile
from fm_core.launch.job import GRACE_SECONDS, JOB_VARIABLE, Job, processes_of, submitted
from fm_core.launch.launcher import JobSpec, JobStatus, Launcher
from fm_core.storage.atomic_files import write_json

__all__ = [
    "GRACE_SECONDS",
    "JOB_VARIABLE",
    "Job",
    "alive",
    "cancel",
    "cleanup",
    "collect",
    "device_count",
    "hosts_of",
    "most_on_a_host",
    "poll",
    "processes_of",
    "submit",
    "submitted",
    "world",
]

LAUNCHERS: dict[str, Launcher] = {"local": local, "ssh": ssh, "slurm": slurm}
POLL_SECONDS = {"local": 0.5, "ssh": 0.5, "slurm": 3.0}
"""How often a supervisor asks; Slurm's controller serves a whole cluster."""


def device_count() -> int:
    """GPUs of this host; asked of the driver's own tool's library through torch."""
    import torch

    return torch.cuda.device_count()


def hosts_of(launch: LaunchSection) -> dict[str, int]:
    """Processes on each host that is known before the start: those of the hostfile, or this one.

    Raises UserError for a hostfile that is none.
    """
    if launch.kind == "ssh":
        return read_hostfile(launch.hostfile or "", launch.processes)
    return {} if launch.kind == "slurm" else {socket.gethostname(): launch.processes or device_count() or 2}


def world(launch: LaunchSection) -> tuple[int, int]:
    """Processes on all hosts and threads of each, from the configuration and this machine."""
    here = most_on_a_host(launch)
    processes = here * launch.slurm.nodes if launch.kind == "slurm" else sum(hosts_of(launch).values())
    return processes, launch.threads or max(1, (os.cpu_count() or 1) // here)


def most_on_a_host(launch: LaunchSection) -> int:
    """Processes on the host that has most of them."""
    return launch.processes or 1 if launch.kind == "slurm" else max(hosts_of(launch).values())


def submit(
    control: Path, logs: Path, stage: str, module: str, config_file: Path, launch: LaunchSection
) -> Job:
    """Start the ranks `python -m module config_file` and write the handle to control/job.json.

    Raises UserError for what can be refused before: a host that cannot be reached, an option that
    sbatch does not know.
    """
    processes, threads = world(launch)
    draft = Job(
        id=uuid.uuid4().hex,
        stage=stage,
        kind=launch.kind,
        host=socket.gethostname(),
        processes=processes,
        # The cores of this host say nothing of others'.
        threads=threads if launch.kind == "local" else launch.threads or 0,
        log=str(logs.resolve() / f"{stage}.log"),
        hosts=hosts_of(launch),
    )
    logs.parent.joinpath("STOP").unlink(missing_ok=True)
    for pattern in ("STOP", f"{stage}-*.end.json", "*.lost", "*.ssh"):
        for stale in control.glob(pattern):
            stale.unlink(missing_ok=True)
    task = JobSpec(
        draft, control.resolve(), logs.resolve(), module, config_file.resolve(), load_config(config_file)
    )
    job = LAUNCHERS[launch.kind].submit(task)
    write_json(control / "job.json", job.model_dump())
    return job


def poll(job: Job) -> JobStatus:
    """Whether a job runs or waits to run."""
    return LAUNCHERS[job.kind].poll(job)


def alive(job: Job) -> bool:
    """Whether a job runs or waits to run."""
    return poll(job).alive


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the ranks to save and end, wait until no process of the job is left, kill what stays."""
    LAUNCHERS[job.kind].cancel(job, control, grace)


def collect(job: Job, control: Path) -> list[str]:
    """After a job has ended: gather what its hosts left; what befell hosts, in words."""
    return LAUNCHERS[job.kind].collect(job, control)


def cleanup(job: Job) -> None:
    """Before a directory is used again: see to it that no process of a dead job is left anywhere."""
    LAUNCHERS[job.kind].cleanup(job)
