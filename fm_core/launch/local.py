"""Jobs on this host: a torchrun agent in a session of its own, and its ranks."""

import os
import subprocess
import sys
from pathlib import Path

from fm_core.launch.job import GRACE_SECONDS, Job, agent_lives, end_processes
from fm_core.launch.launcher import Poll, Task, started, variables_of


def submit(task: Task) -> Job:
    """Start the ranks under an agent of this host."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*agent, f"--nproc-per-node={task.job.processes}", "-m", task.module, str(task.config_file)]
    # One host: the loopback interface serves, and nothing listens to the outside.
    variables = {
        **variables_of(task.job, task.control, task.logs, task.job.processes),
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
    return started(task.job, process.pid)


def poll(job: Job) -> Poll:
    """Whether the agent runs."""
    return Poll(agent_lives(job))


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the ranks to save and end, wait until no process of the job is left, kill what stays."""
    control.joinpath("STOP").touch()
    end_processes(job.id, grace)


def settle(job: Job, control: Path) -> list[str]:
    """End what the agent left behind; what befell this host is known from the ranks."""
    end_processes(job.id, GRACE_SECONDS)
    return []


def clear(job: Job) -> None:
    """End what the agent left behind."""
    end_processes(job.id, GRACE_SECONDS)
