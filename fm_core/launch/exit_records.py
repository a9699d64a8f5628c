"""Exit records: how each rank of a job ended, in `<stage>-<rank>.end.json` of the control directory.

A rank without a record was killed. A host that does not see the control directory prints its records, and
the submitting host gathers them from the job's log, where each line follows the name of its host.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fm_core.errors import Outcome
from fm_core.launch.job import Job, submitted
from fm_core.storage.atomic_files import read_json, write_json

PREFIX = "fm-end "
"""Precedes an exit record in a job's log."""


def write_exit_record(control: Path, stage: str, job: str, rank: int, outcome: Outcome, message: str) -> None:
    """Record how a rank ended, for the supervisor, unless the directory belongs to a later job by now."""
    if outcome is Outcome.LEASE_LOST or ((latest := submitted(control)) and latest.id != job):
        return
    record = {"job": job, "rank": rank, "kind": outcome.record, "message": message}
    write_json(_path(control, stage, rank), record)


def read_exit_records(control: Path, job: Job) -> dict[int, dict[str, Any]]:
    """The exit records of a job by rank, in order; a rank that was killed is absent."""
    records = [read_json(path) for path in control.glob(f"{job.stage}-*.end.json")]
    own = [record for record in records if record and record["job"] == job.id]
    return {record["rank"]: record for record in sorted(own, key=lambda record: record["rank"])}


def remove_exit_records(control: Path, stage: str, ranks: range | None = None) -> None:
    """Remove the records that earlier jobs left, of these ranks or of all."""
    paths = [_path(control, stage, rank) for rank in ranks] if ranks else control.glob(f"{stage}-*.end.json")
    for path in paths:
        path.unlink(missing_ok=True)


def open_log(job: Job) -> None:
    """Write the line that begins this job's part of the log."""
    with Path(job.log).open("a") as log:
        log.write(f"{_header(job)} {', '.join(job.hosts) or f'{job.processes} processes'}\n")


def print_exit_record(record: Mapping[str, Any]) -> None:
    """Print an exit record for `collect_exit_records` on the submitting host."""
    print(f"{PREFIX}{json.dumps(dict(record))}", flush=True)


def collect_exit_records(job: Job, control: Path) -> None:
    """Write the exit records that are only in the log to the control directory."""
    for line in _lines(job):
        _, prefix, text = line.partition(PREFIX)
        if not prefix:
            continue
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(text)
            path = _path(control, job.stage, int(record["rank"]))
            if record["job"] == job.id and not path.exists():
                write_json(path, {key: value for key, value in record.items() if key != "schema"})


def _path(control: Path, stage: str, rank: int) -> Path:
    return control / f"{stage}-{rank}.end.json"


def _header(job: Job) -> str:
    return f"job {job.id} of {job.stage} on"


def _lines(job: Job) -> Iterator[str]:
    """The lines of the log since the job began."""
    begun = False
    with Path(job.log).open(errors="replace") as log:
        for line in log:
            begun = begun or line.startswith(_header(job))
            if begun:
                yield line.rstrip("\n")
