"""Small files that are replaced atomically, JSON records and JSON lines; durable writes and renames."""

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from fm_core.errors import UserError

SCHEMA = 1
"""Schema version of the JSON files in run directories."""


def write_text(path: Path, text: str, parents: bool = True) -> None:
    """Replace a file atomically, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode(), parents)


def write_bytes(path: Path, content: bytes, parents: bool = True) -> None:
    """Replace a file atomically: readers see the old or the new content, even after a power loss.

    The content is synced before the rename. If anything fails, the old file remains. `parents` creates its
    folder if that is missing.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            flush(file)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def flush(file: IO[bytes]) -> None:
    """Flush and sync an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Sync a file's content to the disk, or a folder's entries, which makes renames in it durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(staged: Path, target: Path) -> None:
    """Rename a synced file durably."""
    staged.replace(target)
    sync(target.parent)


def create_exclusively(path: Path, content: bytes) -> bool:
    """Write a file durably unless it already exists; return whether it was written.

    Of several processes exactly one succeeds, and readers never see a partial file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            flush(file)
        Path(name).chmod(0o644)
        try:
            os.link(name, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            with suppress(FileExistsError), path.open("xb") as file:
                file.write(content)
                flush(file)
    finally:
        Path(name).unlink(missing_ok=True)
    sync(path.parent)
    return path.read_bytes() == content


def write_json(path: Path, record: Mapping[str, Any], parents: bool = True) -> None:
    """Replace a JSON file atomically, as `write_bytes` does; the schema version goes first."""
    write_text(path, json.dumps({"schema": SCHEMA, **record}, indent=1, allow_nan=False) + "\n", parents)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file of `write_json`, or None if missing. UserError for another schema or invalid JSON."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); it was not written by this program") from None
    version = record.get("schema") if isinstance(record, dict) else None
    if version != SCHEMA:
        raise UserError(f"{path}: schema {version!r}; this version of the program reads {SCHEMA}")
    return cast(dict[str, Any], record)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line in a single write; a line truncated by a crash is terminated first.

    If the line cannot be written completely (a full disk), the file is restored.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        truncated = file.read(1) not in (b"", b"\n")
        line = (b"\n" if truncated else b"") + _line_of(record)
        try:
            if (file.write(line) or 0) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise


def ends_with_line(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the last line of a file is this record, which a failed `append_line` may have written."""
    line = _line_of(record)
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(line)))
            return file.read() == line
    except FileNotFoundError:
        return False


def _line_of(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(record), allow_nan=False) + "\n").encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, omitting lines truncated by a crash."""
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records
