"""Best-effort calls: status, progress, logs and polling, whose errors must not end a job.

An error is logged once when the work starts to fail, and not again until it has succeeded. Requests to stop,
a lost lease and anything that is not an `Exception` (a signal, Ctrl-C) are raised.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TypeVar

from fm_core.errors import LeaseLostError, StopRequested, UnreachableError, UserError
from fm_core.run.progress import Observer, Progress

Result = TypeVar("Result")

WITHOUT = "continuing without it"
FINAL_ERRORS = (StopRequested, LeaseLostError, UserError)

logger = logging.getLogger("fm_core")


class BestEffort:
    """Calls of one supervisor or stage that may fail."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """`sleep` is called between the attempts of `retry`."""
        self._failing: set[str] = set()
        self._sleep = sleep

    def call(
        self, what: str, work: Callable[[], Result], default: Result, then: str = "trying again"
    ) -> Result:
        """The result of `work`, or `default` if it raises. `what` completes "cannot ..." in the log."""
        try:
            result = work()
        except (StopRequested, LeaseLostError):
            raise
        # rich, which Prefect logs through, raises SystemExit if its terminal or pipe is closed.
        except (Exception, SystemExit) as error:
            self._failed(what, error, then)
            return default
        if what in self._failing:
            self._failing.remove(what)
            with suppress(Exception, SystemExit):
                logger.info("recovered: can %s again", what)
        return result

    def retry(
        self, what: str, work: Callable[[], Result], pauses: tuple[float, ...] = (1.0, 4.0, 15.0, 40.0)
    ) -> Result:
        """The result of `work`, retried after each of the pauses (seconds); then its error is raised.

        Requests to stop and user errors are raised immediately.
        """
        for pause in pauses:
            try:
                return work()
            except Exception as error:
                if isinstance(error, StopRequested | LeaseLostError | UserError) and not isinstance(
                    error, UnreachableError
                ):
                    raise
                self._failed(what, error, "trying again")
                self._sleep(pause)
        return work()

    def observer(self, observe: Observer) -> Observer:
        """An observer whose errors are only logged."""

        def show(progress: Progress) -> None:
            self.call("show the progress", lambda: observe(progress), None)

        return show

    def context(self, what: str, context: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """A context whose enter and exit may fail without affecting the block."""
        return _BestEffortContext(self, what, context)

    def _failed(self, what: str, error: BaseException, then: str) -> None:
        if what not in self._failing:
            self._failing.add(what)
            message = " ".join(str(error).split())
            with suppress(Exception, SystemExit):
                logger.warning("cannot %s (%s: %s); %s", what, type(error).__name__, message, then)


class _BestEffortContext(AbstractContextManager[None]):
    def __init__(self, effort: BestEffort, what: str, context: AbstractContextManager[None]) -> None:
        self._effort, self._what, self._context = effort, what, context
        self._entered = False

    def __enter__(self) -> None:
        self._entered = self._effort.call(f"start {self._what}", self._enter, False, WITHOUT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered:
            end = f"end {self._what}"
            self._effort.call(end, lambda: self._context.__exit__(kind, error, trace), None, WITHOUT)

    def _enter(self) -> bool:
        self._context.__enter__()
        return True
