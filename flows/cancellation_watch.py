"""Cancellation without a worker: the run's own process polls its state on the server.

A process worker cancels only runs that it started itself, and only while it receives the server's events: not
after it was restarted, nor after it lost its connection for half a minute. Therefore the run's process reads
its own state every few seconds and acts on it.
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

POLL_SECONDS = 5.0
"""Interval between two reads of the state."""
REPLY_SECONDS = 5.0
"""Seconds that an ending run waits for the server to report whether it was cancelled."""

THREAD = "cancellation-watch"
"""Name of the threads that read the state."""
ALIVE = "its process is alive and continues"
CANCELLED = (StateType.CANCELLING, StateType.CANCELLED)


class CancellationWatch:
    """Context manager that sends this process SIGTERM, once, when its flow run is being cancelled.

    It does what Prefect's worker does, for runs whose worker has ended. A process whose run was started again
    elsewhere exits at once with status 0 and without changing any state, because its jobs belong to the new
    attempt.
    """

    def __init__(self) -> None:
        self._run = UUID(flow_run.get_id())
        self._attempt: int | None = None
        self._previous_handler: Any = None
        self._interrupted = False
        self._was_crashed = False
        self._cancelled = False
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._previous_handler = signal.signal(signal.SIGTERM, self._interrupt)
        self._start_thread(self._poll)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        signal.signal(signal.SIGTERM, self._previous_handler)

    def cancelled(self) -> bool:
        """Whether the server reports this run as cancelled; False without a reply within REPLY_SECONDS."""
        if not self._cancelled:
            self._start_thread(self._read_state).join(REPLY_SECONDS)
        return self._cancelled

    def _start_thread(self, work: Callable[[], None]) -> threading.Thread:
        context = contextvars.copy_context()  # contains the settings of this run's server
        thread = threading.Thread(target=context.run, args=(without_retries, work), name=THREAD, daemon=True)
        thread.start()
        return thread

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # The worker and this watch may both send SIGTERM; a second one would interrupt saving.
        if not self._interrupted:
            self._interrupted = True
            self._previous_handler(number, frame)

    def _poll(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._read_state()
            if self._cancelled and not self._ended.is_set():
                # To the process group, as a worker does, i.e. to this process and the pool of its task
                # runner.
                if os.getpgrp() == os.getpid():
                    os.killpg(os.getpid(), signal.SIGTERM)
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def _read_state(self) -> None:
        try:
            with get_client(sync_client=True) as client:
                self._act_on(client, client.read_flow_run(self._run))
        except Exception as error:  # an unreachable server must not end the run
            get_logger(__name__).debug("could not read the state of the flow run: %s", error)

    def _act_on(self, client: SyncPrefectClient, run: FlowRun) -> None:
        if self._attempt is None:
            self._attempt = run.run_count
        if run.run_count > self._attempt:
            os._exit(0)
        kind = run.state.type if run.state else None
        self._cancelled = self._cancelled or kind in CANCELLED
        # Lost heartbeats make the server mark a healthy run as Crashed. If it is still Crashed at the next
        # read, nothing restarts it, and the state is set back to Running.
        if kind == StateType.CRASHED and self._was_crashed:
            client.set_flow_run_state(self._run, Running(message=ALIVE), force=True)
            self._attempt = client.read_flow_run(self._run).run_count
        self._was_crashed = kind == StateType.CRASHED


def without_retries(work: Callable[[], None]) -> None:
    """Call `work` with the retries of Prefect's client turned off, because the caller retries itself."""
    # The client's pauses grow to half a minute, which would delay the detection of a restarted server.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        work()
