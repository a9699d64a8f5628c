"""Artifact cache of one experiment: a directory of parts, each either complete or absent.

A part is <tensors>.safetensors and <part>.json, written last, which records the tensors' SHA-256 and their
recipe. An interrupted write leaves no record, and the part is computed again.
"""

import os
import sys
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from fm_core.errors import StopRequested, UserError
from fm_core.run.directory import differences
from fm_core.run.fence import LeaseFence
from fm_core.run.lease import LOOK_INTERVAL_SECONDS, HolderState, Lease, holder_name, waiting_message
from fm_core.run.stop_file import mark_stop_handled, own_directories, pending_request, refuse_pending_request
from fm_core.storage.atomic_files import read_json, write_bytes, write_json
from fm_core.storage.hashing import sha256_bytes


@dataclass(frozen=True)
class CachedPart:
    """A complete part."""

    record: dict[str, Any]
    tensors_sha256: str


class ArtifactCache:
    """The parts in the directory of one experiment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, part: str, tensors: str) -> CachedPart | None:
        """A part if it exists and its tensors match their recorded hash, else None."""
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
        """Check that the part in the directory, if any, has this recipe.

        Raises:
            UserError: naming each difference.
        """
        record = read_json(self.directory / f"{part}.json")
        changes = differences(record["recipe"], dict(recipe)) if record else []
        if changes:
            raise UserError(
                f"{self.directory} contains another experiment: {'; '.join(changes)}; "
                "choose another run.name or name of the experiment"
            )

    @property
    def failure(self) -> Path:
        """Why the last attempt failed; exists only if it did."""
        return self.directory / "failure.json"

    def _tensors(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def print_waiting(message: str) -> None:
    """Print a message to standard error."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def exclusive_lock(
    directory: Path, notify: Callable[[str], None] = print_waiting, run: Path | None = None
) -> Generator[Callable[[], None]]:
    """Hold the lease of a directory; yield a function to call between units of work.

    That function raises StopRequested if there is a STOP file in the directory or in the run directory, which
    it removes, and LeaseLostError if another process has taken the lease. A thread renews the lease, so the
    time between two calls does not matter.

    Args:
        directory: what to lock; created if missing.
        notify: called with a message if a holder on another host has to be watched first, to see if it lives.
        run: the run directory; by default the directory above.

    Raises:
        UserError: another process holds the lease.
        StopRequested: there was already a STOP file; it is removed.
    """
    run = run or directory.parent
    places = (run, directory)
    fence = _take(directory, run, notify)

    def check() -> None:
        with suppress(OSError):
            fence.check()
        if request := pending_request(*places):
            mark_stop_handled(*reversed(own_directories(directory, run)))
            raise StopRequested(f"stopped by {request}; run it again to continue")

    try:
        with fence.keep_alive():
            yield check
    finally:
        fence.lease.release(job=fence.job, epoch=fence.epoch)


def _take(directory: Path, run: Path, notify: Callable[[str], None]) -> LeaseFence:
    """Take a lease once its holder is known to be dead. Raises UserError if it is alive."""
    lease, notified = Lease(directory / "lock"), False
    while True:
        with lease.guard():
            state, holder = lease.look()
            if state is HolderState.FREE:
                refuse_pending_request(*reversed(own_directories(directory, run)))
                identifier = uuid.uuid4().hex
                epoch = lease.take(os.getpid(), job=identifier)
                return LeaseFence(lease, identifier, epoch)
        if holder and state is HolderState.HELD:
            raise UserError(f"{lease.path.parent} is in use by {holder_name(holder)}; wait for it or stop it")
        if holder and not notified:
            notified = True
            notify(waiting_message(lease.path.parent, holder))
        time.sleep(LOOK_INTERVAL_SECONDS)
