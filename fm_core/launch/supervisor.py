"""Supervision of a job to its end: attach or submit, report progress, restart, cancel, and explain failures.

A job that fails is restarted (restart_policy.py), but not one that the user must fix, that was asked to stop
or that cannot be recovered. What only watches a job never ends it: an error of polling, status or progress is
logged and tried again, and a supervisor that cannot go on detaches. With launch.kind debug the one rank runs
in this process instead (debug.py).
"""

import errno
import logging
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fm_core.config import RunConfig, dump_yaml, load_config
from fm_core.errors import DetachedError, JobFailedError, Outcome, StopRequested, UnreachableError, UserError
from fm_core.launch import debug
from fm_core.launch.dispatch import (
    POLL_SECONDS,
    Job,
    alive,
    cancel,
    cleanup,
    collect,
    poll,
    submit,
    submitted,
)
from fm_core.launch.exit_records import ended_at
from fm_core.launch.failure_reasons import failure_of
from fm_core.launch.launcher import JobStatus, StageJob
from fm_core.launch.restart_policy import LONGEST_PAUSE_SECONDS, RestartPolicy, pause
from fm_core.run.best_effort import BestEffort
from fm_core.run.directory import differences
from fm_core.run.lease import Lease
from fm_core.run.progress import Observer, Progress
from fm_core.run.resource_limits import OomCounter
from fm_core.run.status import progress_of, read_status
from fm_core.run.stop_file import mark_obeyed, refuse_pending_request, request_stop
from fm_core.storage.atomic_files import write_text

__all__ = ["StageJob", "supervise"]

TEMPORARY_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ENOMEM, errno.EMFILE),
    *(errno.ENFILE, errno.ETIMEDOUT, errno.EROFS, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENETUNREACH),
}
"""A restart that meets one of these waits until it is over: a full disk, a file server that is away."""

logger = logging.getLogger("fm_core")


def supervise(stage_job: StageJob, observe: Observer) -> None:
    """Run a stage as a job until it is complete.

    A job that already runs there is attached to, never doubled. A job that failed is restarted at most
    launch.restarts times in a row. A signal, Ctrl-C or StopRequested from `observe` cancels the job first;
    other exceptions of `observe` are logged.

    Raises:
        StopRequested: the ranks stopped on request, or a STOP file was created while nothing ran.
        UserError: the ranks refused their configuration, or nothing could be submitted.
        UnrecoverableError: the ranks reported that a restart would not help.
        DetachedError: the supervisor cannot go on; the job does.
        JobFailedError: anything else, with what is known.
    """
    launch = stage_job.config.launch
    effort = BestEffort()
    observe = effort.observer(observe)
    if launch.kind == "debug":
        _run_in_process(stage_job, observe)
        return None
    policy = RestartPolicy(stage_job.stage, launch, stage_job.logs, stage_job.durable_progress, effort)
    with ExitStack() as meanwhile:
        job: Job | None = None
        while True:
            try:
                first, job = job is None, _start_or_undo(stage_job, job is not None, observe, effort)
                return _watch(stage_job, job, observe, effort, meanwhile if first else None)
            except (JobFailedError, UnreachableError) as failure:
                restart = policy.next_restart(failure) if job else None
                if restart is None:
                    raise
                _report(stage_job, observe, restart.message)
                _pause(stage_job, restart.pause_seconds)


def _start_or_undo(stage_job: StageJob, again: bool, observe: Observer, effort: BestEffort) -> Job:
    """As `_start`; a signal in the middle leaves no job behind."""
    before = submitted(stage_job.control)
    try:
        return _start(stage_job, again, observe)
    except BaseException as error:
        job = None if isinstance(error, Exception) else submitted(stage_job.control)
        if job and (before is None or job.id != before.id):
            _cancel(job, stage_job, effort)
        raise


def _start(stage_job: StageJob, again: bool, observe: Observer) -> Job:
    """Attach or submit; a restart waits for a disk or a file server, and nobody has to start it by hand."""
    seconds = max(1.0, stage_job.config.launch.restart_seconds)
    while True:
        try:
            return _attach_or_submit(stage_job)
        except OSError as error:
            if not again or error.errno not in TEMPORARY_ERRORS:
                raise
            message = f"cannot be started again ({error}); the next attempt is in {seconds:g} s"
            logger.warning("%s: %s", stage_job.stage, message)
            _report(stage_job, observe, message)
            _pause(stage_job, seconds)
            seconds = min(2 * seconds, LONGEST_PAUSE_SECONDS)


def _watch(
    stage_job: StageJob, job: Job, observe: Observer, effort: BestEffort, meanwhile: ExitStack | None
) -> None:
    """Watch one job to its end."""
    control, oom_counter = stage_job.control, OomCounter()
    try:
        if meanwhile:
            meanwhile.enter_context(effort.context("what runs beside the job", stage_job.meanwhile()))
        while (job_status := effort.call("ask for the job", lambda: poll(job), JobStatus(True))).alive:
            effort.call(
                "read the status of the job", lambda: _observe(job, job_status, control, observe), None
            )
            time.sleep(POLL_SECONDS[job.kind])
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopRequested):
            raise _detached(stage_job, error) from error
        _cancel(job, stage_job, effort)
        raise
    # The last status may be newer than the last poll.
    effort.call("read the status of the job", lambda: _observe(job, JobStatus(False), control, observe), None)
    lost = _collect(job, control, effort)
    if effort.retry("check whether the stage is complete", stage_job.complete):
        return
    # Slurm's choice of hosts was recorded after the job had begun.
    failure = failure_of(submitted(control) or job, control, lost, oom_counter.new_kills())
    if isinstance(failure, StopRequested):
        mark_obeyed(control, stage_job.logs.parent)
    raise failure


