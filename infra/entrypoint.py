"""First process of a container: runs a command, and lets the container's runs save before it exits.

    python infra/entrypoint.py prefect worker start --pool local --type process

The kernel kills all processes of a container when its first process ends. On SIGTERM, which `docker stop`
sends, or on SIGINT, every flow run and every job is asked to save; the command is terminated when they have
ended. Orphans are reaped.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project itself, wherever it is installed

from flows.worker_shutdown import ask_to_end, flow_processes, job_processes

PR_SET_CHILD_SUBREAPER = 36
JOB_SECONDS = 25.0
"""Seconds in which jobs without a flow run must save."""
END_SECONDS = 10.0
"""Seconds in which the command must end afterwards, before it is killed."""
INIT = ("docker-init", "tini")
"""Init programs that Docker may start as the parent of this one (`init: true`)."""


class Container:
    """The other processes of the container."""

    def __init__(self) -> None:
        self.command = 0
        """Process id of the command."""
        self.code: int | None = None
        """Its exit status, once it has ended."""
        parent = psutil.Process().parent()
        self._whole = os.getpid() == 1 or (parent is not None and parent.pid == 1 and parent.name() in INIT)
        # Orphans become children of this process and can be found.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def processes(self) -> list[psutil.Process]:
        """All other processes of the container; outside of a container, the descendants of this process."""
        self.reap()
        if self._whole:
            return [process for process in psutil.process_iter() if process.pid != os.getpid()]
        return psutil.Process().children(recursive=True)

    def reap(self) -> None:
        """Collect every process that has ended."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.command:
                    self.code = os.waitstatus_to_exitcode(ended[1])
        except ChildProcessError:  # no child is left
            self.code = 0 if self.code is None else self.code


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status, or 128 plus the number of the signal that ended it."""
    requests: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: requests.append(number))
    container = Container()
    # In a new session, so that a terminal's Ctrl-C reaches only this process. The object is kept: when it is
    # deleted, it reaps the process.
    command = subprocess.Popen(arguments, start_new_session=True)
    container.command = command.pid
    while container.code is None and not requests:
        time.sleep(0.2)
        container.reap()
    if container.code is None:
        ask_to_end(lambda: flow_processes(container.processes()))
        ask_to_end(lambda: job_processes(container.processes()), JOB_SECONDS)
        end_command(container)
    code = container.code or 0
    return 128 - code if code < 0 else code


def end_command(container: Container) -> None:
    """Ask the command to end, then kill it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(container.command, number)
        deadline = time.monotonic() + END_SECONDS
        while container.code is None and time.monotonic() < deadline:
            time.sleep(0.1)
            container.reap()
        if container.code is not None:
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
