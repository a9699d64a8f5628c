"""Supervision of a job until it ends: attach or submit, report progress, restart, cancel, explain failures.

A job that fails is restarted (restart_policy.py), except after a user error, a request to stop or an
unrecoverable error. Watching a job must never end it: an error of polling, status or progress is logged and
retried, and a supervisor that cannot continue detaches. With launch.kind debug the single rank runs in this
process instead (debug.py).
"""

import errno
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from fm_core.errors import (
    DetachedError,
    JobFailedError,
    LeaseLostError,
    StopRequested,
    UnreachableError,
    UserError,
)
from fm_core.launch import debug
from fm_core.launch.dispatch import POLL_SECONDS, Job, cancel, collect, poll, submitted
from fm_core.launch.failure_reasons import failure_of
from fm_core.launch.job import successor
from fm_core.launch.job_ownership import attach_or_submit, keep_lease
from fm_core.launch.launcher import JobStatus, StageJob, job_config_file
from fm_core.launch.restart_policy import LONGEST_PAUSE_SECONDS, RestartPolicy, pause
from fm_core.run.best_effort import BestEffort
from fm_core.run.lease import Lease
from fm_core.run.progress import Observer, Progress
from fm_core.run.resource_limits import OomCounter
from fm_core.run.status import progress_of, read_status
from fm_core.run.stop_file import mark_stop_handled, own_directories

__all__ = ["StageJob", "supervise"]

TEMPORARY_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ENOMEM, errno.EMFILE),
    *(errno.ENFILE, errno.ETIMEDOUT, errno.EROFS, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENETUNREACH),
}
"""A restart that fails with one of these is retried: a full disk, an unavailable file server."""

logger = logging.getLogger("fm_core")


def supervise(stage_job: StageJob, observe: Observer) -> None:
    """Run a stage as a job until it is complete.

    If a job already runs there, this attaches to it (job_ownership.py). A job that failed is restarted at
    most launch.restarts times in a row. A signal, Ctrl-C or StopRequested from `observe` cancels the job
    first; other exceptions of `observe` are logged.

    Raises:
        StopRequested: the ranks stopped on request, or a STOP file was created while no job ran.
        UserError: a rank reported a user error, or no job could be submitted.
        LeaseLostError: another host has taken over the directory.
        UnrecoverableError: the ranks reported that a restart would not help.
        DetachedError: the supervisor cannot continue; the job still runs.
        JobFailedError: anything else, with the known causes.
    """
    launch = stage_job.config.launch
    effort = BestEffort()
    observe = effort.observer(observe)
    if launch.kind == "debug":
        _run_in_process(stage_job, observe)
        return
    policy = RestartPolicy(stage_job.stage, launch, stage_job.logs, stage_job.durable_progress, effort)
    with ExitStack() as meanwhile:
        job: Job | None = None
        while True:
            try:
                first, job = job is None, _start_or_undo(stage_job, job, observe, effort)
                with keep_lease(job, stage_job.control) as check_lease:
                    _watch(stage_job, job, observe, effort, meanwhile if first else None, check_lease)
                    return
            except (JobFailedError, UnreachableError) as failure:
                restart = policy.next_restart(failure) if job else None
                if restart is None:
                    raise
                _report(stage_job, observe, restart.message)
                _pause(stage_job, restart.pause_seconds)


def _start_or_undo(stage_job: StageJob, last: Job | None, observe: Observer, effort: BestEffort) -> Job:
    """`_start`, but a signal in the middle of it leaves no running job."""
    before = effort.call("read the last job", lambda: submitted(stage_job.control), None)
    try:
        return _start(stage_job, last, observe)
    except BaseException as error:
        job = None if isinstance(error, Exception) else submitted(stage_job.control)
        if job and (before is None or job.id != before.id):
            _cancel(job, stage_job, effort)
        raise


def _start(stage_job: StageJob, last: Job | None, observe: Observer) -> Job:
    """Attach or submit; a restart is retried while a disk or a file server is unavailable."""
    seconds = max(1.0, stage_job.config.launch.restart_seconds)
    while True:
        try:
            return attach_or_submit(stage_job, observe, last)
        except OSError as error:
            if last is None or error.errno not in TEMPORARY_ERRORS:
                raise
            message = f"cannot restart ({error}); retrying in {seconds:g} s"
            logger.warning("%s: %s", stage_job.stage, message)
            _report(stage_job, observe, message)
            _pause(stage_job, seconds)
            seconds = min(2 * seconds, LONGEST_PAUSE_SECONDS)


