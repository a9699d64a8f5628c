"""Ownership of a place for checkpoints: OWNER.json names the one run that may write and remove there.

It is created exclusively before the first file of a checkpoint. A place in which it is missing although the
run has written there is out of sight, e.g. an empty mount point, and nothing is written to it.
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
"""On a file system without hard links, the record of another run may be half written for a moment."""


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to."""

    id: str
    """Random id from the history of the run; empty where the run directory has none."""
    name: str
    directory: str = ""
    """The run directory, for messages."""

    def record(self) -> dict[str, str]:
        """As COMPLETE and OWNER.json hold it."""
        return {"id": self.id, "name": self.name}

    def is_of(self, origin: dict[str, Any]) -> bool:
        """Whether the origin in a COMPLETE may be this run; an earlier version recorded none."""
        run = origin.get("run")
        return run is None or not self.id or run.get("id") == self.id


@dataclass
class WriteAccess:
    """The right of one job to write and remove checkpoints in one place."""

    store: Store
    identity: RunIdentity | None = None
    """None: a place without an owner record, for use as a library."""
    fence: Fence = field(default_factory=Unfenced)
    key: str = "train.checkpoint_root"
    """The configuration key that names the place."""
    claimed: bool = False
    """Whether this job has found or made the owner record; from then on it must be there."""
    may_create: bool = True
    """Whether a missing owner record may be made: not where the run has written to a local place before."""

    @property
    def tag(self) -> str:
        """What distinguishes names of this job that are not committed from those of any other."""
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
            UnreachableError: the owner record is gone or another run's: something else is mounted there.
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
        raise self._out_of_sight()

    def find(self) -> bool:
        """Whether the place has an owner record, of this run; ForeignCheckpointsError if of another."""
        if self.identity is None or not self._is_mine():
            return False
        self.claimed = True
        return True

    def claim(self) -> None:
        """Make this run the owner of a place that has none, and check as `check`.

        Raises ForeignCheckpointsError if it belongs to another run, UnreachableError if it has lost the
        record of this one.
        """
        self.fence.check()
        if self.identity and not self.claimed and not self.find():
            if not self.may_create:
                raise self._out_of_sight()
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

    def _out_of_sight(self) -> UnreachableError:
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
    """The owner record of a place; None without one. Raises UserError if it is not one."""
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
    """Why a checkpoint of this origin is not the run's, by the owner of its place if it has one, or None."""
    identity = access.identity
    if identity is None:
        return None
    owner = owner_of(access.store)
    if owner == identity.id or (owner is None and identity.is_of(origin)):
        return None
    return f"{access.store.url} holds the checkpoints of another run; choose another {access.key}"


def owner_of(store: Store) -> str | None:
    """Id of the run that owns a place; None without an owner."""
    record = read_owner(store)
    return record["run"]["id"] if record else None


def local_access(folder: Path, access: WriteAccess) -> WriteAccess:
    """The access of the same job to a local folder that belongs to its run alone."""
    return WriteAccess(Store.at(str(folder)), None, access.fence, access.key)


def identity_of(config: RunConfig) -> RunIdentity | None:
    """Which run the checkpoints of a configuration belong to; None before it was ever trained."""
    directory = RunDirectory(config)
    history = read_history(directory.path)
    return RunIdentity(history.id, config.run.name, str(directory.path.resolve())) if history else None


def access_of(config: RunConfig, fence: Fence) -> WriteAccess:
    """The right of a job of a run to write to train.checkpoint_root."""
    directory = RunDirectory(config)
    store, history = Store.at(directory.checkpoints), read_history(directory.path)
    # A bucket is never an empty mount point; a folder may be.
    begun = store.local is not None and history is not None and history.completed_step is not None
    return WriteAccess(store, identity_of(config), fence, may_create=not begun)


def is_shared(config: RunConfig) -> bool:
    """Whether train.checkpoint_root names a place outside of the run directory, as other runs may, too."""
    return RunDirectory(config).own_checkpoints is None


def check_owner(config: RunConfig) -> None:
    """Check that a run without a history does not begin where another has its checkpoints.

    It may be that other run, whose directory is not mounted; nothing is left in the mount point then. Raises
    ForeignCheckpointsError, OSError. A store is asked later, by the ranks, which try again.
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
    """The local folder in which a run's checkpoints wait for their upload to a store.

    Below train.checkpoint_staging each run has its own, by name and id.
    """
    if config.train.checkpoint_staging is None:
        return RunDirectory(config).path / "train" / "staging"
    identity = identity_of(config)
    name = f"{config.run.name}-{identity.id[:8]}" if identity else config.run.name
    return Path(config.train.checkpoint_staging) / name
