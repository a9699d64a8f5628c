"""Rank group in forks of the process that has imported torch and DeepSpeed (rank_server.py).

Group and ranks run the code, have the environment, arguments, signals and log of those that a launcher starts
as programs, without seconds of imports in each. /proc shows the environment and arguments of a program's
start, so a fork writes its own in their place: a job finds its processes by their environment.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from fm_core.launch import rank_group, worker_main

SPACE_BYTES = 32_768
"""Bytes that the server's own environment and arguments leave for those of its forks."""
PADDING = {"RANK_SERVER_ROOM": "x" * SPACE_BYTES}
"""A variable of the server's environment."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ForkedRank:
    """A fork, with what a rank group uses of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def be_agent(command: list[str], variables: dict[str, str], folder: str, log: str) -> NoReturn:
    """Be the rank group of `command`, in a session of its own."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _become(command, variables)
        rank_group.RankGroup.start = _start
        status = rank_group.main(command[3:])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _start(group: rank_group.RankGroup, number: int, command: list[str], variables: dict[str, str]) -> None:
    pid = os.fork()
    if pid:
        group.ranks[number] = ForkedRank(pid)
        return
    try:
        for signal_number in SIGNALS:
            signal.signal(signal_number, signal.SIG_DFL)
        _become(command, variables)
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        worker_main.main(command[3:])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _become(command: list[str], variables: dict[str, str]) -> None:
    """Replace environment and arguments, for this process and for those that look at it in /proc."""
    os.environ.clear()  # of variables whose memory is overwritten below
    os.environ.update(variables)
    sys.argv = command[2:]
    sys.stdout.reconfigure(line_buffering=True)
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    first_argument, end_of_arguments, first_variable, end_of_variables = map(int, fields[45:49])
    _write(command, first_argument, end_of_arguments)
    _write([f"{name}={value}" for name, value in variables.items()], first_variable, end_of_variables)


def _write(texts: list[str], start: int, end: int) -> None:
    block = "".join(f"{text}\0" for text in texts).encode()
    assert len(block) <= end - start, "SPACE_BYTES is too small"
    ctypes.memmove(start, block.ljust(end - start, b"\0"), end - start)
