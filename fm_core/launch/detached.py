"""Spawning of processes that outlive the caller, in a new session and with output to a log file."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def spawn_detached(
    command: Sequence[str],
    log: Path,
    variables: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
    stdin: int = subprocess.DEVNULL,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a command in a new session, so that the terminal's Ctrl-C and hangup do not reach it.

    Args:
        command: the program and its arguments.
        log: file that standard output and standard error are appended to.
        variables: added to this process's environment.
        without: names of variables that the process does not inherit.
        stdin: subprocess.DEVNULL or subprocess.PIPE.
        descriptors: open files that the process gets under the same numbers.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=descriptors,
            env={**inherited, **(variables or {})},
        )
