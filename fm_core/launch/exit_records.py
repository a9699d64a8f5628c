"""What the hosts of a job said in its log, each line behind the name of its host.

A host that does not see the control directory says there how its ranks ended.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fm_core.launch.job import Job
from fm_core.storage.atomic_files import write_json

END_WORD = "fm-end "
"""Before the record of an ended rank."""


def open_log(job: Job) -> None:
    """Begin the part of the log that is this job's."""
    with Path(job.log).open("a") as log:
        log.write(f"{_head(job)} {', '.join(job.hosts) or f'{job.processes} processes'}\n")


def print_exit_record(record: Mapping[str, Any]) -> None:
    """Say how a rank ended, for `collect_exit_records` on the submitting host."""
    print(f"{END_WORD}{json.dumps(dict(record))}", flush=True)


def collect_exit_records(job: Job, control: Path) -> None:
    """Write down how ranks ended, where that is only in the log."""
    for line in _lines(job):
        _, word, text = line.partition(END_WORD)
        if not word:
            continue
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(text)
            path = control / f"{job.stage}-{int(record['rank'])}.end.json"
            if record["job"] == job.id and not path.exists():
                write_json(path, {key: value for key, value in record.items() if key != "schema"})


def _head(job: Job) -> str:
    return f"job {job.id} of {job.stage} on"


def _lines(job: Job) -> Iterator[str]:
    ours = False
    with Path(job.log).open(errors="replace") as log:
        for line in log:
            ours = ours or line.startswith(_head(job))
            if ours:
                yield line.rstrip("\n")
