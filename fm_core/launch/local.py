"""Jobs on this host: a torchrun agent in a session of its own, and its ranks."""

import os
import subprocess
import sys
from pathlib import Path

from fm_core.launch.job import GRACE_SECONDS, Job, agent_lives, end_processes
from fm_core.launch.launcher import JobSpec, JobStatus, with_agent, worker_environment


def submit(task: JobSpec) -> Job:
    """Start the ranks under an agent of this host."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*agent, f"--nproc-per-node={task.job.processes}", "-m", task.module, str(task.config_file)]
    # One host: the loopback interface serves, and nothing listens to the outside.
    variables = {
        **worker_environment(task.job, task.control, task.logs, task.job.processes),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with Path(task.job.log).open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **variables},
        )
    return with_agent(task.job, process.pid)


def poll(job: Job) -> JobStatus:
    """Whether the agent runs."""
    return JobStatus(agent_lives(job))


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the ranks to save and end, wait until no process of the job is left, kill what stays."""
    control.joinpath("STOP").touch()
    end_processes(job.id, grace)


def collect(job: Job, control: Path) -> list[str]:
    """End what the agent left behind; what befell this host is known from the ranks."""
    end_processes(job.id, GRACE_SECONDS)
    return []


def cleanup(job: Job) -> None:
    """End what the agent left behind."""
    end_processes(job.id, GRACE_SECONDS)
