"""Local launcher: a rank group on the loopback interface, in a separate session."""

from pathlib import Path

from fm_core.launch.detached import spawn_detached
from fm_core.launch.job import GRACE_SECONDS, Job, agent_lives, end_processes
from fm_core.launch.launcher import JobSpec, JobStatus, with_agent, worker_command, worker_environment
from fm_core.launch.rank_group import LOOPBACK, LOOPBACK_INTERFACE, rank_group_command
from fm_core.run.stop_file import request_stop


def submit(spec: JobSpec) -> Job:
    """Start the ranks as a rank group of this host."""
    ranks = worker_command(spec.job.stage, spec.worker, spec.config_file)
    count = spec.job.processes
    # Serving the store takes an import of torch in the rank group: seconds and 250 MB.
    command = rank_group_command(ranks, count, meet=f"{LOOPBACK}:0", listen=spec.collective and count > 1)
    variables = worker_environment(spec.job, spec.control, spec.logs, count) | LOOPBACK_INTERFACE
    process = spawn_detached(command, Path(spec.job.log), variables)
    return with_agent(spec.job, process.pid)


def poll(job: Job) -> JobStatus:
    """Whether the agent runs."""
    return JobStatus(agent_lives(job))


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the ranks to save and exit, wait for all processes of the job, kill those that remain."""
    request_stop(control)
    end_processes(job.id, grace)


def collect(job: Job, control: Path) -> list[str]:
    """End processes that outlived the agent; the exit records are already in the control directory."""
    end_processes(job.id, GRACE_SECONDS)
    return []


def cleanup(job: Job) -> None:
    """End processes that outlived the agent."""
    end_processes(job.id, GRACE_SECONDS)
