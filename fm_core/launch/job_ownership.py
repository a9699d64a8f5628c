"""Ownership of a control directory: a start attaches to its job, is refused, or replaces the job.

A start attaches to a job whose agent is alive on this host. It is refused while another holder is alive. It
takes the lease of a dead holder, with a higher epoch, and submits a new job.
"""

import errno
import os
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fm_core.config import dump_yaml, load_config
from fm_core.errors import FlowMatchingError, JobFailedError, LeaseLostError, UserError
from fm_core.launch.dispatch import Job, alive, cleanup, submit, submitted
from fm_core.launch.exit_records import stopped_at
from fm_core.launch.job import kill, processes_of, successor
from fm_core.launch.launcher import StageJob, job_config_file
from fm_core.run.directory import differences, identity
from fm_core.run.lease import LOOK_INTERVAL_SECONDS, HolderState, Lease, holder_name, waiting_message
from fm_core.run.process_identity import ProcessIdentity
from fm_core.run.progress import Observer, Progress
from fm_core.run.stop_file import own_directories, refuse_pending_request
from fm_core.storage.atomic_files import write_text


def attach_or_submit(stage_job: StageJob, observe: Observer, last: Job | None = None) -> Job:
    """Attach to the job of a control directory, or submit one.

    A holder elsewhere is watched until its heartbeat is seen or has been absent for long enough. For a
    restart, `last` is the job that ended.

    Raises:
        UserError: the directory is in use, or the ranks cannot be started.
        StopRequested: a STOP file was created while no job ran.
        OSError: ESTALE if the directory does not contain the last job, i.e. something else is mounted.
    """
    if last:
        _check_mounted(stage_job.control, last)
    stage_job.control.mkdir(parents=True, exist_ok=True)
    lease = Lease(stage_job.control / "lock")
    reported = False
    while True:
        with lease.guard():
            previous = submitted(stage_job.control)
            state, holder = lease.look()
            if previous and _is_attachable(previous, state, holder):
                return _attach(stage_job, lease, previous, holder)
            # Slurm's answer about its own job is authoritative.
            ended = previous and previous.kind == "slurm" and holder and holder.get("job") == previous.id
            if state is HolderState.FREE or ended:
                return _submit(stage_job, lease, previous)
        if holder and state is HolderState.HELD:
            raise _in_use(stage_job.control, holder)
        if holder and not reported:
            reported = True
            message = waiting_message(stage_job.control, holder)
            observe(Progress(stage_job.stage, 0, 1, "jobs", message))
        time.sleep(LOOK_INTERVAL_SECONDS)


def _check_mounted(control: Path, last: Job) -> None:
    """Check that job.json contains the last job or a later one; an empty mount point has none."""
    latest = submitted(control)
    if latest is None or (latest.id != last.id and latest.epoch <= last.epoch):
        raise OSError(
            errno.ESTALE, "does not contain the last job; check that the directory is mounted", str(control)
        )


@contextmanager
def keep_lease(job: Job, control: Path) -> Generator[Callable[[], None]]:
    """Renew the heartbeat of a job's lease while its supervisor watches the job.

    Yields a function that raises LeaseLostError once another job has the lease. If the block then fails in
    any way, only the processes of this job on this host are killed.

    Raises:
        LeaseLostError: another job has taken the lease, on another host.
        JobFailedError: another job has taken it on this host; the next attempt attaches to that job, or
            replaces it if it is dead.
    """

    def check() -> None:
        try:
            check_heartbeat()
        except LeaseLostError:
            # Another supervisor of this job may have seen its end first and released the lease.
            if successor(job, control):
                raise

    with Lease(control / "lock").keep_alive(job=job.id) as check_heartbeat:
        try:
            yield check
        except FlowMatchingError as error:
            holder = successor(job, control)
            if holder is None:
                raise
            kill(processes_of(job))
            if not _is_here(control, holder):
                raise LeaseLostError(
                    f"{control} was taken over by {holder_name(holder)}; this job has ended without writing "
                    "anything more there"
                ) from None
            if isinstance(error, LeaseLostError):
                raise JobFailedError(str(error)) from None
            raise


