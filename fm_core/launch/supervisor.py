"""Supervision of a job to its end: attach or submit, report progress, restart, cancel, and explain failures.

A job that fails is restarted (restart_policy.py), but not one that the user must fix, that was asked to stop
or that cannot be recovered. With launch.kind debug the one rank runs in this process instead (debug.py).
"""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fm_core.config import RunConfig, dump_yaml, load_config
from fm_core.errors import JobFailedError, StopRequested, UnreachableError, UserError
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
from fm_core.launch.failure_reasons import failure_of
from fm_core.launch.launcher import StageJob
from fm_core.launch.restart_policy import RestartPolicy, pause
from fm_core.run.directory import differences, identity
from fm_core.run.lease import Lease
from fm_core.run.progress import Observer, Progress
from fm_core.run.status import progress_of, read_status
from fm_core.storage.atomic_files import write_text

__all__ = ["StageJob", "supervise"]


def supervise(stage_job: StageJob, observe: Observer) -> None:
    """Run a stage as a job until it is complete.

    A job that already runs there is attached to, never doubled. A job that failed is restarted at most
    launch.restarts times in a row. Any exception in here, including one from a signal handler, cancels the
    job first.

    Raises:
        StopRequested: the ranks stopped on request.
        UserError: the ranks refused their configuration, or nothing could be submitted.
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
                first, job = job is None, _attach_or_submit(stage_job)
                return _watch(stage_job, job, observe, meanwhile if first else None)
            except (JobFailedError, UnreachableError) as failure:
                restart = policy.next_restart(failure) if job else None
                if restart is None:
                    raise
                observe(_last_progress(stage_job.control, stage_job.stage, restart.message))
                pause(restart.pause_seconds, stage_job.control, stage_job.logs.parent)


def _watch(stage_job: StageJob, job: Job, observe: Observer, meanwhile: ExitStack | None) -> None:
    """Watch one job to its end."""
    control = stage_job.control
    lost: list[str] = []
    try:
        if meanwhile:
            meanwhile.enter_context(stage_job.meanwhile())
        while (job_status := poll(job)).alive:
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
    job = _attach_or_submit(stage_job)
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
        if previous:
            # The agent is dead; ranks it left behind must be gone before new ones start.
            cleanup(previous)
        stage_job.before_submit()
        config_file = logs / f"{stage}.yaml"
        write_text(config_file, dump_yaml(config))
        job = submit(control, logs, stage, stage_job.worker, config_file, config.launch)
        _take_lease(lease, job)
        return job


def _last_progress(control: Path, stage: str, message: str) -> Progress:
    """Where the stage stands, with a message."""
    status = read_status(control)
    last = progress_of(status) if status and status["stage"] == stage else Progress(stage, 0, 1, "jobs")
    return replace(last, message=message, rate=None)


def _take_lease(lease: Lease, job: Job) -> None:
    if job.pid is None:
        lease.take_for(f"Slurm job {job.slurm}", job=job.id, stage=job.stage)
    else:
        lease.take(job.pid, job=job.id, stage=job.stage)


def _check_same_work(job: Job, logs: Path, config: RunConfig) -> None:
    running = load_config(logs / f"{job.stage}.yaml")
    section = job.stage if job.stage in ("train", "evaluate") else "sample"
    changes = differences(
        getattr(running, section).model_dump(), getattr(config, section).model_dump(), f"{section}."
    )
    if job.stage == "train":
        # Before its first step, the run directory does not say which run it is.
        changes = changes or differences(identity(running), identity(config))
    if changes:
        raise UserError(
            f"a {job.stage} job runs in {logs.parent} with another configuration: {changes[0]}; "
            "wait for it or stop it"
        )


def _in_use(control: Path, holder: dict[str, Any]) -> UserError:
    who = f"process {holder['pid']} on {holder['host']}" if holder.get("pid") else holder["host"]
    stage = holder.get("stage", "unknown stage")
    return UserError(f"{control} is in use by {who} ({stage}); wait for it or stop it there")
