"""Dispatch of jobs to their launcher: debug, local, ssh or slurm.

Except for debug, a job does not depend on the process that submitted it: if the supervisor dies, the job
keeps running, and the next supervisor attaches.
"""

import socket
import uuid
from pathlib import Path

from fm_core.config import LaunchSection, load_config
from fm_core.launch import debug, local, slurm, ssh
from fm_core.launch.exit_records import open_log, remove_exit_records
from fm_core.launch.hostfile import read_hostfile
from fm_core.launch.job import GRACE_SECONDS, JOB_VARIABLE, Job, kill, processes_of, submitted, successor
from fm_core.launch.launcher import JobSpec, JobStatus, Launcher
from fm_core.run.process_identity import host_id
from fm_core.run.resource_limits import available_cores
from fm_core.run.stop_file import mark_stop_handled
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
    "max_processes_per_host",
    "poll",
    "processes_of",
    "submit",
    "submitted",
    "world",
]

LAUNCHERS: dict[str, Launcher] = {"debug": debug, "local": local, "ssh": ssh, "slurm": slurm}
POLL_SECONDS = {"debug": 0.5, "local": 0.5, "ssh": 0.5, "slurm": 3.0}
"""Polling interval in seconds; longer for Slurm, whose controller is shared by the cluster."""


def device_count() -> int:
    """GPUs of this host."""
    import torch

    return torch.cuda.device_count()


def hosts_of(launch: LaunchSection) -> dict[str, int]:
    """Processes on each host that is known before the start: from the hostfile, or this host only.

    Raises UserError for an invalid hostfile.
    """
    if launch.kind == "ssh":
        return read_hostfile(launch.hostfile or "", launch.processes)
    if launch.kind == "slurm":
        return {}
    default = 1 if launch.kind == "debug" else device_count() or 2
    return {socket.gethostname(): launch.processes or default}


def world(launch: LaunchSection) -> tuple[int, int]:
    """Total number of processes and threads of each, from the configuration and this machine."""
    here = max_processes_per_host(launch)
    processes = here * launch.slurm.nodes if launch.kind == "slurm" else sum(hosts_of(launch).values())
    return processes, launch.threads or max(1, available_cores() // here)


def max_processes_per_host(launch: LaunchSection) -> int:
    """Largest number of processes on one host."""
    return launch.processes or 1 if launch.kind == "slurm" else max(hosts_of(launch).values())


def submit(
    control: Path,
    logs: Path,
    stage: str,
    worker: str,
    config_file: Path,
    launch: LaunchSection,
    identifier: str | None = None,
    epoch: int = 0,
    collective: bool = False,
) -> Job:
    """Start the ranks of a job and write its handle to control/job.json.

    `identifier` and `epoch` are those of the lease that was taken for the job; `collective` is whether its
    ranks form a process group.

    Raises UserError for problems that are known before the start: an unreachable host, an option that sbatch
    does not know.
    """
    processes, threads = world(launch)
    draft = Job(
        id=identifier or uuid.uuid4().hex,
        epoch=epoch,
        stage=stage,
        kind=launch.kind,
        host=socket.gethostname(),
        host_id=host_id(),
        processes=processes,
        # Other hosts may have a different number of cores.
        threads=threads if launch.kind in ("debug", "local") else launch.threads or 0,
        log=str(logs.resolve() / f"{stage}.log"),
        hosts=hosts_of(launch),
    )
    remove_exit_records(control, stage)
    for pattern in ("*.lost", "*.stopped", "*.ssh"):
        for stale in control.glob(pattern):
            stale.unlink(missing_ok=True)
    spec = JobSpec(
        draft,
        control.resolve(),
        logs.resolve(),
        worker,
        config_file.resolve(),
        load_config(config_file),
        collective,
    )
    if launch.kind == "local":
        open_log(draft)  # the others do so after they have reached their hosts
    job = LAUNCHERS[launch.kind].submit(spec)
    try:
        write_json(control / "job.json", job.model_dump())
    except BaseException:
        # Without job.json no later start could find this job.
        cancel(job, control, grace=0.0)
        mark_stop_handled(control)
        raise
    return job


def poll(job: Job) -> JobStatus:
    """Whether a job runs or waits to run."""
    return LAUNCHERS[job.kind].poll(job)


def alive(job: Job) -> bool:
    """Whether a job runs or waits to run."""
    return poll(job).alive


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the ranks to save and exit, wait for all processes of the job, kill those that remain.

    If another job has taken the directory, the processes of this job on this host are killed: they have
    nothing to save, and a STOP file would stop the other job.
    """
    if successor(job, control):
        _end_replaced(job)
        return
    LAUNCHERS[job.kind].cancel(job, control, grace)


def collect(job: Job, control: Path) -> list[str]:
    """Gather exit records after a job has ended; return messages about lost hosts."""
    if successor(job, control):
        _end_replaced(job)
        return []
    return LAUNCHERS[job.kind].collect(job, control)


def cleanup(job: Job) -> None:
    """End the remaining processes of a dead job before its directory is used again."""
    LAUNCHERS[job.kind].cleanup(job)


def _end_replaced(job: Job) -> None:
    if job.kind == "debug":
        cleanup(job)  # this interpreter still needs some of its child processes
    else:
        kill(processes_of(job))
