"""Cached results of one experiment: a directory of parts that are either complete or ignored.

A part is <tensors>.safetensors and <part>.json, written last, which names the tensors' SHA-256 and the recipe
they were made by. Whatever is cut short leaves no record and is made again.
"""

import os
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file, save
from torch import Tensor

from fm_core.errors import StopRequested, UserError
from fm_core.run.directory import differences
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import read_json, write_bytes, write_json
from fm_core.storage.hashing import sha256_bytes

HEARTBEAT_SECONDS = 15.0
"""A process that works in a directory says so this often, for readers on other hosts."""


@dataclass(frozen=True)
class CachedPart:
    """A finished part."""

    record: dict[str, Any]
    tensors_sha256: str


class ArtifactCache:
    """The directory with the results of one experiment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, part: str, tensors: str) -> CachedPart | None:
        """A part, if it is there and its tensors are those that were written."""
        record = read_json(self.directory / f"{part}.json")
        if record is None:
            return None
        try:
            content = self._tensors(tensors).read_bytes()
        except FileNotFoundError:
            return None
        digest = sha256_bytes(content)
        return CachedPart(record, digest) if digest == record.get("tensors_sha256") else None

    def write(
        self, part: str, tensors: str, record: Mapping[str, Any], content: Mapping[str, Tensor]
    ) -> CachedPart:
        """Write a part: its tensors, then its record."""
        data = save({name: value.detach().contiguous() for name, value in content.items()})
        digest = sha256_bytes(data)
        write_bytes(self._tensors(tensors), data)
        write_json(self.directory / f"{part}.json", {**record, "tensors_sha256": digest})
        return CachedPart({**record, "tensors_sha256": digest}, digest)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a part that `read` or `write` has returned."""
        return load_file(self._tensors(name))

    def refuse_another(self, part: str, recipe: Mapping[str, Any]) -> None:
        """Refuse an experiment whose part was made with another recipe.

        Raises:
            UserError: naming each difference.
        """
        record = read_json(self.directory / f"{part}.json")
        found = differences(record["recipe"], dict(recipe)) if record else []
        if found:
            raise UserError(
                f"{self.directory} has another experiment: {'; '.join(found)}; choose another run.name or "
                "experiment name"
            )

    @property
    def failure(self) -> Path:
        """Why the last attempt failed; there only if it did."""
        return self.directory / "failure.json"

    def _tensors(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


@contextmanager
def exclusive_lock(directory: Path) -> Generator[Callable[[], None]]:
    """Hold the lease of a directory; yields a function to call between pieces of work.

    That function raises StopRequested once there is a STOP file in the directory or in the run directory
    above it. A STOP file from before belongs to an earlier start and is removed. A thread renews the lease
    however long it is between two calls.

    Raises:
        UserError: another process works there.
    """
    lease = Lease(directory / "lock")
    me = {"host": socket.gethostname(), "pid": os.getpid(), "created": psutil.Process().create_time()}
    requests = [place / "STOP" for place in (directory, directory.parent)]

    def check_stop() -> None:
        for request in requests:
            if request.exists():
                raise StopRequested(f"stopped by {request}; run it again to continue")

    with lease.guard():
        if holder := lease.holder():
            who = f"process {holder['pid']} on {holder['host']}" if "pid" in holder else holder["host"]
            raise UserError(f"{directory}: {who} works here; wait for it or stop it")
        lease.take(os.getpid())
        for request in requests:
            request.unlink(missing_ok=True)
    ended = threading.Event()
    beating = threading.Thread(target=_heartbeat, args=(lease, me, ended), name="lease", daemon=True)
    beating.start()
    try:
        yield check_stop
    finally:
        ended.set()
        beating.join()
        lease.release(**me)


def _heartbeat(lease: Lease, me: Mapping[str, Any], ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError, UserError):
            lease.beat(**me)
