"""Fence of a job: whether the run is still its own, asked before everything that cannot be undone.

A job carries an epoch, which grows with every job of a run. The check narrows the window in which a job that
lost its lease still acts; what it writes is safe because its names carry the epoch until they are committed.
"""

from dataclasses import dataclass
from typing import Protocol


class Fence(Protocol):
    """The right of a job to write in its run."""

    job: str
    """Id of the job."""
    epoch: int
    """Grows with every job that takes the lease of the run."""

    def check(self) -> None:
        """Raise LeaseLostError when the lease is no longer this job's."""
        ...


@dataclass
class Unfenced:
    """The fence of a single process that nobody else can take the run from."""

    job: str = ""
    epoch: int = 0

    def check(self) -> None:
        """Do nothing."""
