"""What every rank of a job does around its work: log, signals, errors, death with its agent."""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from fm_core.config import RunConfig, load_config
from fm_core.errors import Outcome, UserError, outcome_of
from fm_core.launch.job import CONTROL_VARIABLE, JOB_VARIABLE, LOGS_VARIABLE, is_marked, submitted
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import write_json

PR_SET_PDEATHSIG = 1

HEARTBEAT_SECONDS = 10.0
ADOPTION_SECONDS = 30.0
"""A supervisor writes job.json some milliseconds after it started the agent."""


@dataclass
class Rank:
    """One process of a job."""

    number: int
    count: int
    local: int
    control: Path
    """Directory of the job: its handle, lock, status and STOP file."""
    job: str
    run: Path | None = None
    """The run directory, where a STOP file is obeyed as well."""
    _asked: bool = field(default=False)

    @property
    def first(self) -> bool:
        """Whether this rank writes the files that there are once."""
        return self.number == 0

    def stop_requested(self) -> bool:
        """Whether this process got SIGTERM or, on rank 0, the STOP file is there."""
        places = (self.control, self.run or self.control)
        return self._asked or (self.first and any(place.joinpath("STOP").exists() for place in places))

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: only a flag, since launchers send the signal more than once."""
        self._asked = True


def run_worker(stage: str, work: Callable[[RunConfig, Rank], None]) -> None:
    """Run the work of one rank: argv is the configuration file, the rest comes from torchrun's environment.

    How it ended is written to <stage>-<rank>.end.json in the control directory, for the supervisor: a
    rank that left no such file was killed.
    """
    environment = os.environ
    control, logs = Path(environment[CONTROL_VARIABLE]), environment[LOGS_VARIABLE]
    rank = Rank(
        number=int(environment["RANK"]),
        count=int(environment["WORLD_SIZE"]),
        local=int(environment["LOCAL_RANK"]),
        control=control,
        job=environment[JOB_VARIABLE],
        run=Path(logs).parent if logs else None,
    )
    signal.signal(signal.SIGTERM, rank.ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A rank whose agent was killed gets SIGTERM from the kernel: it saves and ends, no orphan stays.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if logs:
        _log_to(Path(logs), stage, rank.number)
    faulthandler.enable()
    if not _adopted(rank):
        print(
            f"{control} knows nothing of this job, or its agent is dead; rank {rank.number} ends", flush=True
        )
        os._exit(1)
    if rank.first:
        threading.Thread(target=_heartbeat, args=(Lease(control / "lock"), rank.job), daemon=True).start()
    code = 1
    try:
        code = _work(stage, rank, work)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # Threads and process groups of a failed rank may never end by themselves.
        os._exit(code)


def _work(stage: str, rank: Rank, work: Callable[[RunConfig, Rank], None]) -> int:
    outcome, message = Outcome.DONE, ""
    try:
        work(load_config(sys.argv[1]), rank)
    except BaseException as error:
        outcome = outcome_of(error)
        if outcome is Outcome.STOPPED and not _agent_is_there(rank):
            outcome = Outcome.ORPHANED  # the kernel asked, because the agent was killed
        message = str(error)
        if outcome is Outcome.FAILED:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}".splitlines()[0]
    write_exit_record(stage, rank, outcome, message)
    return outcome.exit_code


def write_exit_record(stage: str, rank: Rank, outcome: Outcome, message: str) -> None:
    """Record how a rank ended, for the supervisor."""
    record = {"job": rank.job, "rank": rank.number, "kind": outcome.record, "message": message}
    write_json(rank.control / f"{stage}-{rank.number}.end.json", record)


def _adopted(rank: Rank) -> bool:
    """Whether job.json names this job and its agent lives.

    Where a supervisor was killed before it could write job.json, the next start knows nothing of this
    job; and an agent may have died before this rank asked the kernel to be told.
    """
    deadline = time.monotonic() + ADOPTION_SECONDS
    while True:
        job = submitted(rank.control)
        if job and job.id == rank.job:
            return _agent_is_there(rank)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _agent_is_there(rank: Rank) -> bool:
    return is_marked(psutil.Process(os.getppid()), rank.job)


def _heartbeat(lease: Lease, job: str) -> None:
    while True:
        with suppress(OSError, UserError):
            lease.beat(job=job)
        time.sleep(HEARTBEAT_SECONDS)


def _log_to(directory: Path, stage: str, number: int) -> None:
    log = os.open(directory / f"{stage}-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
