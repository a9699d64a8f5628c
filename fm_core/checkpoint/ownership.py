"""Ownership of a checkpoint root: OWNER.json names the one run that may write and remove there.

It is created exclusively before the first file of a checkpoint. If it is missing although the run has written
there, the root is unavailable, e.g. an unmounted mount point, and nothing is written to it.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fm_core.config import RunConfig
from fm_core.errors import ForeignCheckpointsError, UnreachableError, UserError
from fm_core.run.directory import RunDirectory
from fm_core.run.fence import Fence, Unfenced
from fm_core.run.history import OWNER, open_history, read_history
from fm_core.storage.store import Store

SCHEMA = 1
WRITTEN_SECONDS = 2.0
"""Pause before an unreadable record is read again; without hard links it may be partly written."""


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to."""

    id: str
    """Random id from the history of the run; empty where the run directory has none."""
    name: str
    directory: str = ""
    """The run directory, for messages."""

    def record(self) -> dict[str, str]:
        """The entries of COMPLETE and OWNER.json."""
        return {"id": self.id, "name": self.name}

    def is_of(self, origin: dict[str, Any]) -> bool:
        """Whether the origin in a COMPLETE matches this run; one without an origin matches too."""
        run = origin.get("run")
        return run is None or not self.id or run.get("id") == self.id


@dataclass
class WriteAccess:
    """Permission of one job to write and remove checkpoints below one root."""

    store: Store
    identity: RunIdentity | None = None
    """None: no owner record is kept, for use as a library."""
    fence: Fence = field(default_factory=Unfenced)
    key: str = "train.checkpoint_root"
    """The configuration key of the root, for messages."""
    claimed: bool = False
    """Whether this job has read or written the owner record; from then on it must exist."""
    may_create: bool = True
    """Whether a missing owner record may be created; false if the run has written to this root before."""

    @property
    def tag(self) -> str:
        """Suffix that distinguishes this job's uncommitted names from those of any other job."""
        return f"e{self.fence.epoch}-{self.fence.job[:8]}"

    @property
    def origin(self) -> dict[str, Any]:
        """What COMPLETE records of this job and its run."""
        if self.identity is None:
            return {}
        return {"run": self.identity.record(), "job": self.fence.job, "epoch": self.fence.epoch}

    def check(self) -> None:
        """Raise unless this job may still write here.

        Raises:
            LeaseLostError: another job has taken over the run.
            UnreachableError: the owner record is missing or another run's, so something else is mounted
                there.
        """
        self.fence.check()
        if self.identity is None or not self.claimed:
            return
        try:
            if self._is_mine():
                return
        except ForeignCheckpointsError as error:
            raise UnreachableError(
                f"{error} (it belonged to this run before: check what is mounted there)"
            ) from None
        raise self._unavailable()

    def find(self) -> bool:
        """Whether the root has an owner record of this run; ForeignCheckpointsError for another run's."""
        if self.identity is None or not self._is_mine():
            return False
        self.claimed = True
        return True

    def claim(self) -> None:
        """Make this run the owner of a root without one, and check as `check` does.

        Raises ForeignCheckpointsError if it belongs to another run, UnreachableError if this run's record is
        missing.
        """
        self.fence.check()
        if self.identity and not self.claimed and not self.find():
            if not self.may_create:
                raise self._unavailable()
            record = {
                "schema": SCHEMA,
                "run": self.identity.record(),
                "directory": self.identity.directory,
                "job": self.fence.job,
            }
            self.store.create(OWNER, (json.dumps(record, indent=1) + "\n").encode())
            if not self.find():
                raise UnreachableError(f"{self.store.url}/{OWNER} cannot be read back")
        self.check()

    def _unavailable(self) -> UnreachableError:
        return UnreachableError(
            f"{OWNER} is missing from {self.store.url}; check that it is mounted. Nothing is written there "
            "until it is back"
        )

    def _is_mine(self) -> bool:
        """Whether the owner record names this run; False without one; ForeignCheckpointsError."""
        assert self.identity
        record = read_owner(self.store)
        if record is None:
            return False
        owner = record["run"]
        if owner["id"] != self.identity.id:
            place = f" ({record['directory']})" if record.get("directory") else ""
            raise ForeignCheckpointsError(
                f"{self.store.url} holds the checkpoints of another run, {owner['name']}{place}: choose "
                f"another {self.key}, or remove {OWNER} there if that run no longer exists"
            )
        return True


