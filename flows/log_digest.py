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
HOST = re.compile(r"([\w.-]+): ")
"""Of a line of the job's own log: whose it is. pdsh puts the name of the host there, Slurm its number."""
HEAD = re.compile(r"job [0-9a-f]+ of \w+ on (.+)")
"""Where a job begins in that log, with its hosts."""
TRACEBACK = "Traceback (most recent call last):"
AGENT_ERROR = "ChildFailedError"
"""What torchrun's agent says at the end of its own traceback, whenever a rank has failed."""
MOST_ENTRIES = 100
"""Different entries that are shown of one stage; further ones are counted."""
MOST_CHARACTERS = 500
MOST_TRACEBACK_LINES = 100


class LogDigest:
    """Reads what a stage's processes add to their log files from now on.

    Those of hosts that do not see the run directory speak in the job's own log, each line behind its host.
    """

    def __init__(self, logs: Path, stage: str) -> None:
        self.logs, self.stage = logs, stage
        self.left_out = 0
        """Entries that were not shown because there were too many different ones."""
        self._read = {path: path.stat().st_size for path in self._paths()}
        self._tracebacks: dict[tuple[Path, str], list[str]] = {}
        self._hosts: set[str] = set()
        self._known: set[str] = set()

    def news(self) -> Iterator[tuple[int, str]]:
        """Level and text of what is new, each text once however many processes and steps repeat it."""
        for path in self._paths():
            for line in self._new_lines(path):
                host, said = self._told_by(path, line)
                if (entry := self._entry((path, host), said)) is None:
                    continue
                level, text = entry
                if text in self._known:
                    continue
                if len(self._known) >= MOST_ENTRIES:
                    self.left_out += 1
                    continue
                self._known.add(text)
                yield level, f"{path.name}{f', {host}' if host else ''}: {text}"

    def _told_by(self, path: Path, line: str) -> tuple[str, str]:
        """Host and words of a line; no host where the file is of one process."""
        if path.name != f"{self.stage}.log":
            return "", line
        if head := HEAD.fullmatch(line):
            names = head[1].split(", ")
            # pdsh leaves out a domain that all hosts share.
            self._hosts |= {*names, *(name.partition(".")[0] for name in names)}
        match = HOST.match(line)
        if match is None:
            return "", line
        host, said = match[1], line[match.end() :]
        # The head may be of before this time; no error that ends a traceback is followed by the next one.
        if host.isdecimal() or PREFIX.sub("", said).startswith(TRACEBACK):
            self._hosts.add(host)
        return (host, said) if host in self._hosts else ("", line)

    def _entry(self, source: tuple[Path, str], line: str) -> tuple[int, str] | None:
        """What is complete with this line of a process."""
        line = PREFIX.sub("", line)
        if line.startswith(TRACEBACK):
            self._tracebacks[source] = [line]
        elif source in self._tracebacks:
            # It ends with the first line that is not indented, which names the error.
            self._tracebacks[source].append(line)
            if line[:1].strip() or len(self._tracebacks[source]) >= MOST_TRACEBACK_LINES:
                text = "\n".join(self._tracebacks.pop(source))
                return None if AGENT_ERROR in line else (logging.ERROR, text)
        elif WARNING.search(line):
            return logging.WARNING, line.strip()[:MOST_CHARACTERS]
        return None

    def _paths(self) -> list[Path]:
        whole = self.logs / f"{self.stage}.log"
        return [*sorted(self.logs.glob(f"{self.stage}-*.log")), *([whole] if whole.exists() else [])]

    def _new_lines(self, path: Path) -> Iterator[str]:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is still being written
                self._read[path] = file.tell()
                yield line.decode(errors="replace").rstrip("\n")
