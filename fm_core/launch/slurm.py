"""Jobs through Slurm: sbatch with one task per node, each a node that runs one torchrun.

Slurm ends all nodes when one fails, and queues a job again that was preempted, lost a node or came to
its time limit; its ranks then continue from their last checkpoint.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

from fm_core.errors import UserError
from fm_core.launch.exit_records import collect_exit_records, open_log
from fm_core.launch.job import GRACE_SECONDS, Job
from fm_core.launch.launcher import JobSpec, JobStatus
from fm_core.launch.node_agent import NODE_SPEC_VARIABLE
from fm_core.launch.node_spec import DEVICES, node_spec_of, remove_visibility_marks
from fm_core.launch.ssh import node_words

PROGRAMS: dict[str, str] = dict.fromkeys(("sbatch", "squeue", "scancel"), "slurm-client")
"""What is called on this host, by the package that brings it."""
_BATCH = Path(__file__).with_name("slurm_batch.sh")
_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
_UNKNOWN = "Invalid job id"
"""How squeue speaks of a job that ended long ago."""


def submit(task: JobSpec) -> Job:
    """Queue the job. Raises UserError with the words of sbatch if it refuses."""
    if not shutil.which("sbatch"):
        raise UserError(
            "launch.kind slurm: there is no sbatch on this host; start from a login node of Slurm"
        )
    launch = task.config.launch
    if not launch.threads and "cpus-per-task" not in launch.slurm.options:
        raise UserError(
            "launch.threads: Slurm must know how many cores to reserve; name the threads of each process, or "
            "cpus-per-task in launch.slurm.options"
        )
    order = node_spec_of(task, {})
    options: dict[str, str | int] = {
        "job-name": f"{task.job.stage}-{task.config.run.name}",
        "nodes": launch.slurm.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": (launch.processes or 1) * (launch.threads or 1),
        "output": task.job.log.replace("%", "%%"),
        "open-mode": "append",
        "signal": f"B:USR1@{launch.slurm.notice_seconds}",
        "export": "ALL",
        **launch.slurm.options,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = ["sbatch", "--parsable", "--requeue", *words, str(_BATCH), *node_words(task.job.id, "slurm")]
    open_log(task.job)
    environment = {name: value for name, value in os.environ.items() if name not in DEVICES}
    environment[NODE_SPEC_VARIABLE] = order.model_dump_json()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        remove_visibility_marks(order.job)
        raise UserError(f"launch.slurm: {' '.join(done.stderr.split())}")
    return order.job.model_copy(update={"slurm": int(done.stdout.partition(";")[0])})


def poll(job: Job) -> JobStatus:
    """Whether Slurm holds the job, and why it does not run yet."""
    state, reason = _state(job)
    waits = state not in ("RUNNING", "COMPLETING")
    word = f"Slurm job {job.slurm} is {state.lower()} ({reason})" if waits else ""
    return JobStatus(state not in _OVER, word)


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the ranks to save and end through scancel; kill what stays."""
    control.joinpath("STOP").touch()
    _command("scancel", str(job.slurm))
    if not _ended_within(job, grace):
        _command("scancel", "--full", "--signal=KILL", str(job.slurm))
        _ended_within(job, GRACE_SECONDS)


def collect(job: Job, control: Path) -> list[str]:
    """Gather the words of nodes that do not see the control directory; how Slurm says the job ended."""
    collect_exit_records(job, control)
    remove_visibility_marks(job)
    state, reason = _state(job)
    if state == "CANCELLED":
        # By whoever: that is a request to stop.
        control.joinpath("STOP").touch()
    return [] if state in ("COMPLETED", "FAILED") else [f"Slurm job {job.slurm}: {state.lower()} ({reason})"]


def cleanup(job: Job) -> None:
    """Nothing: Slurm calls no job ended that has processes left."""


def _state(job: Job) -> tuple[str, str]:
    """State and reason in Slurm's words; a controller that does not answer has not ended the job."""
    done = _command("squeue", "--noheader", "--states=all", f"--jobs={job.slurm}", "--format=%T|%r")
    if done.returncode:
        said = " ".join(done.stderr.split())
        return ("COMPLETED", "ended some time ago") if _UNKNOWN in said else ("UNKNOWN", said)
    state, _, reason = done.stdout.strip().partition("|")
    return state or "COMPLETED", reason.strip()


def _ended_within(job: Job, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while poll(job).alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
