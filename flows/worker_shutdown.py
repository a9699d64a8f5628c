"""Shutdown of a Prefect worker: its flow runs save and report their state before the worker exits.

Prefect's worker kills the processes of its runs on SIGTERM and Ctrl-C. Their jobs would continue without a
supervisor (in a container, be killed without saving), and the runs would remain Running forever.
prefect_plugin.py installs these handlers in workers that are started in the project's root;
infra/entrypoint.py uses the same functions.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
JOB_VARIABLE = "FM_JOB"
SAVE_SECONDS = 50.0
"""Seconds in which runs must save and report their state; ranks may take 25 of them."""
POLL_SECONDS = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def install(print_line: Callable[[str], Any]) -> None:
    """Install handlers that let runs save at the first signal, and then call the previous handlers."""
    shutdown = _Shutdown(print_line)
    for number in SIGNALS:
        previous = signal.getsignal(number)
        if callable(previous):
            signal.signal(number, shutdown.handler(previous))


def flow_processes(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes that execute a flow; they end their own child processes."""
    return _topmost(RUN_VARIABLE, processes, without=JOB_VARIABLE)


def job_processes(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The topmost processes of each job, which forward a request to stop to their ranks."""
    return _topmost(JOB_VARIABLE, processes)


def ask_to_end(find: Callable[[], list[psutil.Process]], seconds: float = SAVE_SECONDS) -> bool:
    """Send SIGTERM once to each process that `find` returns, until there is none; False after a timeout."""
    asked: set[tuple[int, float]] = set()
    deadline = time.monotonic() + seconds
    while processes := find():
        for process in processes:
            with suppress(psutil.Error):
                identity = (process.pid, process.create_time())
                if identity not in asked:
                    asked.add(identity)
                    process.terminate()
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


class _Shutdown:
    def __init__(self, print_line: Callable[[str], Any]) -> None:
        self._print_line = print_line
        self._saving = False

    def handler(self, previous: Callable[[int, FrameType | None], Any]) -> Callable[..., None]:
        def handle(number: int, frame: FrameType | None) -> None:
            # A second signal ends the wait.
            if self._saving or not (runs := self._runs()):
                self._saving = True
                previous(number, frame)
                return
            self._saving = True
            with suppress(OSError):
                self._print_line(f"asking {len(runs)} flow run(s) to save; once more to end them at once")
            threading.Thread(target=self._end_runs, args=(number,), daemon=True).start()

        return handle

    def _runs(self) -> list[psutil.Process]:
        return flow_processes(psutil.Process().children())

    def _end_runs(self, number: int) -> None:
        ask_to_end(self._runs)
        os.kill(os.getpid(), number)


def _topmost(variable: str, processes: Iterable[psutil.Process], without: str = "") -> list[psutil.Process]:
    matches: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.Error):
            environment = _environment(process)
            if variable not in environment or without in environment:
                continue
            parent = process.parent()
            if parent is None or variable not in _environment(parent):
                matches.append(process)
    return matches


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except psutil.AccessDenied:
        return {}
