"""Last updates of a stage, e.g. its bar at 100 % and its tables, repeated until the server has them.

The following stages do not wait for them, but the end of the flow run does, at most LAST_UPDATE_SECONDS after
the stage.
"""

import contextvars
import threading
import time
from collections.abc import Callable

import httpx
from prefect import get_client

from flows.cancellation_watch import without_retries

LAST_UPDATE_SECONDS = 600.0
"""Seconds after a stage during which its last updates are repeated."""
PAUSE_SECONDS = 4.0
FIRST_SECONDS = 10.0
"""Seconds that the end of a stage waits for its last updates before the next stage starts."""


class LastUpdates:
    """Updates of one flow run, each in a daemon thread, because the run may end before the server returns."""

    def __init__(self, seconds: float = LAST_UPDATE_SECONDS, pause: float = PAUSE_SECONDS) -> None:
        self._seconds, self._pause = seconds, pause
        self._threads: list[tuple[threading.Thread, float]] = []
        self._given_up = threading.Event()

    def add(self, update: Callable[[], bool]) -> None:
        """Repeat an update until it returns true."""
        deadline = time.monotonic() + self._seconds
        given_up = self._given_up

        def repeat() -> None:
            while not given_up.is_set() and not update() and time.monotonic() < deadline:
                given_up.wait(self._pause)

        # The context contains the flow run, the task run and the server.
        arguments = (without_retries, repeat)
        thread = threading.Thread(target=contextvars.copy_context().run, args=arguments, daemon=True)
        thread.start()
        self.wait_for(thread, deadline)
        thread.join(min(FIRST_SECONDS, self._seconds))

    def wait_for(self, thread: threading.Thread, deadline: float) -> None:
        """Make the end of the flow run wait for a thread, until a deadline of the monotonic clock."""
        self._threads = [(other, until) for other, until in self._threads if other.is_alive()]
        self._threads.append((thread, deadline))

    def wait(self) -> None:
        """Wait until the server has every update and answers, or the deadlines have passed."""
        self.add(server_answers)
        self.wait_for_threads()
        self.abandon()

    def wait_for_threads(self) -> None:
        """Wait for all updates so far, each until its deadline."""
        for thread, deadline in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def abandon(self) -> None:
        """Stop repeating updates, because a cancelled run has only seconds left."""
        self._given_up.set()
        self._given_up = threading.Event()
        self._threads = []


last_updates = LastUpdates()
"""Updates of this process, which executes one flow run."""


def server_answers() -> bool:
    """Whether the server answers, so that it will also receive the final state, which is not repeated."""
    try:
        return _healthy()
    except Exception as error:
        return not server_away(error)


def _healthy() -> bool:
    with get_client(sync_client=True) as client:
        return client.api_healthcheck() is None


def server_away(error: BaseException) -> bool:
    """Whether an error of Prefect's client is temporary: no connection, a timeout, overload.

    httpx wraps all socket errors; any other OSError comes from a file that an update reads.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, httpx.HTTPStatusError):
            return cause.response.status_code in (408, 429) or cause.response.status_code >= 500
        if isinstance(cause, httpx.TransportError | ConnectionError | TimeoutError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
