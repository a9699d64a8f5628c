"""A rank that hangs is found by the others, named, and ends the job.

The loop beats before each thing that needs the other ranks. A thread on every rank tells the others its
beats and that it lives, through the store of the process group. Where nothing has moved for
train.hang_seconds, the thread sees who is silent or behind, prints the stacks of its own process, leaves
word for the supervisor and ends it.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from fm_core.errors import Outcome
from fm_core.launch.exit_records import write_exit_record
from fm_core.launch.job import is_marked
from fm_core.launch.worker_main import Rank

SECOND_LOOK_SECONDS = 3.0
"""A live rank tells the others of itself several times in this span."""
TOLD_EVERY_SECONDS = 0.5
FIRST_STEP_BEATS = 3
FIRST_STEP_FACTOR = 3
"""The first step may take so many times longer: kernels are compiled and caches filled."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank tells of itself."""

    host: str
    pid: int
    beats: int
    ticks: int
    """Grows while its process runs at all."""
    at: str
    """What it is doing, for a person."""


class HangWatchdog:
    """One rank's beats, and its thread that looks after everybody's."""

    def __init__(self, stage: str, rank: Rank, seconds: float) -> None:
        """Begin to watch; a job in which nothing moves for `seconds` ends."""
        self._stage, self._rank, self._seconds = stage, rank, seconds
        self._beats, self._at, self._since = 0, "the start", time.monotonic()
        self._resting = False
        self._store = _store()
        threading.Thread(target=self._work, name="watch", daemon=True).start()

    def beat(self, at: str) -> None:
        """Say that this rank goes on, and with what."""
        self._beats += 1
        self._at, self._since = at, time.monotonic()

    def rest(self) -> None:
        """Watch no longer: what is left to do is not done together."""
        self._resting = True

    def _work(self) -> None:
        ticks = 0
        while not self._resting:
            ticks += 1
            self._tell(ticks)
            patience = self._seconds * (FIRST_STEP_FACTOR if self._beats <= FIRST_STEP_BEATS else 1)
            if time.monotonic() - self._since > patience:
                before = self._signs()
                for _ in range(int(SECOND_LOOK_SECONDS / TOLD_EVERY_SECONDS)):
                    time.sleep(TOLD_EVERY_SECONDS)
                    ticks += 1
                    self._tell(ticks)
                if time.monotonic() - self._since > patience:
                    self._end(before, self._signs(), patience)
            time.sleep(TOLD_EVERY_SECONDS)

    def _tell(self, ticks: int) -> None:
        facts = [socket.gethostname(), os.getpid(), self._beats, ticks, self._at]
        with suppress(Exception):
            self._store.set(f"fm/watch/{self._rank.number}", "\0".join(map(str, facts)))

    def _signs(self) -> dict[int, Heartbeat]:
        signs: dict[int, Heartbeat] = {}
        for number in range(self._rank.count):
            with suppress(Exception):
                host, pid, beats, ticks, at = self._store.get(f"fm/watch/{number}").decode().split("\0")
                signs[number] = Heartbeat(host, int(pid), int(beats), int(ticks), at)
        return signs

    def _end(self, before: dict[int, Heartbeat], now: dict[int, Heartbeat], patience: float) -> NoReturn:
        blamed, why = find_culprits(before, now)
        told = "; ".join(f"rank {number} on {now[number].host} {why}" for number in blamed)
        message = f"nothing moved for {patience:g} s: {told or why}"
        print(message, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        rank = self._rank
        write_exit_record(rank.control, self._stage, rank.job, rank.number, Outcome.FAILED, message)
        for number in blamed:
            # A stopped process would keep its agent waiting for half a minute.
            if number != self._rank.number and now[number].host == socket.gethostname():
                with suppress(psutil.Error):
                    process = psutil.Process(now[number].pid)
                    if is_marked(process, self._rank.job):
                        process.kill()
        os._exit(1)


def find_culprits(before: dict[int, Heartbeat], now: dict[int, Heartbeat]) -> tuple[list[int], str]:
    """Who holds the others up, from two looks some seconds apart, and how."""
    silent = [number for number, sign in now.items() if before.get(number) == sign]
    if silent:
        return silent, f"gives no sign of life (last at {now[silent[0]].at})"
    if not now:
        return [], "the ranks' store does not answer"
    beats = [sign.beats for sign in now.values()]
    if min(beats) == max(beats):
        at = next(iter(now.values())).at
        return [], f"all ranks wait for each other or for their devices at {at}"
    behind = [number for number, sign in now.items() if sign.beats == min(beats)]
    return behind, f"hangs at {now[behind[0]].at}"


def _store() -> Any:
    # A connection of its own: the process group's may be waiting for an answer that never comes.
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=30),
    )