def _is_here(control: Path, holder: dict[str, Any]) -> bool:
    """Whether the latest job runs or ended on this host. Waits for a start that is submitting it."""
    with Lease(control / "lock").guard():
        latest = submitted(control)
    process = ProcessIdentity.from_record(holder)
    died_here = process is not None and process.here and process.alive() is False
    return died_here or (latest is not None and alive(latest))


def _is_attachable(previous: Job, state: HolderState, holder: dict[str, Any] | None) -> bool:
    """Whether the job of job.json is alive and no other job holds the lease."""
    others = holder is not None and holder.get("job") not in (None, previous.id)
    return not (others and state is not HolderState.FREE) and alive(previous)


def _attach(stage_job: StageJob, lease: Lease, previous: Job, holder: dict[str, Any] | None) -> Job:
    if "debug" in (previous.kind, stage_job.config.launch.kind):
        raise _in_use(stage_job.control, holder or previous.model_dump())
    _check_same_work(previous, stage_job)
    # The process that submitted it may have been killed before it recorded the agent.
    _record(lease, previous)
    return previous


def _submit(stage_job: StageJob, lease: Lease, previous: Job | None) -> Job:
    control, logs, stage, config = stage_job.control, stage_job.logs, stage_job.stage, stage_job.config
    handled_at = {place: max(stopped_at(control), stopped_at(place)) for place in (logs.parent, control)}
    refuse_pending_request(*own_directories(control, logs.parent), handled_at=handled_at)
    if previous:
        # The agent is dead; its remaining ranks must end before new ones start.
        cleanup(previous)
    stage_job.before_submit()
    config_file = job_config_file(control, logs, stage)
    for file in {config_file, logs / f"{stage}.yaml"}:
        write_text(file, dump_yaml(config))
    # This process holds the lease until the agent is known, so that the ranks find it taken when they start.
    identifier, epoch = uuid.uuid4().hex, lease.next_epoch(previous.epoch if previous else 0)
    lease.take(os.getpid(), epoch, job=identifier, stage=stage)
    try:
        job = submit(
            control,
            logs,
            stage,
            stage_job.worker,
            config_file,
            config.launch,
            identifier,
            epoch,
            stage_job.collective,
        )
    except BaseException:
        lease.release_guarded(job=identifier)
        raise
    # If this fails, the next start finds the agent in job.json.
    with suppress(OSError):
        _record(lease, job)
    return job


def _record(lease: Lease, job: Job) -> None:
    if job.pid is None:
        lease.take_for(f"Slurm job {job.slurm}", job.epoch, job=job.id, stage=job.stage)
    else:
        lease.take(job.pid, job.epoch, job=job.id, stage=job.stage)


def _check_same_work(job: Job, stage_job: StageJob) -> None:
    config, logs = stage_job.config, stage_job.logs
    file = job_config_file(stage_job.control, logs, job.stage)
    # Jobs of earlier versions have their configuration in the logs.
    running = load_config(file if file.exists() else logs / f"{job.stage}.yaml", recorded=True)
    section = job.stage if job.stage in ("train", "evaluate") else "sample"
    changes = differences(
        getattr(running, section).model_dump(), getattr(config, section).model_dump(), f"{section}."
    )
    if job.stage == "train":
        # Before its first step, the run directory has no config.yaml to compare with.
        changes = changes or differences(identity(running), identity(config))
    if changes:
        raise UserError(
            f"a {job.stage} job runs in {logs.parent} with another configuration: {changes[0]}; "
            "wait for it or stop it"
        )


def _in_use(control: Path, holder: dict[str, Any]) -> UserError:
    stage = holder.get("stage", "unknown stage")
    return UserError(f"{control} is in use by {holder_name(holder)} ({stage}); wait for it or stop it there")
