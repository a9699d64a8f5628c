"""Fence of a job: checks, before it commits or deletes anything, that the run directory is still its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from fm_core.errors import LeaseLostError
from fm_core.run.lease import Lease


class Fence(Protocol):
    """The fencing token of a job: its id and the epoch of its lease.

    A lease gets a higher epoch whenever another job takes it over. The check only narrows the window in which
    a job that lost its lease can write: files that are not committed yet carry the epoch in their names.
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
            OSError: the lease cannot be read now; whether it was lost is not known.
        """
        ...


@dataclass(frozen=True)
class Unfenced:
    """The fence of a process without a lease, e.g. of a library call: it checks nothing."""

    job: str = ""
    epoch: int = 0

    def check(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class LeaseFence:
    """The fence of the process that writes for a job."""

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
        # A job that an earlier version submitted has no epoch.
        return {"job": self.job} | ({"epoch": self.epoch} if self.epoch else {})
