"""Supervision of a job to its end: attach or submit, report progress, restart, cancel, and explain failures.

A job that fails is restarted (restart_policy.py), but not one that the user must fix, that was asked to stop
or that cannot be recovered. With launch.kind debug the one rank runs in this process instead (debug.py).
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from fm_core.errors import JobFailedError, StopRequested, UnreachableError
from fm_core.launch import debug
from fm_core.launch.dispatch import POLL_SECONDS, Job, cancel, collect, poll, submitted
from fm_core.launch.failure_reasons import failure_of
from fm_core.launch.job_ownership import attach_or_submit, keep_lease
from fm_core.launch.launcher import StageJob
from fm_core.launch.restart_policy import RestartPolicy, pause
from fm_core.run.lease import Lease
from fm_core.run.progress import Observer, Progress
from fm_core.run.status import progress_of, read_status

__all__ = ["StageJob", "supervise"]


def supervise(stage_job: StageJob, observe: Observer) -> None:
    """Run a stage as a job until it is complete.

    A job that already runs there is attached to, never doubled (job_ownership.py). A job that failed is
    restarted at most launch.restarts times in a row. Any exception in here, including one from a signal
    handler, cancels the job first.

    Raises:
        StopRequested: the ranks stopped on request.
        UserError: the ranks refused their configuration, or nothing could be submitted.
        LeaseLostError: another host has taken over the directory.
        UnrecoverableError: the ranks reported that a restart would not help.
        JobFailedError: anything else, with what is known.
    """
    launch = stage_job.config.launch
    if launch.kind == "debug":
        _run_in_process(stage_job, observe)
        return None
    policy = RestartPolicy(stage_job.stage, launch, stage_job.logs, stage_job.durable_progress)
    with ExitStack() as meanwhile:
        job: Job | None = None
        while True:
            try:
                first, job = job is None, attach_or_submit(stage_job, observe)
                with keep_lease(job, stage_job.control) as check_lease:
                    return _watch(stage_job, job, observe, meanwhile if first else None, check_lease)
            except (JobFailedError, UnreachableError) as failure:
                restart = policy.next_restart(failure) if job else None
                if restart is None:
                    raise
                observe(_last_progress(stage_job.control, stage_job.stage, restart.message))
                pause(restart.pause_seconds, stage_job.control, stage_job.logs.parent)


def _watch(
    stage_job: StageJob,
    job: Job,
    observe: Observer,
    meanwhile: ExitStack | None,
    check_lease: Callable[[], None],
) -> None:
    """Watch one job to its end."""
    control = stage_job.control
    lost: list[str] = []
    try:
        if meanwhile:
            meanwhile.enter_context(stage_job.meanwhile())
        while (job_status := poll(job)).alive:
            check_lease()
            status = read_status(control)
            if job_status.reason:
                observe(Progress(stage_job.stage, 0, 1, "jobs", job_status.reason))
            elif status and status.get("job") == job.id:
                observe(progress_of(status))
            time.sleep(POLL_SECONDS[job.kind])
    except BaseException:
        cancel(job, control)
        raise
    finally:
        lost += collect(job, control)
        Lease(control / "lock").release(job=job.id)
    if not stage_job.complete():
        # Slurm's choice of hosts was recorded after the job had begun.
        raise failure_of(submitted(control) or job, control, lost)


def _run_in_process(stage_job: StageJob, observe: Observer) -> None:
    """Run the one rank of a job here; its exceptions are raised as they are, and nothing is restarted."""
    control = stage_job.control
    job = attach_or_submit(stage_job, observe)
    try:
        with stage_job.meanwhile():
            debug.run_in_process(job, stage_job, observe)
    except StopRequested:
        # As `cancel` does for other jobs: whoever looks at the run sees that it was asked to stop.
        (control / "STOP").touch()
        raise
    finally:
        Lease(control / "lock").release(job=job.id)
        collect(job, control)
    if not stage_job.complete():
        raise failure_of(job, control)


def _last_progress(control: Path, stage: str, message: str) -> Progress:
    """Where the stage stands, with a message."""
    status = read_status(control)
    last = progress_of(status) if status and status["stage"] == stage else Progress(stage, 0, 1, "jobs")
    return replace(last, message=message, rate=None)
