"""Fence of a job: checks, before it commits or deletes anything, that the run directory is still its own."""

from dataclasses import dataclass
from typing import Protocol


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
