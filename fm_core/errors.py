"""Exceptions of the package, and the outcomes that a run can end with.

The docstrings of the exceptions are their documentation for users. `outcome_of` maps an exception to an
Outcome. An Outcome holds the exit code of a command, the state of a Prefect run, and the value in a rank's
exit record.
"""

from bdb import BdbQuit
from enum import Enum
from typing import Any


class FlowMatchingError(Exception):
    """Base class of the exceptions that this package raises on purpose."""


class UserError(FlowMatchingError):
    """An error that the user can fix; its message is one line: what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


class UnreachableError(UserError):
    """A host or a store does not answer.

    Before a job starts, the user has to fix it. While a job runs it may be temporary, and the job is
    restarted.
    """


class ForeignCheckpointsError(UserError):
    """The checkpoint root belongs to another run."""


class DamagedRecordError(UserError):
    """A manifest or sidecar is not valid JSON of its schema."""


class ImageDecodingError(FlowMatchingError):
    """An image file cannot be decoded; it is quarantined and counted."""


class AmbiguousIntensitiesError(ImageDecodingError):
    """Black and white cannot be inferred from floats or 32-bit integers; the message is the dtype."""


class StopRequested(FlowMatchingError):
    """The stage stopped early on request; running it again continues (exit status 3)."""


class UnrecoverableError(FlowMatchingError):
    """The stage cannot continue, and a restart would fail in the same way (exit status 1)."""


class LeaseLostError(FlowMatchingError):
    """Another job has taken over the directory; this one exits without writing anything (exit status 1)."""


class NonFiniteGradientsError(FlowMatchingError):
    """Too many optimizer steps in a row were skipped; all ranks raise it at the same step."""

    def __init__(self, message: str, state: Any) -> None:
        """`state` is the TrainState after the last skipped step."""
        super().__init__(message)
        self.state = state


class CorruptCheckpointError(FlowMatchingError, OSError):
    """A checkpoint is damaged or belongs to another run, and must not be uploaded."""


class JobFailedError(FlowMatchingError, RuntimeError):
    """A job ended before it was complete, without a request to stop."""


class SolverError(FlowMatchingError, ArithmeticError):
    """An ODE cannot be solved: the step size underflowed or the state is not finite (exit status 1).

    A restart would end in the same way.
    """


class DetachedError(FlowMatchingError):
    """The supervisor failed while its job still runs; the next start attaches to the job (exit status 1)."""


class Outcome(Enum):
    """How a rank, a stage or a run ended."""

    DONE = "done", 0, "COMPLETED"
    STOPPED = "stopped", 3, "CANCELLED"
    """On request; running it again continues."""
    ORPHANED = "orphaned", 3, "CRASHED"
    """Stopped because its launcher was killed, not on request."""
    REFUSED = "user", 2, "FAILED"
    """The user has to fix something first."""
    UNREACHABLE = "unreachable", 2, "FAILED"
    """A host or a store did not answer; a restart may help."""
    UNRECOVERABLE = "gave up", 1, "FAILED"
    """A restart would end in the same way."""
    DETACHED = "detached", 1, "CRASHED"
    """Only the supervisor ended; a flow run is started again and attaches to the running job."""
    LEASE_LOST = "lease lost", 1, "FAILED"
    """Another job has taken over the run directory; a restart would find it in use."""
    FAILED = "error", 1, "FAILED"
    """Anything else."""

    def __init__(self, record: str, exit_code: int, prefect_state: str) -> None:
        self.record = record
        """The outcome as written in a rank's exit record (<stage>-<rank>.end.json)."""
        self.exit_code = exit_code
        """Exit status of a command and of a rank."""
        self.prefect_state = prefect_state
        """Name of the Prefect state type."""

    @classmethod
    def from_prefect_state(cls, state: str) -> "Outcome":
        """Return the outcome for the state type of a finished Prefect run."""
        return {"COMPLETED": cls.DONE, "CANCELLED": cls.STOPPED, "CRASHED": cls.ORPHANED}.get(
            state, cls.FAILED
        )

    @classmethod
    def from_record(cls, record: str) -> "Outcome":
        """Return the outcome named in an exit record; FAILED for a name of another version."""
        return next((outcome for outcome in cls if outcome.record == record), cls.FAILED)


class StageEndedError(FlowMatchingError):
    """A stage of a flow run ended without a result, but not because of an internal error."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome, self.message = outcome, message


def outcome_of(error: BaseException) -> Outcome:
    """Map an exception to the outcome of the process that raised it."""
    for kind, outcome in (
        (StopRequested, Outcome.STOPPED),
        (KeyboardInterrupt, Outcome.STOPPED),
        (BdbQuit, Outcome.STOPPED),
        (UnreachableError, Outcome.UNREACHABLE),
        (UserError, Outcome.REFUSED),
        (UnrecoverableError, Outcome.UNRECOVERABLE),
        (SolverError, Outcome.UNRECOVERABLE),
        (DetachedError, Outcome.DETACHED),
        (LeaseLostError, Outcome.LEASE_LOST),
    ):
        if isinstance(error, kind):
            return outcome
    return Outcome.FAILED
