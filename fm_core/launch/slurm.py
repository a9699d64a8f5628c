"""Slurm launcher: sbatch with one task per node, each a node agent that runs one torchrun.

Slurm ends all nodes when one fails, and requeues a job that was preempted, lost a node or reached its
time limit; its ranks then continue from their last checkpoint.
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
from fm_core.launch.ssh import node_arguments
from fm_core.run.stop_file import request_stop

PROGRAMS: dict[str, str] = dict.fromkeys(("sbatch", "squeue", "scancel"), "slurm-client")
"""Programs that are called on this host, with the package of each."""
_BATCH = Path(__file__).with_name("slurm_batch.sh")
_ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
_UNKNOWN = "Invalid job id"
"""What squeue prints for a job that ended long ago."""


def submit(spec: JobSpec) -> Job:
    """Queue the job. Raises UserError with the message of sbatch if it refuses."""
    if not shutil.which("sbatch"):
        raise UserError(
            "launch.kind slurm: there is no sbatch on this host; start from a login node of Slurm"
        )
    launch = spec.config.launch
    if not launch.threads and "cpus-per-task" not in launch.slurm.options:
        raise UserError(
            "launch.threads: Slurm must know how many cores to reserve; name the threads of each process, or "
            "cpus-per-task in launch.slurm.options"
        )
    node_spec = node_spec_of(spec, {})
    options: dict[str, str | int] = {
        "job-name": f"{spec.job.stage}-{spec.config.run.name}",
        "nodes": launch.slurm.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": (launch.processes or 1) * (launch.threads or 1),
        "output": spec.job.log.replace("%", "%%"),
        "open-mode": "append",
        "signal": f"B:USR1@{launch.slurm.notice_seconds}",
        "export": "ALL",
        **launch.slurm.options,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [
        "sbatch",
        "--parsable",
        "--requeue",
        *flags,
        str(_BATCH),
        *node_arguments(spec.job.id, "slurm"),
    ]
    open_log(spec.job)
    environment = {name: value for name, value in os.environ.items() if name not in DEVICES}
    environment[NODE_SPEC_VARIABLE] = node_spec.model_dump_json()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        remove_visibility_marks(node_spec.job)
        raise UserError(f"launch.slurm: {' '.join(done.stderr.split())}")
    return node_spec.job.model_copy(update={"slurm": int(done.stdout.partition(";")[0])})


def poll(job: Job) -> JobStatus:
    """Whether Slurm holds the job, and why it does not run yet."""
    state, reason = _state(job)
    waits = state not in ("RUNNING", "COMPLETING")
    message = f"Slurm job {job.slurm} is {state.lower()} ({reason})" if waits else ""
    return JobStatus(state not in _ENDED_STATES, message)


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the ranks to save and exit through scancel; kill what remains."""
    request_stop(control)
    _command("scancel", str(job.slurm))
    if not _ended_within(job, grace):
        _command("scancel", "--full", "--signal=KILL", str(job.slurm))
        _ended_within(job, GRACE_SECONDS)


def collect(job: Job, control: Path) -> list[str]:
    """Gather exit records of nodes that do not see the control directory; return Slurm's end state."""
    collect_exit_records(job, control)
    remove_visibility_marks(job)
    state, reason = _state(job)
    if state == "CANCELLED":
        # Whoever did it: that is a request to stop.
        request_stop(control)
    return [] if state in ("COMPLETED", "FAILED") else [f"Slurm job {job.slurm}: {state.lower()} ({reason})"]


def cleanup(job: Job) -> None:
    """Nothing: for Slurm no job has ended that has processes left."""


def _state(job: Job) -> tuple[str, str]:
    """Slurm's state and reason; where the controller does not answer, the state is UNKNOWN, not ended."""
    done = _command("squeue", "--noheader", "--states=all", f"--jobs={job.slurm}", "--format=%T|%r")
    if done.returncode:
        message = " ".join(done.stderr.split())
        return ("COMPLETED", "ended some time ago") if _UNKNOWN in message else ("UNKNOWN", message)
    state, _, reason = done.stdout.strip().partition("|")
    return state or "COMPLETED", reason.strip()


def _ended_within(job: Job, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while poll(job).alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL)
