"""Commands in a pseudo-terminal: wait for a text, type a line."""

import os
import pty
import select
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LIMIT_SECONDS = 240.0


class Terminal:
    """A command whose standard streams are a terminal."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.output, self._read_to = "", 0
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            try:
                os.chdir(folder)
                os.execvpe(command[0], command, environment)
            finally:
                os._exit(127)

    def wait_for(self, text: str) -> str:
        """Read until a text appears; what came before it since the last call."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while text not in self.output[self._read_to :]:
            assert self._read(deadline), f"no {text!r} in:\n{self.output}"
        start, self._read_to = self._read_to, self.output.index(text, self._read_to) + len(text)
        return self.output[start : self._read_to]

    def type(self, text: str) -> None:
        """Type a line, or a control character."""
        os.write(self._terminal, text.encode())

    def wait(self) -> int:
        """Read to the end; the exit status."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while self._read(deadline):
            pass
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """Kill the command if it still runs."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            os.close(self._terminal)
            self._pid = 0

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing came for {LIMIT_SECONDS} s after:\n{self.output}"
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # Linux's end of a terminal
            return False
        self.output += data.decode(errors="replace")
        return bool(data)
