"""Worker entry point: logging, signal handling, exit records, and termination with the parent agent.

`python -m fm_core.launch.worker_main STAGE MODULE:FUNCTION CONFIG` is one rank of a job, in a rank group.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType

import psutil

from fm_core.config import RunConfig, load_config
from fm_core.errors import LeaseLostError, Outcome, UserError
from fm_core.launch.exit_records import write_exit_record
from fm_core.launch.job import (
    CONTROL_VARIABLE,
    EPOCH_VARIABLE,
    JOB_VARIABLE,
    LOGS_VARIABLE,
    is_marked,
    submitted,
)
from fm_core.launch.rank_errors import outcome_and_message
from fm_core.output import drop_unwritable_output, log_to_stderr
from fm_core.run.fence import Fence, LeaseFence, Unfenced
from fm_core.run.lease import Lease
from fm_core.run.resource_limits import raise_open_file_limit
from fm_core.storage.local_paths import provide_home

PR_SET_PDEATHSIG = 1

STOP_SECONDS = 2.0
"""Interval at which rank 0 looks for a STOP file."""
ADOPTION_SECONDS = 30.0
"""How long to wait for job.json, which a supervisor writes some milliseconds after it starts the agent."""


@dataclass
class Rank:
    """One process of a job."""

    number: int
    count: int
    local: int
    control: Path
    """Control directory of the job: its handle, lock, status and STOP file."""
    job: str
    run: Path | None = None
    """The run directory; a STOP file there stops the job as well."""
    watched: bool = True
    """Whether to detect a hanging rank; false in a debugger."""
    fence: Fence = field(default_factory=Unfenced)
    """Fence of rank 0, the writer, to check before anything is committed or deleted."""
    _lost: LeaseLostError | None = field(default=None)
    _stop_signaled: bool = field(default=False)
    _looked_at: float = field(default=float("-inf"))
    _stop_file: bool = field(default=False)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the files that exist once per job."""
        return self.number == 0

    def stop_requested(self) -> bool:
        """Whether this process received SIGTERM or, on rank 0, a STOP file exists.

        Rank 0 checks every few seconds, so that a slow file server does not slow down the work. A directory
        that cannot be read counts as having no request until it is read again.

        Raises LeaseLostError in a rank that could not end itself at once because it runs in a debugger.
        """
        if self._lost:
            raise self._lost
        now = time.monotonic()
        if self.first and not self._stop_file and now - self._looked_at >= STOP_SECONDS:
            self._looked_at = now
            with suppress(OSError):
                directories = (self.control, self.run or self.control)
                self._stop_file = any(directory.joinpath("STOP").exists() for directory in directories)
        return self._stop_signaled or self._stop_file

    def request_stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler that only sets a flag, since launchers may send the signal more than once."""
        self._stop_signaled = True

    def record_loss(self, error: LeaseLostError) -> None:
        """Let the next `stop_requested` raise the error."""
        self._lost = error


Worker = Callable[[RunConfig, Rank], None]


def load_worker(entry_point: str) -> Worker:
    """Import the function of an entry point "module:function"."""
    module, _, function = entry_point.partition(":")
    return getattr(import_module(module), function)


def run_worker(stage: str, work: Worker, config_file: str) -> None:
    """Run the work of one rank and end this process; the rank group identifies it by environment variables.

    The outcome is written to <stage>-<rank>.end.json in the control directory, for the supervisor. A rank
    without that record was killed.
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
    signal.signal(signal.SIGTERM, rank.request_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_open_file_limit()
    # If its agent is killed, the rank gets SIGTERM from the kernel, so that it saves, exits and is not
    # orphaned.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if logs:
        _log_to(Path(logs), stage, rank.number)
    drop_unwritable_output()
    log_to_stderr(logging.INFO)
    faulthandler.enable()
    if not _adopted(rank):
        print(
            f"control directory {control} does not belong to this job, or the launcher has died; "
            f"rank {rank.number} exits",
            flush=True,
        )
        os._exit(1)
    code = 1
    try:
        if rank.first:
            rank.fence = LeaseFence(
                Lease(control / "lock"), rank.job, int(environment.get(EPOCH_VARIABLE, "0"))
            )
            with rank.fence.keep_alive(_exit_without_lease, wait=False):
                code = _work(stage, rank, work, config_file)
        else:
            code = _work(stage, rank, work, config_file)
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        # Threads and process groups of a failed rank may never terminate.
        os._exit(code)


def _work(stage: str, rank: Rank, work: Worker, config_file: str) -> int:
    outcome, message = Outcome.DONE, ""
    # Reserved for the exit record of a rank that has run out of descriptors.
    reserved = os.open(os.devnull, os.O_RDONLY)
    try:
        with suppress(OSError):
            rank.fence.check()
        work(load_config(config_file, recorded=True), rank)
    except BaseException as error:
        os.close(reserved)
        outcome, message = outcome_and_message(error, stage)
        if outcome is Outcome.STOPPED and not _agent_is_alive(rank):
            outcome = Outcome.ORPHANED  # the kernel sent the signal because the agent was killed
        with suppress(OSError):  # the log may be on a full disk
            if outcome in (Outcome.FAILED, Outcome.UNRECOVERABLE):
                traceback.print_exc()
            print(f"rank {rank.number} exits ({outcome.record}): {message}", flush=True)
    else:
        os.close(reserved)
    with suppress(OSError):
        write_exit_record(rank.control, stage, rank.job, rank.number, outcome, message, rank.fence.epoch)
    return outcome.exit_code


def _exit_without_lease(error: LeaseLostError) -> None:
    # Immediately, not at the next step: the main thread may be waiting for other ranks, or writing. The agent
    # ends the other ranks, as after a kill.
    print(error, flush=True)
    os._exit(Outcome.LEASE_LOST.exit_code)


def _adopted(rank: Rank) -> bool:
    """Whether job.json names this job and its agent is alive.

    If a supervisor was killed before it could write job.json, the next start cannot find this job; and
    an agent may have died before this rank asked the kernel for a signal.
    """
    deadline = time.monotonic() + ADOPTION_SECONDS
    while True:
        with suppress(OSError, UserError):  # a file server that does not answer at the moment
            job = submitted(rank.control)
            if job and job.id == rank.job:
                return _agent_is_alive(rank)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _agent_is_alive(rank: Rank) -> bool:
    return is_marked(psutil.Process(os.getppid()), rank.job)


def _log_to(directory: Path, stage: str, number: int) -> None:
    log = os.open(directory / f"{stage}-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def main(arguments: list[str]) -> None:
    """Run the rank that the command line names."""
    stage, entry_point, config_file = arguments
    provide_home()

    def work(config: RunConfig, rank: Rank) -> None:
        # Imported here, so that an import error is in the rank's log and exit record.
        load_worker(entry_point)(config, rank)

    run_worker(stage, work, config_file)


if __name__ == "__main__":
    # Imported under its own name, so that there is only one class Rank in the process.
    from fm_core.launch.worker_main import main as main_by_name

    main_by_name(sys.argv[1:])
