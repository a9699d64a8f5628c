"""Exit records: how each rank of a job ended, in `<stage>-<rank>.end.json` of the control directory.

A rank without a record was killed. A rank that cannot write its record, for lack of space or descriptors,
prints it to its log. A host without access to the control directory prints its records, and the submitting
host collects them from the job's log, where each line is prefixed with the name of its host.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fm_core.errors import Outcome, UserError
from fm_core.launch.job import Job, submitted
from fm_core.storage.atomic_files import read_json, write_json

PREFIX = "fm-end "
"""Prefix of an exit record in a job's log."""
TAIL_BYTES = 65_536
"""Length of the end of a rank's log that is searched for an exit record, in bytes."""


def write_exit_record(
    control: Path, stage: str, job: str, rank: int, outcome: Outcome, message: str, epoch: int = 0
) -> None:
    """Record how a rank ended, for the supervisor; printed if the file cannot be written.

    Nothing is recorded if the directory now belongs to a later job, or to an attempt of this one with a
    higher epoch: Slurm may requeue a job while its ranks still run on a node that was cut off.
    """
    latest = None
    with suppress(OSError, UserError):
        latest = submitted(control)
    if outcome is Outcome.LEASE_LOST or (latest and (latest.id != job or latest.epoch > epoch > 0)):
        return
    record = {"job": job, "rank": rank, "kind": outcome.record, "message": message}
    if latest is None:  # written to an empty mount point: hidden once the directory is mounted again
        print_exit_record(record)
    try:
        write_json(_path(control, stage, rank), record)
    except OSError as error:
        print(f"cannot write the exit record of rank {rank} ({error})", flush=True)
        print_exit_record(record)


def read_exit_records(control: Path, job: Job) -> dict[int, dict[str, Any]]:
    """The exit records of a job by rank, in order; a rank that was killed is absent."""
    records = [read_json(path) for path in control.glob(f"{job.stage}-*.end.json")]
    own = {record["rank"]: record for record in records if record and record["job"] == job.id}
    for rank in set(range(job.processes)) - own.keys():
        if record := _printed_by(job, rank):
            own[rank] = record
    return {rank: own[rank] for rank in sorted(own)}


def stopped_at(control: Path) -> float:
    """When the last job of a control directory stopped on request; see `ended_at`."""
    job = submitted(control)
    return ended_at(control, job, Outcome.STOPPED) if job else 0.0


def ended_at(control: Path, job: Job, outcome: Outcome) -> float:
    """When the last rank of a job ended with this outcome, in seconds since 1970 by file times, or 0."""
    times = [0.0]
    for rank, record in read_exit_records(control, job).items():
        if record["kind"] == outcome.record:
            with suppress(OSError):
                times.append(_path(control, job.stage, rank).stat().st_mtime)
    return max(times)


def remove_exit_records(control: Path, stage: str, ranks: range | None = None) -> None:
    """Remove the records of earlier jobs, for these ranks or for all."""
    paths = [_path(control, stage, rank) for rank in ranks] if ranks else control.glob(f"{stage}-*.end.json")
    for path in paths:
        path.unlink(missing_ok=True)


def open_log(job: Job) -> None:
    """Write the header line of this job's part of the log."""
    with Path(job.log).open("a", encoding="utf-8") as log:
        log.write(f"{_header(job)} {', '.join(job.hosts) or f'{job.processes} processes'}\n")


def print_exit_record(record: Mapping[str, Any]) -> None:
    """Print an exit record for `collect_exit_records` on the submitting host."""
    print(f"{PREFIX}{json.dumps(dict(record))}", flush=True)


def collect_exit_records(job: Job, control: Path) -> None:
    """Copy exit records that are only in the log to the control directory."""
    for line in _lines(job):
        if record := _record_in(line, job):
            path = _path(control, job.stage, record["rank"])
            if not path.exists():
                write_json(path, {key: value for key, value in record.items() if key != "schema"})


def log_lines(job: Job) -> Iterator[str]:
    """The lines of a job's log since the job started; none if the log cannot be read."""
    with suppress(OSError):
        yield from _lines(job)


def _printed_by(job: Job, rank: int) -> dict[str, Any] | None:
    """The exit record that a rank printed to its own log because it could not write it."""
    with suppress(OSError), Path(job.log).with_name(f"{job.stage}-{rank}.log").open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in reversed(log.read().decode(errors="replace").splitlines()):
            record = _record_in(line, job)
            if record and record["rank"] == rank:
                return record
    return None


def _record_in(line: str, job: Job) -> dict[str, Any] | None:
    """The exit record of this job in a line of a log."""
    _, prefix, text = line.partition(PREFIX)
    if prefix:
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(text)
            if record["job"] == job.id:
                return {**record, "rank": int(record["rank"])}
    return None


def _path(control: Path, stage: str, rank: int) -> Path:
    return control / f"{stage}-{rank}.end.json"


def _header(job: Job) -> str:
    return f"job {job.id} of {job.stage} on"


def _lines(job: Job) -> Iterator[str]:
    """The lines of the log since the job started."""
    begun = False
    with Path(job.log).open(encoding="utf-8", errors="replace") as log:
        for line in log:
            begun = begun or line.startswith(_header(job))
            if begun:
                yield line.rstrip("\n")
