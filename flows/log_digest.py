"""Digest of a stage's log files for the UI: warnings and tracebacks.

Everything else remains in the files, so that the server's database has few lines per run, however much is
logged.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LEVEL = re.compile(r"\[?(WARNING|ERROR|CRITICAL)\b[\]:]?|([WEF])\d{4} [\d:.]+ ")
"""Level of a log line, in the formats of this package and of DeepSpeed, of logging's default and of glog."""
LEVELS = {"WARNING": logging.WARNING, "W": logging.WARNING}
"""Levels that are not errors."""
PREFIX = re.compile(r"\[?\d{4}-\d\d-\d\d[ T][\d:,.]+\]? ?|\[rank\d+\]: ?")
"""Time stamp and rank at the beginning of a line; removed to recognize equal messages."""
HOST_PREFIX = re.compile(r"([\w.-]+): ")
"""Origin of a line in the job's own log: pdsh prepends the host name, Slurm the task index."""
JOB_HEADER = re.compile(r"job [0-9a-f]+ of \w+ on (.+)")
"""First line of a job in that log, with its hosts."""
TRACEBACK = "Traceback (most recent call last):"
AGENT_ERROR = "ChildFailedError"
"""Error at the end of the traceback of torchrun's agent when a rank has failed; not shown."""
MAX_ENTRIES = 100
"""Maximum number of distinct entries per stage; further ones are only counted."""
MAX_CHARACTERS = 500
COMPARED_BYTES = 64
MAX_TRACEBACK_LINES = 100


class LogDigest:
    """Follows the log files of a stage's processes from their current end.

    Processes on hosts that do not share the run directory log to the job's own log, where each line is
    prefixed with its host. A log that was truncated or replaced (logrotate) is read from its beginning; one
    that cannot be read is retried later.
    """

    def __init__(self, logs: Path, stage: str) -> None:
        self.logs, self.stage = logs, stage
        self.omitted = 0
        """Number of entries beyond MAX_ENTRIES, which were not returned."""
        self._offsets: dict[Path, int] = {}
        self._before: dict[Path, bytes] = {}
        """The last bytes before the offset, to detect a file that was truncated and has grown again."""
        for path in self._paths():
            with suppress(OSError):
                self._offsets[path] = path.stat().st_size
                self._before[path] = _bytes_before(path, self._offsets[path])
        self._tracebacks: dict[tuple[Path, str], list[str]] = {}
        self._hosts: set[str] = set()
        self._seen: set[str] = set()

    def new_entries(self) -> Iterator[tuple[int, str]]:
        """Level and text of each new entry; each text only once, even if processes and steps repeat it."""
        for path in self._paths():
            for line in self._new_lines(path):
                host, text = self._split_host(path, line)
                if (entry := self._entry((path, host), text)) is None:
                    continue
                level, text = entry
                if text in self._seen:
                    continue
                if len(self._seen) >= MAX_ENTRIES:
                    self.omitted += 1
                    continue
                self._seen.add(text)
                yield level, f"{path.name}{f', {host}' if host else ''}: {text}"

    def _split_host(self, path: Path, line: str) -> tuple[str, str]:
        """Host and text of a line; an empty host in the log file of a single process."""
        if path.name != f"{self.stage}.log":
            return "", line
        if header := JOB_HEADER.fullmatch(line):
            names = header[1].split(", ")
            # pdsh omits a domain that is common to all hosts.
            self._hosts |= {*names, *(name.partition(".")[0] for name in names)}
        match = HOST_PREFIX.match(line)
        if match is None:
            return "", line
        host, text = match[1], line[match.end() :]
        # The job's first line may be older than this digest, so a host is also recognized by its index or by
        # a traceback after its prefix: an error line that ends a traceback is never followed by another
        # traceback.
        if host.isdecimal() or PREFIX.sub("", text).startswith(TRACEBACK):
            self._hosts.add(host)
        return (host, text) if host in self._hosts else ("", line)

    def _entry(self, source: tuple[Path, str], line: str) -> tuple[int, str] | None:
        """The entry that this line of a process completes, a warning or a traceback; otherwise None."""
        line = PREFIX.sub("", line)
        if line.startswith(TRACEBACK):
            self._tracebacks[source] = [line]
        elif source in self._tracebacks:
            # A traceback ends with its first line that is not indented, which names the error.
            self._tracebacks[source].append(line)
            if line[:1].strip() or len(self._tracebacks[source]) >= MAX_TRACEBACK_LINES:
                text = "\n".join(self._tracebacks.pop(source))
                return None if AGENT_ERROR in line else (logging.ERROR, text)
        elif level := LEVEL.match(line):
            return LEVELS.get(level[1] or level[2], logging.ERROR), line.strip()[:MAX_CHARACTERS]
        return None

    def _paths(self) -> list[Path]:
        with suppress(OSError):
            return [*sorted(self.logs.glob(f"{self.stage}-*.log")), *self.logs.glob(f"{self.stage}.log")]
        return []

    def _new_lines(self, path: Path) -> Iterator[str]:
        with suppress(OSError):
            offset, size = self._offsets.get(path, 0), path.stat().st_size
            if size == offset:
                return
            if size < offset or _bytes_before(path, offset) != self._before.get(path, b""):
                offset = self._offsets[path] = 0
                self._before[path] = b""
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return  # an incomplete line that is still being written
                    self._offsets[path] = file.tell()
                    self._before[path] = (self._before.get(path, b"") + line)[-COMPARED_BYTES:]
                    yield line.decode(errors="replace").rstrip("\n")


def _bytes_before(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, offset - COMPARED_BYTES))
        return file.read(min(offset, COMPARED_BYTES))
