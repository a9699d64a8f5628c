"""Lease of a directory: a lock file that names its holder and carries a heartbeat."""

import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from fm_core.errors import UserError
from fm_core.storage.atomic_files import read_json, write_json
from fm_core.storage.file_lock import file_lock

STALE_SECONDS = 120.0
"""A holder on another host counts as dead after this long without a heartbeat."""
HEARTBEAT_SECONDS = 10.0
"""Interval of the heartbeat that readers on other hosts rely on."""


class Lease:
    """Who may work in a directory. The record stays behind when its holder dies; then it is stale."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def holder(self) -> dict[str, Any] | None:
        """The record of a live holder, or None when the directory is free."""
        record = read_json(self.path)
        return record if record and _alive(record) else None

    def process(self) -> psutil.Process | None:
        """The live holder, if it is a process of this host; process ids of other hosts mean nothing here."""
        record = self.holder()
        if record is None or record["host"] != socket.gethostname():
            return None
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(record["pid"])
        return None

    def take(self, pid: int, **facts: Any) -> None:
        """Record a process of this host as the holder; call it inside `guard`."""
        record = {"host": socket.gethostname(), "pid": pid, "created": psutil.Process(pid).create_time()}
        write_json(self.path, {**record, **facts, "heartbeat": time.time()})

    def take_for(self, host: str, **facts: Any) -> None:
        """Record a holder that is not a process of this host; it is alive while its heartbeat is recent."""
        write_json(self.path, {"host": host, **facts, "heartbeat": time.time()})

    def release(self, **facts: Any) -> None:
        """Remove the lock if its record contains these facts."""
        with self.guard():
            record = read_json(self.path)
            if record and facts.items() <= record.items():
                self.path.unlink()

    def heartbeat(self, **facts: Any) -> None:
        """Renew the heartbeat if the record contains these facts; readers on other hosts rely on it."""
        with self.guard():
            record = read_json(self.path)
            if record and facts.items() <= record.items():
                record.pop("schema")
                write_json(self.path, {**record, "heartbeat": time.time()})

    @contextmanager
    def keep_alive(self, wait: bool = True, **facts: Any) -> Generator[None]:
        """Renew the heartbeat from a thread inside the block, however long the main thread is blocked.

        Without `wait` the block does not wait for that thread at its end: a process that is about to exit
        must not hang because another one holds the guard.
        """
        ended = threading.Event()

        def renew() -> None:
            while True:
                with suppress(OSError, UserError):
                    self.heartbeat(**facts)
                if ended.wait(HEARTBEAT_SECONDS):
                    return

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            if wait:
                thread.join()

    @contextmanager
    def guard(self) -> Generator[None]:
        """Make checking and taking the lease atomic among all processes that share the file system."""
        with file_lock(self.path.with_name(f".{self.path.name}.guard")):
            yield


def process_is(pid: int, created: float) -> bool:
    """Whether that process, and not a later one with the same id, is alive on this host."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _alive(record: dict[str, Any]) -> bool:
    if record["host"] == socket.gethostname():
        return process_is(record["pid"], record["created"])
    return time.time() - record["heartbeat"] < STALE_SECONDS
