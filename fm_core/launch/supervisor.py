"""Watching a job to its end: attach or submit, report, restart, cancel, judge.

A job that fails is started again, a limited number of times in a row and after growing pauses; what it has
finished for good meanwhile begins the row anew. Each restart is a line of restarts.jsonl. A job that the user
must mend, that was asked to stop or that gave up is not.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fm_core.config import RunConfig, dump_yaml, load_config
from fm_core.errors import (
    JobFailedError,
    Outcome,
    StopRequested,
    UnreachableError,
    UnrecoverableError,
    UserError,
)
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
from fm_core.run.directory import differences
from fm_core.run.lease import Lease
from fm_core.run.progress import Observer, Progress
from fm_core.run.status import progress_of, read_status
from fm_core.storage.atomic_files import append_line, read_json, write_text

TAIL_LINES = 30
PAUSE_STEP_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 300.0
STOPPED = (Outcome.STOPPED, Outcome.ORPHANED)


@dataclass(frozen=True)
class StageJob:
    """What is to be done as a job, where, and how one sees that it is done."""

    control: Path
    """Directory of the job: its handle, lock, status and STOP file."""
    logs: Path
    stage: str
    module: str
    """`python -m module` is a rank of it."""
    config: RunConfig
    complete: Callable[[], bool]
    """Success is what this says after the last process ended; exit codes are not believed."""
    meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext
    """Opened once a job is submitted or attached to, and closed when all is over, restarts included."""
    lasting: Callable[[], int] = lambda: 0
    """How much is done for good, in any unit: a failure after more than ever before is the first of a row."""
    submitted: Callable[[], None] = lambda: None
    """Called when a job was submitted, not when one that runs is attached to."""


def supervise(duty: StageJob, observe: Observer) -> None:
    """Run a duty as a job until it is complete.

    A job that runs there already is attached to, never doubled. A job that failed is started again, at most
    launch.restarts times in a row. Any exception in here, a signal's included, cancels the job first.

    Raises:
        StopRequested: the ranks ended on request.
        UserError: the ranks refused their configuration, or nothing could be submitted.
        UnrecoverableError: the ranks reported that a restart would not help.
        JobFailedError: anything else, with what is known.
    """
    control, stage, launch = duty.control, duty.stage, duty.config.launch
    with ExitStack() as beside:
        job: Job | None = None
        restart = lasting = 0
        while True:
            try:
                first, job = job is None, _attach_or_submit(duty)
                return _watch(duty, job, observe, beside if first else None)
            except (JobFailedError, UnreachableError) as failure:
                if (reached := duty.lasting()) > lasting:
                    restart, lasting = 0, reached
                if restart == launch.restarts or job is None:
                    raise
                pause = min(launch.restart_seconds * 2**restart, LONGEST_PAUSE_SECONDS)
                facts = {
                    "stage": stage,
                    "restart": restart + 1,
                    "of": launch.restarts,
                    "pause_seconds": pause,
                }
                failed = {"failed": time.time(), "because": str(failure)}
                append_line(duty.logs / "restarts.jsonl", {**facts, **failed})
                why = str(failure).splitlines()[0]
                word = f"restart {restart + 1} of {launch.restarts} in {pause:g} s: {why}"
                observe(_standing(control, stage, word))
                _pause(pause, control, duty.logs.parent)
                restart += 1


def _watch(duty: StageJob, job: Job, observe: Observer, beside: ExitStack | None) -> None:
    """One job, from its submission, or from where it is, to its end."""
    control = duty.control
    lost: list[str] = []
    try:
        if beside:
            beside.enter_context(duty.meanwhile())
        while (state := poll(job)).alive:
            status = read_status(control)
            if state.word:
                observe(Progress(duty.stage, 0, 1, "jobs", state.word))
            elif status and status.get("job") == job.id:
                observe(progress_of(status))
            time.sleep(POLL_SECONDS[job.kind])
    except BaseException:
        cancel(job, control)
        raise
    finally:
        lost += collect(job, control)
        Lease(control / "lock").release(job=job.id)
    if not duty.complete():
        # Slurm's choice of hosts was written down after the job had begun.
        raise _failure_of(submitted(control) or job, control, lost)


def _attach_or_submit(duty: StageJob) -> Job:
    control, logs, stage, config = duty.control, duty.logs, duty.stage, duty.config
    control.mkdir(parents=True, exist_ok=True)
    lease = Lease(control / "lock")
    with lease.guard():
        previous = submitted(control)
        if previous and alive(previous):
            _same_work(previous, logs, config)
            # Whoever submitted it may have been killed before it took the lease.
            _take(lease, previous)
            return previous
        # What Slurm says of its job is final; a lease of another kind may be of a host that is out of sight.
        over = [previous.id] if previous and previous.kind == "slurm" else []
        holder = lease.holder()
        if holder and holder.get("job") not in over:
            raise UserError(f"{control} is in use by {_described(holder)}; wait for it or stop it there")
        if previous:
            # The agent is dead; ranks it left behind must be gone before new ones start.
            cleanup(previous)
        config_file = logs / f"{stage}.yaml"
        write_text(config_file, dump_yaml(config))
        job = submit(control, logs, stage, duty.module, config_file, config.launch)
        _take(lease, job)
        duty.submitted()
        return job


def _standing(control: Path, stage: str, message: str) -> Progress:
    status = read_status(control)
    last = progress_of(status) if status and status["stage"] == stage else Progress(stage, 0, 1, "jobs")
    return replace(last, message=message, rate=None)


def _pause(seconds: float, *places: Path) -> None:
    """Wait, however short; a STOP file in one of these places ends the waiting."""
    deadline = time.monotonic() + seconds
    while True:
        if any(place.joinpath("STOP").exists() for place in places):
            raise StopRequested("stopped before a restart; run it again to continue")
        if time.monotonic() >= deadline:
            return
        time.sleep(min(PAUSE_STEP_SECONDS, seconds))


def _take(lease: Lease, job: Job) -> None:
    if job.pid is None:
        lease.take_for(f"Slurm job {job.slurm}", job=job.id, stage=job.stage)
    else:
        lease.take(job.pid, job=job.id, stage=job.stage)


def _same_work(job: Job, logs: Path, config: RunConfig) -> None:
    running = load_config(logs / f"{job.stage}.yaml")
    section = job.stage if job.stage in ("train", "evaluate") else "sample"
    found = differences(getattr(running, section).model_dump(), getattr(config, section).model_dump())
    if found:
        raise UserError(
            f"a {job.stage} job runs in {logs.parent} with another configuration: {section}.{found[0]}; "
            "wait for it or stop it"
        )


def _failure_of(job: Job, control: Path, lost: Sequence[str] = ()) -> Exception:
    ends = _ends(job, control)
    for end in ends.values():
        if end["kind"] == Outcome.REFUSED.record:
            return UserError(end["message"])
        if end["kind"] == Outcome.UNRECOVERABLE.record:
            return UnrecoverableError(end["message"])
    if not ends and lost:
        stopped = control.joinpath("STOP").exists()
        return StopRequested(lost[0]) if stopped else JobFailedError(f"{job.stage} failed: {'; '.join(lost)}")
    if not ends:
        lines = "\n".join(Path(job.log).read_text(errors="replace").splitlines()[-TAIL_LINES:])
        return JobFailedError(
            f"{job.stage} ended without a word from {_all_of(job)}: all were killed, or none began; "
            f"end of {job.log}:\n{lines}"
        )
    # A rank that is killed leaves no word; the others then fail, or are stopped, because of it.
    told = [
        f"rank {rank} on {job.host_of(rank)} was killed" for rank in range(job.processes) if rank not in ends
    ]
    failed = [
        f"{_named(job, rank)}: {end['message']}"
        for rank, end in ends.items()
        if Outcome.from_record(end["kind"]) in (Outcome.FAILED, Outcome.UNREACHABLE)
    ]
    orphaned = {
        job.host_of(rank): end["message"]
        for rank, end in ends.items()
        if end["kind"] == Outcome.ORPHANED.record
    }
    told += [f"the launcher on {host} was killed; {message}" for host, message in orphaned.items()]
    # Where a host was lost, its ranks were killed and the others could not go on.
    told = list(lost) or told
    stopped = [end["message"] for end in ends.values() if Outcome.from_record(end["kind"]) in STOPPED]
    if stopped and not failed and (not told or control.joinpath("STOP").exists()):
        return StopRequested(stopped[0])
    told += [] if lost else failed[:1]
    if not told:
        return JobFailedError(
            f"{job.stage}: every process ended well and yet it is not complete (log: {job.log})"
        )
    where = "" if len(job.hosts) > 1 else f" on {job.host}"
    return JobFailedError(f"{job.stage} failed{where}: {'; '.join(told)} (log: {job.log})")


def _all_of(job: Job) -> str:
    """Every rank with its host."""
    ranks: dict[str, list[int]] = {}
    for rank in range(job.processes):
        ranks.setdefault(job.host_of(rank), []).append(rank)
    return ", ".join(
        f"rank {first} on {host}" if len(rest) == 0 else f"ranks {first} to {rest[-1]} on {host}"
        for host, (first, *rest) in ranks.items()
    )


def _named(job: Job, rank: int) -> str:
    return f"rank {rank} on {job.host_of(rank)}" if len(job.hosts) > 1 else f"rank {rank}"


def _ends(job: Job, control: Path) -> dict[int, dict[str, Any]]:
    """How each rank ended, by number; a rank that was killed is absent."""
    records = [read_json(path) for path in control.glob(f"{job.stage}-*.end.json")]
    ours = [record for record in records if record and record["job"] == job.id]
    return {record["rank"]: record for record in sorted(ours, key=lambda record: record["rank"])}


def _described(holder: dict[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if "pid" in holder else holder["host"]
    return f"{who} ({holder.get('stage', 'unknown stage')})"
