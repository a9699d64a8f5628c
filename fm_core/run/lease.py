"""Lease of a directory: a lock file that names its holder and carries a heartbeat and an epoch.

The epoch grows by one whenever another holder takes the lease: it is the fencing token by which a holder
detects that it has lost the lease. It is also stored in the guard file, which is never removed.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from fm_core.errors import LeaseLostError, UserError
from fm_core.run.process_identity import ProcessIdentity
from fm_core.storage.atomic_files import read_json, write_json
from fm_core.storage.file_lock import file_lock

HEARTBEAT_SECONDS = 10.0
"""Interval of the heartbeat."""
WATCHED_HEARTBEATS = 3
"""A holder elsewhere is considered dead if its record does not change for this many watched intervals."""
LOOK_INTERVAL_SECONDS = 1.0
"""Interval at which a start checks a holder that it watches."""
LONGEST_LOOK_SECONDS = 5.0
"""A longer gap between two checks does not count as watched, because this process may have been frozen."""
STALE_SECONDS = 120.0
"""Age of the heartbeat, by this host's clock, at which the holder in an earlier version's record is dead."""


_ENDS = "this job ends without writing anything there"


class HolderState(Enum):
    """State of a lease's holder, as far as one check can tell."""

    FREE = "nobody, or a dead process"
    HELD = "alive"
    UNDECIDED = "elsewhere: to be watched"


