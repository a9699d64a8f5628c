"""Standard output and standard error of a command, which may be closed or on a full disk.

A reader that exits early (`| head`), a closed terminal or a redirection to a full disk does not end the
command: output that cannot be written is dropped.
"""

import io
import logging
import os
import sys
from contextlib import suppress
from typing import TextIO

LOG_FORMAT = "[%(asctime)s] [%(levelname)s] [%(name)s] %(message)s"
"""Format of all log lines, the same as DeepSpeed's; flows/log_digest.py parses the level from it."""


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Handler that looks up sys.stderr for each line, because it may be replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one log record as a line."""
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Log the messages of this package, and Python's warnings, to standard error in one format."""
    package = logging.getLogger("fm_core")
    package.setLevel(level)
    logging.captureWarnings(True)
    for logger in (package, logging.getLogger("py.warnings")):
        if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
            handler = _StderrHandler()
            handler.setFormatter(logging.Formatter(LOG_FORMAT))
            logger.addHandler(handler)


def print_line(text: str, stream: TextIO | None = None) -> bool:
    """Print one line, by default to standard output, and flush it; False if it could not be written."""
    target: TextIO = sys.stdout if stream is None else stream
    try:
        _write(target, text)
    except BrokenPipeError:
        discard(target)
        return False
    except (OSError, ValueError):  # ValueError: the stream is closed
        return False
    return True


def flush_streams() -> None:
    """Flush both streams; if the interpreter's own flush at exit failed, the exit status would be 120."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # None in a program without a terminal
            try:
                stream.flush()
            except (OSError, ValueError):
                discard(stream)


class DroppingStream(io.TextIOWrapper):
    """Unbuffered UTF-8 stream to a file descriptor that silently drops what cannot be written."""

    def __init__(self, descriptor: int) -> None:
        raw = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115
        super().__init__(raw, encoding="utf-8", errors="backslashreplace", write_through=True)  # pyright: ignore[reportArgumentType]

    def write(self, text: str, /) -> int:
        """Write the text, or drop it."""
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        with suppress(OSError):
            super().flush()


def drop_unwritable_output() -> None:
    """Make printing in this process never raise, because its log may be on a full disk."""
    sys.stdout, sys.stderr = DroppingStream(1), DroppingStream(2)


def discard(stream: TextIO) -> None:
    """Redirect a stream to the null device, because its reader is gone."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _write(stream: TextIO, text: str) -> None:
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:  # the locale's encoding has no such character
        encoding = stream.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