def read_owner(store: Store) -> dict[str, Any] | None:
    """The owner record of a checkpoint root, or None. Raises UserError if it is invalid."""
    deadline = time.monotonic() + WRITTEN_SECONDS
    while True:
        try:
            content = (store.local / OWNER).read_bytes() if store.local else store.read_bytes(OWNER)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            record = json.loads(content)
            if not (record["run"]["id"] and record["run"]["name"]):
                raise ValueError
            return record
        except (ValueError, KeyError, TypeError):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{store.url}/{OWNER} is not an owner record; remove it if no run writes there"
                ) from None
            time.sleep(0.05)


def foreign_problem(access: WriteAccess, origin: dict[str, Any]) -> str | None:
    """Why a checkpoint of this origin is not the run's, considering the owner of its root; or None."""
    identity = access.identity
    if identity is None:
        return None
    owner = owner_of(access.store)
    if owner == identity.id or (owner is None and identity.is_of(origin)):
        return None
    return f"{access.store.url} holds the checkpoints of another run; choose another {access.key}"


def owner_of(store: Store) -> str | None:
    """Id of the run that owns a checkpoint root, or None."""
    record = read_owner(store)
    return record["run"]["id"] if record else None


def local_access(folder: Path, access: WriteAccess) -> WriteAccess:
    """Access of the same job to a local folder that only its run uses."""
    return WriteAccess(Store.at(str(folder)), None, access.fence, access.key)


def identity_of(config: RunConfig) -> RunIdentity | None:
    """Identity of the run of a configuration; None before it was ever trained."""
    directory = RunDirectory(config)
    history = read_history(directory.path)
    return RunIdentity(history.id, config.run.name, str(directory.path.resolve())) if history else None


def access_of(config: RunConfig, fence: Fence) -> WriteAccess:
    """Access of a job to train.checkpoint_root."""
    directory = RunDirectory(config)
    store, history = Store.at(directory.checkpoints), read_history(directory.path)
    # A bucket cannot be an empty mount point, but a folder can.
    begun = store.local is not None and history is not None and history.completed_step is not None
    return WriteAccess(store, identity_of(config), fence, may_create=not begun)


def is_shared(config: RunConfig) -> bool:
    """Whether train.checkpoint_root is outside the run directory, so that other runs may name it too."""
    return RunDirectory(config).own_checkpoints is None


def check_owner(config: RunConfig) -> None:
    """Check that a run without a history does not start in another run's checkpoint root.

    It may in fact be that other run with its directory unmounted, so nothing is written to the mount point.
    Raises ForeignCheckpointsError, OSError. A store is checked later, by the ranks, which retry.
    """
    access = access_of(config, Unfenced())
    if access.store.local and is_shared(config):
        access.identity = access.identity or RunIdentity("", config.run.name)
        access.find()


def begin_history(config: RunConfig) -> None:
    """Write the history of a run that has none, before it is trained. Raises OSError, UserError."""
    directory = RunDirectory(config)
    known = None if is_shared(config) else owner_of(Store.at(directory.checkpoints))
    open_history(directory.path, known)


def staging_folder(config: RunConfig) -> Path:
    """Local folder of a run's checkpoints until they are uploaded to a store.

    Below train.checkpoint_staging each run has its own, by name and id.
    """
    if config.train.checkpoint_staging is None:
        return RunDirectory(config).path / "train" / "staging"
    identity = identity_of(config)
    name = f"{config.run.name}-{identity.id[:8]}" if identity else config.run.name
    return Path(config.train.checkpoint_staging) / name
