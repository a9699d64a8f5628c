"""The lock of a run directory: a lease that names its holder and beats."""

import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from fm_core.storage.atomic_files import read_json, write_json
from fm_core.storage.file_lock import file_lock

STALE_SECONDS = 120.0
"""A holder on another host counts as gone when its heart has not beaten for this long."""


class Lease:
    """Who may work in a directory. The record stays behind when its holder dies; then it is stale."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def holder(self) -> dict[str, Any] | None:
        """The record of a live holder, or None when the directory is free."""
        record = read_json(self.path)
        return record if record and _alive(record) else None

    def process(self) -> psutil.Process | None:
        """The live holder, if it is a process of this host; numbers of other hosts mean nothing here."""
        record = self.holder()
        if record is None or record["host"] != socket.gethostname():
            return None
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(record["pid"])
        return None

    def take(self, pid: int, **facts: Any) -> None:
        """Write a process of this host down as the holder; call it inside `guard`."""
        record = {"host": socket.gethostname(), "pid": pid, "created": psutil.Process(pid).create_time()}
        write_json(self.path, {**record, **facts, "heartbeat": time.time()})

    def take_for(self, host: str, **facts: Any) -> None:
        """Write down a holder that is no process of this host; it lives while it beats."""
        write_json(self.path, {"host": host, **facts, "heartbeat": time.time()})

    def release(self, **facts: Any) -> None:
        """Give the directory free, if the record says these facts of its holder."""
        with self.guard():
            record = read_json(self.path)
            if record and facts.items() <= record.items():
                self.path.unlink()

    def beat(self, **facts: Any) -> None:
        """Say that the holder lives, if the record says these facts of it; for readers on other hosts."""
        with self.guard():
            record = read_json(self.path)
            if record and facts.items() <= record.items():
                record.pop("schema")
                write_json(self.path, {**record, "heartbeat": time.time()})

    @contextmanager
    def guard(self) -> Generator[None]:
        """Make looking and taking one act among all processes that share the file system."""
        with file_lock(self.path.with_name(f".{self.path.name}.guard")):
            yield


def process_is(pid: int, created: float) -> bool:
    """Whether that very process (not a later one with its number) is alive on this host."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _alive(record: dict[str, Any]) -> bool:
    if record["host"] == socket.gethostname():
        return process_is(record["pid"], record["created"])
    return time.time() - record["heartbeat"] < STALE_SECONDS
