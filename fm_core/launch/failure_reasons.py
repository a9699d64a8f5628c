"""Failure reasons: derives the exception for an incomplete job from its exit records and lost hosts."""

from collections.abc import Sequence
from pathlib import Path

from fm_core.errors import JobFailedError, Outcome, StopRequested, UnrecoverableError, UserError
from fm_core.launch.exit_records import log_lines, read_exit_records
from fm_core.launch.job import Job
from fm_core.run.stop_file import pending_request, was_stopped

TAIL_LINES = 30
STOPPED = (Outcome.STOPPED, Outcome.ORPHANED)
TRACEBACK = "Traceback (most recent call last):"
EXPECTED_AGENT_ERRORS = ("ChildFailedError", "SignalException")
"""Last line of torchrun's agent when a rank has failed, or on SIGTERM."""


def failure_of(job: Job, control: Path, lost: Sequence[str] = (), oom_kills: int = 0) -> Exception:
    """The exception for a job that ended incomplete.

    `lost` are messages about hosts that were lost; `oom_kills` is how many processes the kernel of this host
    killed for lack of memory while the job ran.

    A user error or an unrecoverable one of any rank comes first; then a lost host; then killed ranks, since a
    rank that is killed leaves no record and makes the others fail or stop.
    """
    records = read_exit_records(control, job)
    for record in records.values():
        if record["kind"] == Outcome.REFUSED.record:
            return UserError(record["message"])
        if record["kind"] == Outcome.UNRECOVERABLE.record:
            return UnrecoverableError(record["message"])
    stop_file = was_stopped(control) or pending_request(Path(job.log).parent.parent) is not None
    stop_file = stop_file or control.joinpath(f"{job.id}.stopped").exists()  # of ssh_tunnel.sh
    hint = _memory_hint(oom_kills)
    if not records:
        if lost:
            return StopRequested(lost[0]) if stop_file else _failed(job, lost)
        return _no_exit_record(job, hint)
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
    # If a host was lost, its ranks were killed and the others could not continue.
    causes = list(lost) or [
        *(
            f"rank {rank} on {job.host_of(rank)} was killed{hint}"
            for rank in range(job.processes)
            if rank not in records
        ),
        *(f"the launcher on {host} was killed; {message}" for host, message in orphaned.items()),
    ]
    stopped = [messages[rank] for rank, outcome in outcomes.items() if outcome in STOPPED]
    if stopped and not failed and not causes and not stop_file and (error := _agent_error(job)):
        causes = [f"the launcher on {job.host} failed ({error}); {stopped[0]}"]
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


def _memory_hint(oom_kills: int) -> str:
    if not oom_kills:
        return ""
    processes = "a process" if oom_kills == 1 else f"{oom_kills} processes"
    return f" (out of memory: the kernel killed {processes} of this host meanwhile)"


def _agent_error(job: Job) -> str | None:
    """The error that ended the job's agent, which then stopped its ranks; None if it exited normally."""
    last, inside = None, False
    for line in log_lines(job):
        if line.startswith(TRACEBACK):
            inside = True
        elif inside and line[:1].strip():
            last, inside = line, False
    return None if last is None or any(name in last for name in EXPECTED_AGENT_ERRORS) else last


def _no_exit_record(job: Job, hint: str) -> JobFailedError:
    try:
        text = Path(job.log).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        text = f"(it cannot be read: {error})"
    lines = "\n".join(text.splitlines()[-TAIL_LINES:])
    return JobFailedError(
        f"{job.stage} failed: no exit record from {_ranks_by_host(job)}: "
        f"all were killed, or none started{hint}; "
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
