"""Fence of a job: checks, before anything is committed or deleted, that the job still holds its lease."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from fm_core.errors import LeaseLostError
from fm_core.run.lease import Lease


class Fence(Protocol):
    """The fencing token of a job: its id and the epoch of its lease.

    A lease gets a higher epoch whenever another job takes it over. The check only narrows the window in which
    a job that lost its lease can write, so uncommitted files also have the epoch in their names.
    """

    @property
    def job(self) -> str:
        """Id of the job; empty without a job."""
        ...

    @property
    def epoch(self) -> int:
        """Epoch of the job's lease, from 1; 0 without a lease."""
        ...

    def check(self) -> None:
        """Check that the lease is still this job's.

        Raises:
            LeaseLostError: another job has taken it over.
            OSError: the lease cannot be read at the moment, so it is unknown whether it was lost.
        """
        ...


@dataclass(frozen=True)
class Unfenced:
    """Fence of a process without a lease, e.g. of a library call; it checks nothing."""

    job: str = ""
    epoch: int = 0

    def check(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class LeaseFence:
    """Fence of the process that writes for a job."""

    lease: Lease
    job: str
    epoch: int

    def check(self) -> None:
        """Check that the lease is still this job's; raises LeaseLostError, or OSError: see `Fence`."""
        self.lease.check(**self._facts())

    def keep_alive(
        self, on_lost: Callable[[LeaseLostError], None] | None = None, wait: bool = True
    ) -> AbstractContextManager[Callable[[], None]]:
        """Renew the heartbeat inside the block; see `Lease.keep_alive`."""
        return self.lease.keep_alive(wait, on_lost, **self._facts())

    def _facts(self) -> dict[str, Any]:
        # Jobs submitted by earlier versions have no epoch.
        return {"job": self.job} | ({"epoch": self.epoch} if self.epoch else {})
