"""What of a stage's log files is worth a line in the UI: warnings, and the tracebacks of what failed.

Everything else stays in the files, however much it is: the server's database holds a few lines of a run.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

WARNING = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|[Ww]arning: ")
PREFIX = re.compile(r"\[?\d{4}-\d\d-\d\d[ T][\d:,.]+\]? ?|\[rank\d+\]: ?")
"""Of a line: what differs between the processes and the times that say the same."""
TRACEBACK = "Traceback (most recent call last):"
MOST_ENTRIES = 100
"""Different entries that are shown of one stage; further ones are counted."""
MOST_CHARACTERS = 500
MOST_TRACEBACK_LINES = 100


class Bulletin:
    """Reads what a stage's processes add to their log files from now on."""

    def __init__(self, logs: Path, stage: str) -> None:
        self.logs, self.stage = logs, stage
        self.left_out = 0
        """Entries that were not shown because there were too many different ones."""
        self._read = {path: path.stat().st_size for path in self._paths()}
        self._tracebacks: dict[Path, list[str]] = {}
        self._known: set[str] = set()

    def news(self) -> Iterator[tuple[int, str]]:
        """Level and text of what is new, each text once however many processes and steps repeat it."""
        for path in self._paths():
            for line in self._new_lines(path):
                if (entry := self._entry(path, line)) is None:
                    continue
                level, text = entry
                if text in self._known:
                    continue
                if len(self._known) >= MOST_ENTRIES:
                    self.left_out += 1
                    continue
                self._known.add(text)
                yield level, f"{path.name}: {text}"

    def _entry(self, path: Path, line: str) -> tuple[int, str] | None:
        """What is complete with this line."""
        line = PREFIX.sub("", line)
        if line.startswith(TRACEBACK):
            self._tracebacks[path] = [line]
        elif path in self._tracebacks:
            # It ends with the first line that is not indented, which names the error.
            self._tracebacks[path].append(line)
            if line[:1].strip() or len(self._tracebacks[path]) >= MOST_TRACEBACK_LINES:
                return logging.ERROR, "\n".join(self._tracebacks.pop(path))
        elif WARNING.search(line):
            return logging.WARNING, line.strip()[:MOST_CHARACTERS]
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.logs.glob(f"{self.stage}-*.log"))

    def _new_lines(self, path: Path) -> Iterator[str]:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is still being written
                self._read[path] = file.tell()
                yield line.decode(errors="replace").rstrip("\n")
