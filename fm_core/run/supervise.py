"""Watching a job to its end: attach or submit, report, cancel, judge."""

import time
from collections.abc import Callable
from pathlib import Path

from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import Stopped, UserError
from fm_core.run.files import read_json, write_text
from fm_core.run.launch import Job, alive, cancel, processes_of, submit, submitted
from fm_core.run.lease import Lease
from fm_core.run.progress import Observer
from fm_core.run.status import progress_of, read_status

POLL_SECONDS = 0.5
TAIL_LINES = 30


def supervise(
    control: Path,
    logs: Path,
    stage: str,
    module: str,
    config: RunConfig,
    complete: Callable[[], bool],
    observe: Observer,
) -> None:
    """Run `python -m module` as a job in a control directory until it is complete.

    A job that runs there already is attached to, never doubled. Success is what `complete` says
    after the last process ended; exit codes are not believed. Raises Stopped when the ranks ended on
    request, UserError when they refused, RuntimeError with the end of the log otherwise. Any
    exception in here, a signal's included, cancels the job first.
    """
    job = _attach_or_submit(control, logs, stage, module, config)
    try:
        while alive(job):
            status = read_status(control)
            if status and status.get("job") == job.id:
                observe(progress_of(status))
            time.sleep(POLL_SECONDS)
        _wait_for_orphans(job)
    except BaseException:
        cancel(job, control)
        raise
    if not complete():
        raise _verdict(job, control)


def _attach_or_submit(control: Path, logs: Path, stage: str, module: str, config: RunConfig) -> Job:
    control.mkdir(parents=True, exist_ok=True)
    lease = Lease(control / "lock")
    with lease.guard():
        previous = submitted(control)
        if lease.holder() and previous and alive(previous):
            return previous
        if lease.holder():
            raise UserError(f"{control} is in use by {_describe(lease)}; wait for it or stop it there")
        if previous:
            # The agent is dead; ranks it left behind must be gone before new ones start.
            cancel(previous, control)
        config_file = logs / f"{stage}.yaml"
        write_text(config_file, dump_yaml(config))
        job = submit(control, logs, stage, module, config_file, config.launch)
        lease.take(job.pid, job=job.id, stage=stage)
        return job


def _wait_for_orphans(job: Job) -> None:
    deadline = time.monotonic() + 30
    while processes_of(job) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in processes_of(job):
        process.kill()


def _verdict(job: Job, control: Path) -> Exception:
    errors = [read_json(path) for path in sorted(control.glob(f"{job.stage}-*.error.json"))]
    ours = [error for error in errors if error and error["job"] == job.id]
    for error in ours:
        if error["kind"] == "user":
            return UserError(error["message"])
    for error in ours:
        if error["kind"] == "error":
            where = f"rank {error['rank']} on {job.host}"
            return RuntimeError(f"{job.stage} failed: {where}: {error['message']} (log: {job.log})")
    for error in ours:
        if error["kind"] == "stopped":
            return Stopped(error["message"])
    tail = Path(job.log).read_text(errors="replace").splitlines()[-TAIL_LINES:]
    lines = "\n".join(tail)
    return RuntimeError(
        f"{job.stage} ended without finishing and without a word from its ranks; end of {job.log}:\n{lines}"
    )


def _describe(lease: Lease) -> str:
    holder = lease.holder() or {}
    return f"process {holder.get('pid')} on {holder.get('host')} ({holder.get('stage', 'unknown stage')})"
