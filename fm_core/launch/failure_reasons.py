"""Why a job ended before it was complete: the exception that its exit records and lost hosts amount to."""

from collections.abc import Sequence
from pathlib import Path

from fm_core.errors import JobFailedError, Outcome, StopRequested, UnrecoverableError, UserError
from fm_core.launch.exit_records import read_exit_records
from fm_core.launch.job import Job

TAIL_LINES = 30
STOPPED = (Outcome.STOPPED, Outcome.ORPHANED)


def failure_of(job: Job, control: Path, lost: Sequence[str] = ()) -> Exception:
    """The exception for a job that ended incomplete; `lost` are messages about hosts that were lost.

    A user error or an unrecoverable one of any rank comes first; then a lost host; then killed ranks, since a
    rank that is killed leaves no record and makes the others fail or stop.
    """
    records = read_exit_records(control, job)
    for record in records.values():
        if record["kind"] == Outcome.REFUSED.record:
            return UserError(record["message"])
        if record["kind"] == Outcome.UNRECOVERABLE.record:
            return UnrecoverableError(record["message"])
    stop_file = control.joinpath("STOP").exists()
    if not records:
        if lost:
            return StopRequested(lost[0]) if stop_file else _failed(job, lost)
        return _no_exit_record(job)
    outcomes = {rank: Outcome.from_record(record["kind"]) for rank, record in records.items()}
    messages = {rank: record["message"] for rank, record in records.items()}
    failed = [
        f"{_rank_name(job, rank)}: {messages[rank]}"
        for rank, outcome in outcomes.items()
        if outcome in (Outcome.FAILED, Outcome.UNREACHABLE)
    ]
    orphaned = {
        job.host_of(rank): messages[rank] for rank, outcome in outcomes.items() if outcome is Outcome.ORPHANED
    }
    # Where a host was lost, its ranks were killed and the others could not go on.
    causes = list(lost) or [
        *(
            f"rank {rank} on {job.host_of(rank)} was killed"
            for rank in range(job.processes)
            if rank not in records
        ),
        *(f"the launcher on {host} was killed; {message}" for host, message in orphaned.items()),
    ]
    stopped = [messages[rank] for rank, outcome in outcomes.items() if outcome in STOPPED]
    if stopped and not failed and (not causes or stop_file):
        return StopRequested(stopped[0])
    causes += [] if lost else failed[:1]
    if not causes:
        return JobFailedError(
            f"{job.stage}: all ranks exited with status 0, but the stage is not complete (log: {job.log})"
        )
    return _failed(job, causes, where="" if len(job.hosts) > 1 else f" on {job.host}", log=True)


def _failed(job: Job, causes: Sequence[str], where: str = "", log: bool = False) -> JobFailedError:
    return JobFailedError(
        f"{job.stage} failed{where}: {'; '.join(causes)}" + (f" (log: {job.log})" if log else "")
    )


def _no_exit_record(job: Job) -> JobFailedError:
    lines = "\n".join(Path(job.log).read_text(errors="replace").splitlines()[-TAIL_LINES:])
    return JobFailedError(
        f"{job.stage} failed: no exit record from {_ranks_by_host(job)}: all were killed, or none started; "
        f"end of {job.log}:\n{lines}"
    )


def _ranks_by_host(job: Job) -> str:
    """Every rank with its host, e.g. "ranks 0 to 3 on node-a, rank 4 on node-b"."""
    ranks: dict[str, list[int]] = {}
    for rank in range(job.processes):
        ranks.setdefault(job.host_of(rank), []).append(rank)
    return ", ".join(
        f"rank {first} on {host}" if len(rest) == 0 else f"ranks {first} to {rest[-1]} on {host}"
        for host, (first, *rest) in ranks.items()
    )


def _rank_name(job: Job, rank: int) -> str:
    return f"rank {rank} on {job.host_of(rank)}" if len(job.hosts) > 1 else f"rank {rank}"
