"""A run's own process looks after the run's state, since its worker may be gone.

A process worker cancels only what it started itself, and only as long as it hears of it: one that was
restarted does not, nor one that lost its connection for half a minute. So the process reads its own
state every few seconds and obeys it.
"""

import contextvars
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.logging import get_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Running

WATCH_SECONDS = 5.0
"""The state is read this often."""
ANSWER_SECONDS = 5.0
"""How long the end of a run waits to hear whether it was cancelled."""

ALIVE = "its process lives and goes on"
CANCELLED = (StateType.CANCELLING, StateType.CANCELLED)


class CancellationWatch:
    """While it is open, a flow run that is being cancelled interrupts the main thread, once.

    Prefect's worker does so by SIGTERM; this does the same where no worker does. A process whose run
    was started again elsewhere ends at once and without a word: its jobs belong to the new attempt.
    """

    def __init__(self) -> None:
        self._run = UUID(flow_run.get_id())
        self._attempt: int | None = None
        self._before: Any = None
        self._interrupted = False
        self._called_dead = False
        self._cancelled = False
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._interrupt)
        self._beside(self._look_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        signal.signal(signal.SIGTERM, self._before)

    def cancelled(self) -> bool:
        """Whether the server says that this run is to end; it is given seconds to answer."""
        if not self._cancelled:
            self._beside(self._look).join(ANSWER_SECONDS)
        return self._cancelled

    def _beside(self, work: Callable[[], None]) -> threading.Thread:
        context = contextvars.copy_context()  # says which server this run has
        thread = threading.Thread(target=context.run, args=(without_retries, work), daemon=True)
        thread.start()
        return thread

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # The worker and this watch may both send one; a second would interrupt the saving.
        if not self._interrupted:
            self._interrupted = True
            self._before(number, frame)

    def _look_on(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            self._look()
            if self._cancelled and not self._ended.is_set():
                # As a worker does: to the whole group, which is this process and what it fans out to.
                if os.getpgrp() == os.getpid():
                    os.killpg(os.getpid(), signal.SIGTERM)
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def _look(self) -> None:
        try:
            with get_client(sync_client=True) as client:
                self._judge(client, client.read_flow_run(self._run))
        except Exception as error:  # a server that is away is no reason to end
            get_logger(__name__).debug("the state of the run is not known: %s", error)

    def _judge(self, client: SyncPrefectClient, run: FlowRun) -> None:
        if self._attempt is None:
            self._attempt = run.run_count
        if run.run_count > self._attempt:
            os._exit(0)
        kind = run.state.type if run.state else None
        self._cancelled = self._cancelled or kind in CANCELLED
        # Lost heartbeats get a healthy run called dead; where nothing starts it again, that is mended.
        if kind == StateType.CRASHED and self._called_dead:
            client.set_flow_run_state(self._run, Running(message=ALIVE), force=True)
            self._attempt = client.read_flow_run(self._run).run_count
        self._called_dead = kind == StateType.CRASHED


def without_retries(work: Callable[[], None]) -> None:
    """Call something that tries again by itself, soon, where the server does not answer."""
    # Prefect's own pauses grow to half a minute, which is how late a returning server would be noticed.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        work()
