"""Slurm launcher: sbatch with one task per node, each a node agent that runs one rank group.

Slurm ends all nodes when one fails, and requeues a job that was preempted, lost a node or reached its
time limit; its ranks then continue from their last checkpoint.
"""

import errno
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from fm_core.errors import UserError
from fm_core.launch.exit_records import collect_exit_records, open_log
from fm_core.launch.job import GRACE_SECONDS, Job
from fm_core.launch.launcher import JobSpec, JobStatus
from fm_core.launch.node_agent import NODE_SPEC_VARIABLE
from fm_core.launch.node_spec import DEVICES, node_spec_of, remove_visibility_marks
from fm_core.launch.rank_group import PREFECT_SECRETS
from fm_core.launch.ssh import node_arguments
from fm_core.run.progress import byte_size
from fm_core.run.stop_file import request_stop

logger = logging.getLogger("fm_core")

PROGRAMS: dict[str, str] = dict.fromkeys(("sbatch", "squeue", "scancel"), "slurm-client")
"""Programs that are called on this host, with the package that provides each."""
_BATCH = Path(__file__).with_name("slurm_batch.sh")
_ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
_JOB_NUMBER = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S*)?(?: on cluster \S+)?")
"""The last line of sbatch's output, with --parsable or from a wrapper that drops that option."""
_STATE = re.compile(r"([A-Z_]+)\|(.*)")
_NO_ANSWER = "UNKNOWN"
EMPTY_ANSWERS, EMPTY_SECONDS = 3, 2.0
"""A job has ended if squeue does not list it this many times in a row, at these intervals."""
COMMAND_SECONDS = 120.0
"""Timeout of a Slurm command, in seconds."""
_UNKNOWN = "Invalid job id"
"""squeue's error for a job that ended long ago."""


def submit(spec: JobSpec) -> Job:
    """Queue the job. Raises UserError with the message of sbatch if it refuses."""
    if not shutil.which("sbatch"):
        raise UserError("launch.kind slurm: sbatch was not found on this host; start from a Slurm login node")
    launch = spec.config.launch
    if not launch.threads and "cpus-per-task" not in launch.slurm.options:
        raise UserError(
            "launch.threads: Slurm needs the number of cores to reserve; set the threads of each process, or "
            "cpus-per-task in launch.slurm.options"
        )
    node_spec = node_spec_of(spec, {})
    options: dict[str, str | int | bool | None] = {
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
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not None and value is not False
    ]
    command = [
        "sbatch",
        "--parsable",
        "--requeue",
        *flags,
        str(_BATCH),
        *node_arguments(spec.job.id, "slurm"),
    ]
    open_log(spec.job)
    environment = {
        name: value for name, value in os.environ.items() if name not in (*DEVICES, *PREFECT_SECRETS)
    }
    environment[NODE_SPEC_VARIABLE] = node_spec.model_dump_json()
    try:
        done = _run(command, environment)
    except OSError as error:
        remove_visibility_marks(node_spec.job)
        raise UserError(f"launch.slurm: sbatch cannot be started: {_why(error, environment)}") from None
    if done.returncode:
        remove_visibility_marks(node_spec.job)
        raise UserError(f"launch.slurm: {' '.join(done.stderr.split())}")
    return node_spec.job.model_copy(update={"slurm": job_number(done.stdout, str(options["job-name"]))})


def job_number(output: str, name: str) -> int:
    """Parse the job id from the output of sbatch, to which a site's wrapper may add lines.

    Raises:
        UserError: there is none; the message gives the name of the job, which may be queued.
    """
    for line in reversed(output.splitlines()):
        if match := _JOB_NUMBER.fullmatch(line.strip()):
            return int(match[1])
    shown = " ".join(output.split())[:200]
    raise UserError(
        f"launch.slurm: sbatch printed {shown!r} instead of a job id; the job may still have been queued: "
        f"cancel it with scancel --name={name}"
    )


def poll(job: Job) -> JobStatus:
    """Whether Slurm has the job, and why it does not run yet."""
    state, reason = _state(job)
    if state == _NO_ANSWER:
        return JobStatus(True, f"Slurm does not report the state of job {job.slurm} ({reason})")
    waits = state not in ("RUNNING", "COMPLETING")
    message = f"Slurm job {job.slurm} is {state.lower()} ({reason})" if waits else ""
    return JobStatus(state not in _ENDED_STATES, message)


def cancel(job: Job, control: Path, grace: float = GRACE_SECONDS) -> None:
    """Ask the ranks to save and exit through scancel; kill those that remain."""
    request_stop(control)
    _scancel(str(job.slurm))
    if not _ended_within(job, grace):
        _scancel("--full", "--signal=KILL", str(job.slurm))
        _ended_within(job, GRACE_SECONDS)


def collect(job: Job, control: Path) -> list[str]:
    """Collect exit records of nodes without access to the control directory; return Slurm's end state."""
    collect_exit_records(job, control)
    remove_visibility_marks(job)
    state, reason = _state(job)
    if state == "CANCELLED":
        # Canceled by anyone: this counts as a request to stop.
        request_stop(control)
    return [] if state in ("COMPLETED", "FAILED") else [f"Slurm job {job.slurm}: {state.lower()} ({reason})"]


def cleanup(job: Job) -> None:
    """Do nothing, because Slurm does not report a job as ended while it has processes."""


def _state(job: Job) -> tuple[str, str]:
    """Slurm's state and reason; _NO_ANSWER if squeue or the controller does not answer."""
    query = ("squeue", "--noheader", "--states=all", f"--jobs={job.slurm}", "--format=%T|%r")
    for attempt in range(EMPTY_ANSWERS):
        try:
            done = _run(query)
        except (
            OSError,
            subprocess.TimeoutExpired,
        ) as error:  # not installed at the moment, or no process can be started
            return _NO_ANSWER, str(error)
        if done.returncode:
            message = " ".join(done.stderr.split())
            return ("COMPLETED", "ended some time ago") if _UNKNOWN in message else (_NO_ANSWER, message)
        states = [match for line in done.stdout.splitlines() if (match := _STATE.fullmatch(line.strip()))]
        if states:
            return states[-1][1], states[-1][2].strip()
        # Slurm forgets ended jobs, but a controller that has just started may also return an empty list.
        if attempt + 1 < EMPTY_ANSWERS:
            time.sleep(EMPTY_SECONDS)
    return "COMPLETED", ""


def _ended_within(job: Job, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while poll(job).alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def _scancel(*arguments: str) -> None:
    try:
        done = _run(("scancel", *arguments))
        problem = " ".join(done.stderr.split()) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        logger.warning(
            "scancel %s failed (%s); the ranks stop because of the STOP file", " ".join(arguments), problem
        )


def _run(
    arguments: Sequence[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=COMMAND_SECONDS,
    )


def _why(error: OSError, environment: dict[str, str]) -> str:
    """The message of an exec error; lists the largest variables if the environment is too large."""
    if error.errno != errno.E2BIG:
        return str(error)
    sizes = {name: len(f"{name}={value}".encode()) for name, value in environment.items()}
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
    shown = ", ".join(f"{name} {byte_size(sizes[name])}" for name in largest)
    total = byte_size(sum(sizes.values()))
    return f"the environment has {total}, more than the kernel passes on; the largest variables: {shown}"