class Lease:
    """Exclusive right to work in a directory. If the holder dies, its record remains and is stale.

    A holder on this host is alive while its process exists, even if it is frozen and sends no heartbeat. Any
    other holder is alive while its record changes; neither host names nor clocks of hosts are compared.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self._guard = path.with_name(f".{path.name}.guard")
        self._clock, self._wall_clock = clock, wall_clock
        self._seen: dict[str, Any] | None = None
        self._seen_at = self._watched = 0.0
        self._own: dict[str, Any] | None = None

    def record(self) -> dict[str, Any] | None:
        """The record of the holder, dead or alive; None if the lease was released or never taken."""
        return read_json(self.path)

    def look(self) -> tuple[HolderState, dict[str, Any] | None]:
        """State of the holder. While it is UNDECIDED, call this again about every second."""
        record = self.record()
        if record is None:
            return HolderState.FREE, None
        process = ProcessIdentity.from_record(record)
        alive = process.alive() if process and process.here else None
        if alive is None:
            return self._watch(record), record
        return (HolderState.HELD if alive else HolderState.FREE), record

    def holder(self) -> dict[str, Any] | None:
        """The record of a live holder, or None; does not wait.

        For a holder elsewhere that was not watched long enough, the age of its heartbeat decides. This
        compares clocks of two hosts, which is acceptable for display but not for taking the lease.
        """
        state, record = self.look()
        if record is None or state is HolderState.FREE:
            return None
        recent = self._age(record) < STALE_SECONDS
        return record if state is HolderState.HELD or recent else None

    def process(self) -> psutil.Process | None:
        """The live holder if it is a process of this host; process ids of other hosts cannot be looked up."""
        record = self.record()
        process = ProcessIdentity.from_record(record) if record else None
        if process is None or not process.alive():
            return None
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(process.pid)
        return None

    def next_epoch(self, at_least: int = 0) -> int:
        """The epoch of the next holder: higher than that of the last one and than `at_least`."""
        recorded = (read_json(self.path) or {}).get("epoch", 0)
        return max(recorded, read_epoch(self._guard)[0], at_least) + 1

    def take(self, pid: int, epoch: int | None = None, **facts: Any) -> int:
        """Record a process of this host as the holder, inside `guard`; return the epoch.

        `epoch` is given if the same job is recorded again; by default it is the next one.
        """
        return self._take(ProcessIdentity.of(pid).facts(), epoch, facts)

    def take_for(self, host: str, epoch: int | None = None, **facts: Any) -> int:
        """Record a holder that is not a process of this host; it is alive while its record changes."""
        return self._take({"host": host}, epoch, facts)

    def release(self, **facts: Any) -> None:
        """Remove the lock if its record contains these facts; the epoch remains in the guard file."""
        with suppress(FileNotFoundError), self.guard(create=False):
            self.release_guarded(**facts)

    def release_guarded(self, **facts: Any) -> None:
        """`release` for a caller inside `guard`."""
        record = self.record()
        if record and facts.items() <= record.items():
            write_epoch(self._guard, record.get("epoch", 0), held=False)
            self.path.unlink()

    def check(self, **facts: Any) -> None:
        """Check that the record contains these facts; does not wait for the guard.

        Raises:
            LeaseLostError: the lease was released, or another holder has taken it.
            OSError: the lease cannot be read at the moment.
        """
        try:
            record = read_json(self.path)
        except UserError as error:
            raise OSError(str(error)) from None
        if record is None:
            self.heartbeat(**facts)
        else:
            self._own = self._checked(record, facts)

    def heartbeat(self, **facts: Any) -> None:
        """Renew the heartbeat of a lease whose record contains these facts.

        A lock file that was deleted manually is recreated.

        Raises:
            LeaseLostError: the lease was released, or another holder has taken it.
            OSError: the directory is unavailable, e.g. because its disk is not mounted.
        """
        with self.guard(create=False):
            record = self._checked(self.record() or self._removed(facts), facts)
            heartbeat = {"heartbeat": self._wall_clock(), "beats": record.get("beats", 0) + 1}
            self._own = {key: value for key, value in record.items() if key != "schema"} | heartbeat
            write_json(self.path, self._own, parents=False)

    @contextmanager
    def keep_alive(
        self, wait: bool = True, on_lost: Callable[[LeaseLostError], None] | None = None, **facts: Any
    ) -> Generator[Callable[[], None]]:
        """Renew the heartbeat from a thread during the block, even if the main thread is blocked.

        Yields a function that raises LeaseLostError once the thread has detected that the lease was lost; the
        thread calls `on_lost` at that moment. Failed reads and writes are retried.

        With `wait` false, the block does not join the thread at its end, because a process that is about to
        exit must not hang while another one holds the guard.
        """
        ended = threading.Event()
        lost: list[LeaseLostError] = []

        def renew() -> None:
            while True:
                try:
                    self.heartbeat(**facts)
                except LeaseLostError as error:
                    lost.append(error)
                    if on_lost and not ended.is_set():
                        on_lost(error)
                    return
                except (OSError, UserError):
                    pass
                if ended.wait(HEARTBEAT_SECONDS):
                    return

        def check() -> None:
            if lost:
                raise lost[0]

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield check
        finally:
            ended.set()
            if wait:
                thread.join()

    @contextmanager
    def guard(self, create: bool = True) -> Generator[None]:
        """Make checking and taking the lease atomic among all processes that share the file system.

        With `create` false, FileNotFoundError is raised if no lease was ever taken. The guard file is never
        removed, so its absence distinguishes an empty mount point from a deleted lock file.
        """
        with file_lock(self._guard, create=create):
            yield

    def _take(self, holder: Mapping[str, Any], epoch: int | None, facts: Mapping[str, Any]) -> int:
        epoch = self.next_epoch() if epoch is None else epoch
        self._own = {**holder, **facts, "epoch": epoch, "heartbeat": self._wall_clock(), "beats": 0}
        write_epoch(self._guard, epoch, held=True)
        write_json(self.path, self._own)
        return epoch

    def _removed(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record that this holder last wrote or read, if the lease was not taken or released since."""
        epoch, held = read_epoch(self._guard)
        own = facts.get("epoch", self._own.get("epoch", 0) if self._own else None)
        if own is not None and (own < epoch or not held):
            raise LeaseLostError(f"{self.path.parent} was released or taken over; {_ENDS}")
        return self._own

    def _watch(self, record: dict[str, Any]) -> HolderState:
        """State of a holder that is not a process of this host."""
        now, seen = self._clock(), self._seen
        self._watched = (
            self._watched + min(now - self._seen_at, LONGEST_LOOK_SECONDS) if record == seen else 0.0
        )
        self._seen, self._seen_at = record, now
        if seen is not None and record != seen:
            return HolderState.HELD
        if "epoch" in record:
            stale = self._watched >= WATCHED_HEARTBEATS * HEARTBEAT_SECONDS
        else:
            stale = max(self._watched, self._age(record)) >= STALE_SECONDS
        return HolderState.FREE if stale else HolderState.UNDECIDED

    def _age(self, record: Mapping[str, Any]) -> float:
        return self._wall_clock() - record["heartbeat"]

    def _checked(self, record: dict[str, Any] | None, facts: Mapping[str, Any]) -> dict[str, Any]:
        if record is None:
            raise FileNotFoundError(errno.ENOENT, "there is no lock file", str(self.path))
        if not facts.items() <= record.items():
            raise LeaseLostError(f"{self.path.parent} was taken over by {holder_name(record)}; {_ENDS}")
        return record


def waiting_message(directory: Path, record: Mapping[str, Any]) -> str:
    """Message of a start that watches a holder elsewhere."""
    seconds = WATCHED_HEARTBEATS * HEARTBEAT_SECONDS if "epoch" in record else STALE_SECONDS
    return (
        f"{directory} was last used by {holder_name(record)}: waiting up to {seconds:g} s to see whether it "
        "still sends a heartbeat"
    )


def read_epoch(guard: Path) -> tuple[int, bool]:
    """The last epoch of a lease and whether it is held, from its guard file; 0 if there is none."""
    with suppress(FileNotFoundError, ValueError):
        epoch, state = guard.read_text(encoding="utf-8").split()
        return int(epoch), state == "held"
    return 0, True


def write_epoch(guard: Path, epoch: int, held: bool) -> None:
    """Write the epoch to a guard file in place, because the file is locked."""
    guard.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(guard, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    try:
        os.pwrite(descriptor, f"{epoch:019} {'held' if held else 'free'}\n".encode(), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holder_name(record: Mapping[str, Any]) -> str:
    """Human-readable name of the holder of a lease or the agent of a job."""
    return f"process {record['pid']} on {record['host']}" if record.get("pid") else record["host"]