def _observe(job: Job, job_status: JobStatus, control: Path, observe: Observer) -> None:
    status = read_status(control)
    if job_status.reason:
        observe(Progress(job.stage, 0, 1, "jobs", job_status.reason))
    elif status and status.get("job") == job.id:
        observe(progress_of(status))


def _cancel(job: Job, stage_job: StageJob, effort: BestEffort) -> None:
    """End the job on request, whatever of it fails; its ranks obey the STOP file by themselves."""
    control = stage_job.control
    request_stop(control)
    with suppress(Exception):
        effort.retry("end the job", lambda: cancel(job, control))
        _collect(job, control, effort)
        mark_obeyed(control, stage_job.logs.parent)


def _collect(job: Job, control: Path, effort: BestEffort) -> list[str]:
    """Exit records and lost hosts of a job that has ended, and its lease returned."""
    lost: list[str] = []
    with suppress(Exception):
        lost = effort.retry("gather the exit records of the job", lambda: collect(job, control))
    effort.call("release the lease", lambda: Lease(control / "lock").release(job=job.id), None)
    return lost


def _detached(stage_job: StageJob, error: Exception) -> DetachedError:
    config = stage_job.logs / f"{stage_job.stage}.yaml"
    return DetachedError(
        f"its supervisor ended ({type(error).__name__}: {error}), the job of {stage_job.control} goes on; "
        f"to attach to it: fm {stage_job.stage} --config {config}"
    )


def _report(stage_job: StageJob, observe: Observer, message: str) -> None:
    """Show where the stage stands, with a message."""
    last = Progress(stage_job.stage, 0, 1, "jobs")
    with suppress(OSError, UserError, KeyError):
        status = read_status(stage_job.control)
        last = progress_of(status) if status and status["stage"] == stage_job.stage else last
    observe(replace(last, message=message, rate=None))


def _pause(stage_job: StageJob, seconds: float) -> None:
    directories = (stage_job.control, stage_job.logs.parent)
    try:
        pause(seconds, *directories)
    except StopRequested:
        mark_obeyed(*directories)
        raise


def _run_in_process(stage_job: StageJob, observe: Observer) -> None:
    """Run the one rank of a job here; its exceptions are raised as they are, and nothing is restarted."""
    control = stage_job.control
    job = _attach_or_submit(stage_job)
    try:
        with stage_job.meanwhile():
            debug.run_in_process(job, stage_job, observe)
    except StopRequested:
        # As for other jobs: whoever looks at the run sees that it was asked to stop.
        mark_obeyed(control, stage_job.logs.parent)
        raise
    finally:
        Lease(control / "lock").release(job=job.id)
        collect(job, control)
    if not stage_job.complete():
        raise failure_of(job, control)


def _attach_or_submit(stage_job: StageJob) -> Job:
    control, logs, stage, config = stage_job.control, stage_job.logs, stage_job.stage, stage_job.config
    control.mkdir(parents=True, exist_ok=True)
    lease = Lease(control / "lock")
    with lease.guard():
        previous = submitted(control)
        if previous and alive(previous):
            if "debug" in (previous.kind, config.launch.kind):
                raise _in_use(control, lease.holder() or previous.model_dump())
            _check_same_work(previous, logs, config)
            # Whoever submitted it may have been killed before it took the lease.
            _take_lease(lease, previous)
            return previous
        # What Slurm says of its job is final; any other lease may belong to a host that is out of sight.
        ended = [previous.id] if previous and previous.kind == "slurm" else []
        holder = lease.holder()
        if holder and holder.get("job") not in ended:
            raise _in_use(control, holder)
        obeyed_at = ended_at(control, previous, Outcome.STOPPED) if previous else 0.0
        refuse_pending_request(control, logs.parent, obeyed_at=obeyed_at)
        if previous:
            # The agent is dead; ranks it left behind must be gone before new ones start.
            cleanup(previous)
        config_file = logs / f"{stage}.yaml"
        write_text(config_file, dump_yaml(config))
        job = submit(control, logs, stage, stage_job.worker, config_file, config.launch)
        try:
            _take_lease(lease, job)
        except OSError:
            _cancel(job, stage_job, BestEffort())  # without a lease another host could start a second one
            raise
        stage_job.on_submitted()
        return job


def _take_lease(lease: Lease, job: Job) -> None:
    if job.pid is None:
        lease.take_for(f"Slurm job {job.slurm}", job=job.id, stage=job.stage)
    else:
        lease.take(job.pid, job=job.id, stage=job.stage)


def _check_same_work(job: Job, logs: Path, config: RunConfig) -> None:
    running = load_config(logs / f"{job.stage}.yaml")
    section = job.stage if job.stage in ("train", "evaluate") else "sample"
    changes = differences(getattr(running, section).model_dump(), getattr(config, section).model_dump())
    if changes:
        raise UserError(
            f"a {job.stage} job runs in {logs.parent} with another configuration: {section}.{changes[0]}; "
            "wait for it or stop it"
        )


def _in_use(control: Path, holder: dict[str, Any]) -> UserError:
    who = f"process {holder['pid']} on {holder['host']}" if holder.get("pid") else holder["host"]
    stage = holder.get("stage", "unknown stage")
    return UserError(f"{control} is in use by {who} ({stage}); wait for it or stop it there")