def _watch(
    stage_job: StageJob,
    job: Job,
    observe: Observer,
    effort: BestEffort,
    meanwhile: ExitStack | None,
    check_lease: Callable[[], None],
) -> None:
    """Watch one job until it ends."""
    control, oom_counter = stage_job.control, OomCounter()
    try:
        if meanwhile:
            meanwhile.enter_context(
                effort.context("run the online evaluation of the job", stage_job.meanwhile())
            )
        while (job_status := effort.call("poll the job", lambda: poll(job), JobStatus(True))).alive:
            effort.call("check the lease", check_lease, None)
            effort.call(
                "read the status of the job", lambda: _observe(job, job_status, control, observe), None
            )
            time.sleep(POLL_SECONDS[job.kind])
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopRequested | LeaseLostError):
            raise _detached(stage_job, error) from error
        _cancel(job, stage_job, effort)
        raise
    # The last status may be newer than the last poll.
    effort.call("read the status of the job", lambda: _observe(job, JobStatus(False), control, observe), None)
    lost = _collect(job, control, effort)
    if effort.retry("check whether the stage is complete", stage_job.complete):
        return

    def explain() -> Exception:
        # Slurm's hosts were recorded after the job had started.
        return failure_of(submitted(control) or job, control, lost, oom_counter.new_kills())

    failure = effort.retry("find out why the job ended", explain)
    if isinstance(failure, StopRequested):
        _mark_stop_handled(job, stage_job)
    raise failure


def _observe(job: Job, job_status: JobStatus, control: Path, observe: Observer) -> None:
    if job_status.reason:
        observe(Progress(job.stage, 0, 1, "jobs", job_status.reason))
    elif (status := read_status(control)) and status.get("job") == job.id:
        observe(progress_of(status))


def _cancel(job: Job, stage_job: StageJob, effort: BestEffort) -> None:
    """End the job on request; errors are only logged, since the ranks also stop because of the STOP file."""
    control = stage_job.control
    with suppress(Exception):
        effort.retry("end the job", lambda: cancel(job, control))
        _collect(job, control, effort)
        _mark_stop_handled(job, stage_job)


def _mark_stop_handled(job: Job, stage_job: StageJob) -> None:
    """Mark requests to stop as handled, unless another job has taken over the directory."""
    if successor(job, stage_job.control) is None:
        mark_stop_handled(*own_directories(stage_job.control, stage_job.logs.parent))


def _collect(job: Job, control: Path, effort: BestEffort) -> list[str]:
    """Collect exit records and lost hosts of an ended job, and release its lease."""
    lost: list[str] = []
    with suppress(Exception):
        lost = effort.retry("collect the exit records of the job", lambda: collect(job, control))
    effort.call("release the lease", lambda: Lease(control / "lock").release(job=job.id), None)
    return lost


def _detached(stage_job: StageJob, error: Exception) -> DetachedError:
    config = job_config_file(stage_job.control, stage_job.logs, stage_job.stage)
    return DetachedError(
        f"supervision failed ({type(error).__name__}: {error}); the job in {stage_job.control} is still "
        f"running: attach to it with fm {stage_job.stage} --config {config}"
    )


def _report(stage_job: StageJob, observe: Observer, message: str) -> None:
    """Show the current progress of the stage, with a message."""
    last = Progress(stage_job.stage, 0, 1, "jobs")
    with suppress(OSError, UserError, KeyError):
        status = read_status(stage_job.control)
        last = progress_of(status) if status and status["stage"] == stage_job.stage else last
    observe(replace(last, message=message, rate=None))


def _pause(stage_job: StageJob, seconds: float) -> None:
    control, run = stage_job.control, stage_job.logs.parent
    try:
        pause(seconds, control, run)
    except StopRequested:
        mark_stop_handled(*own_directories(control, run))
        raise


def _run_in_process(stage_job: StageJob, observe: Observer) -> None:
    """Run the single rank of a job in this process; its exceptions are raised unchanged, without restarts."""
    control = stage_job.control
    job = attach_or_submit(stage_job, observe)
    try:
        with stage_job.meanwhile():
            debug.run_in_process(job, stage_job, observe)
    except StopRequested:
        # As for other jobs, so that other processes see that a stop was requested.
        mark_stop_handled(*own_directories(control, stage_job.logs.parent))
        raise
    finally:
        Lease(control / "lock").release(job=job.id)
        collect(job, control)
    if not stage_job.complete():
        raise failure_of(job, control)
