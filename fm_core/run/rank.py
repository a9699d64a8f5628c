"""What every rank of a job does around its work: log, signals, errors, death with its agent."""

import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fm_core.config import RunConfig, load_config
from fm_core.errors import Stopped, UserError
from fm_core.run.files import write_json
from fm_core.run.launch import CONTROL_VARIABLE, JOB_VARIABLE, LOGS_VARIABLE

PR_SET_PDEATHSIG = 1

EXIT_STOPPED = 3
EXIT_USER = 2


@dataclass
class Rank:
    """One process of a job."""

    number: int
    count: int
    local: int
    control: Path
    job: str
    _asked: bool = field(default=False)

    @property
    def first(self) -> bool:
        """Whether this rank writes the files that there are once."""
        return self.number == 0

    def stop_requested(self) -> bool:
        """Whether this process got SIGTERM or, on rank 0, the STOP file is there."""
        return self._asked or (self.first and self.control.joinpath("STOP").exists())

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: only a flag, since launchers send the signal more than once."""
        self._asked = True


def run_rank(stage: str, work: Callable[[RunConfig, Rank], None]) -> None:
    """Run the work of one rank: argv is the configuration file, the rest comes from torchrun's environment.

    A failure is written to <stage>-<rank>.error.json in the control directory, for the supervisor.
    """
    environment = os.environ
    control = Path(environment[CONTROL_VARIABLE])
    rank = Rank(
        number=int(environment["RANK"]),
        count=int(environment["WORLD_SIZE"]),
        local=int(environment["LOCAL_RANK"]),
        control=control,
        job=environment[JOB_VARIABLE],
    )
    signal.signal(signal.SIGTERM, rank.ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    _log_to(Path(environment[LOGS_VARIABLE]), stage, rank.number)
    try:
        work(load_config(sys.argv[1]), rank)
        code = 0
    except Stopped as stop:
        code = _failed(stage, rank, "stopped", str(stop), EXIT_STOPPED)
    except UserError as error:
        code = _failed(stage, rank, "user", str(error), EXIT_USER)
    except BaseException as error:
        traceback.print_exc()
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        code = _failed(stage, rank, "error", line, 1)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads and process groups of a failed rank may never end by themselves.
    os._exit(code)


def _failed(stage: str, rank: Rank, kind: str, message: str, code: int) -> int:
    record = {"job": rank.job, "rank": rank.number, "kind": kind, "message": message}
    write_json(rank.control / f"{stage}-{rank.number}.error.json", record)
    return code


def _die_with_parent() -> None:
    # A rank whose agent was killed gets SIGTERM from the kernel: it saves and ends, no orphan stays.
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _log_to(directory: Path, stage: str, number: int) -> None:
    log = os.open(directory / f"{stage}-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()
