"""Hang watchdog: detects the rank that hangs, names it in the exit record, and ends the job.

The loop calls `heartbeat` before every collective operation, and `progress` during work that one rank does
while the others wait, such as writing a checkpoint. A thread on every rank publishes both through the store
of the process group. If no rank makes progress for train.hang_seconds, the thread determines which ranks are
silent or behind, prints the stacks of its own process, writes an exit record for the supervisor, and exits. A
single operation on a file during a save may take longer (SAVE_FACTOR).
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

CONFIRM_SECONDS = 3.0
"""Time between the two readings of all heartbeats; a live rank publishes several in this time."""
PUBLISH_SECONDS = 0.5
FIRST_STEP_BEATS = 3
FIRST_STEP_FACTOR = 3
"""The first step may take this many times longer, because kernels are compiled and caches filled."""
SAVE_FACTOR = 6
"""The same for one fsync or one write of a few megabytes in a save, because a file server may be unavailable.
"""


@dataclass(frozen=True)
class Heartbeat:
    """State that a rank publishes."""

    host: str
    pid: int
    beats: int
    ticks: int
    """Incremented as long as the process runs."""
    at: str
    """What the rank is doing, for messages."""
    moves: int = 0
    """Incremented by every heartbeat, and by work that this rank does while the others wait."""


class HangWatchdog:
    """One rank's heartbeat, and the thread that watches the heartbeats of all ranks."""

    def __init__(self, stage: str, rank: Rank, seconds: float) -> None:
        """Start watching; if the job makes no progress for `seconds`, it is ended."""
        self._stage, self._rank, self._seconds = stage, rank, seconds
        self._beats, self._moves, self._at, self._since = 0, 0, "the start", time.monotonic()
        self._patience = 1
        self._moves_seen: dict[int, int] = {}
        self._stopped = False
        self._store = _store()
        threading.Thread(target=self._work, name="hang-watchdog", daemon=True).start()

    def heartbeat(self, at: str, patience: int = 1) -> None:
        """Record progress of this rank; `at` describes what it does next, for messages.

        All ranks must call it equally often. `patience` multiplies the seconds that this may take.
        """
        self._beats += 1
        self._patience = patience
        self.progress(at)

    def progress(self, at: str) -> None:
        """Record progress in work that only this rank does while the others wait."""
        self._moves += 1
        self._moves_seen = {}
        self._at, self._since = at, time.monotonic()

    def stop(self) -> None:
        """Stop watching; the remaining work needs no other rank."""
        self._stopped = True

    def _work(self) -> None:
        ticks = 0
        while not self._stopped:
            ticks += 1
            self._publish(ticks)
            limit = self._limit()
            if time.monotonic() - self._since > limit / 2 and self._others_moved():
                self._since = time.monotonic()
            if time.monotonic() - self._since > limit:
                before = self._heartbeats()
                for _ in range(int(CONFIRM_SECONDS / PUBLISH_SECONDS)):
                    time.sleep(PUBLISH_SECONDS)
                    ticks += 1
                    self._publish(ticks)
                if time.monotonic() - self._since > limit and not self._others_moved():
                    self._end(before, self._heartbeats(), limit)
            time.sleep(PUBLISH_SECONDS)

    def _limit(self) -> float:
        first = FIRST_STEP_FACTOR if self._beats <= FIRST_STEP_BEATS else 1
        return self._seconds * max(first, self._patience)

    def _others_moved(self) -> bool:
        """Whether another rank has made progress since the last call; false at the start of a wait."""
        moves = {number: heartbeat.moves for number, heartbeat in self._heartbeats().items()}
        moved = any(moves[number] != self._moves_seen.get(number, moves[number]) for number in moves)
        self._moves_seen = moves
        return moved

    def _publish(self, ticks: int) -> None:
        facts = [socket.gethostname(), os.getpid(), self._beats, ticks, self._at, self._moves]
        with suppress(Exception):
            self._store.set(f"fm/watch/{self._rank.number}", "\0".join(map(str, facts)))

    def _heartbeats(self) -> dict[int, Heartbeat]:
        heartbeats: dict[int, Heartbeat] = {}
        for number in range(self._rank.count):
            with suppress(Exception):
                facts = self._store.get(f"fm/watch/{number}").decode().split("\0")
                host, pid, beats, ticks, at, moves = facts
                heartbeats[number] = Heartbeat(host, int(pid), int(beats), int(ticks), at, int(moves))
        return heartbeats

    def _end(self, before: dict[int, Heartbeat], now: dict[int, Heartbeat], limit: float) -> NoReturn:
        culprits, reason = find_culprits(before, now)
        details = "; ".join(f"rank {number} on {now[number].host} {reason}" for number in culprits)
        message = f"no progress for {limit:g} s: {details or reason}"
        print(message, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        rank = self._rank
        write_exit_record(rank.control, self._stage, rank.job, rank.number, Outcome.FAILED, message)
        for number in culprits:
            # A stopped process would delay its agent by half a minute.
            if number != self._rank.number and now[number].host == socket.gethostname():
                with suppress(psutil.Error):
                    process = psutil.Process(now[number].pid)
                    if is_marked(process, self._rank.job):
                        process.kill()
        os._exit(1)


def find_culprits(before: dict[int, Heartbeat], now: dict[int, Heartbeat]) -> tuple[list[int], str]:
    """Ranks that block the others, and the reason, from two readings of all heartbeats seconds apart."""
    silent = [number for number, heartbeat in now.items() if before.get(number) == heartbeat]
    if silent:
        return silent, f"sends no heartbeat (last at {now[silent[0]].at})"
    if not now:
        return [], "the ranks' store does not answer"
    beats = [heartbeat.beats for heartbeat in now.values()]
    if min(beats) == max(beats):
        at = min((heartbeat.at for heartbeat in now.values()), key=lambda at: at.startswith("waiting for"))
        return [], f"all ranks wait for each other or for their devices at {at}"
    behind = [number for number, heartbeat in now.items() if heartbeat.beats == min(beats)]
    return behind, f"hangs at {now[behind[0]].at}"


def _store() -> Any:
    # A separate connection, because the process group's may be waiting for a reply that never comes.
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=30),
    )
