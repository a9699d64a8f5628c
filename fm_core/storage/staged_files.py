"""Staged files: files being written, under a process-specific name until they are complete."""

import os
import re
import socket
import uuid
from pathlib import Path

from fm_core.storage.local_paths import private_temporary_folder

_NAME = re.compile(r"\.([^.]+)\.(\d+)\.[0-9a-f]{8}\.partial$")


def staging_folder() -> Path:
    """Local folder for files that are to be uploaded."""
    return private_temporary_folder("flow-matching")


def stage_of(path: Path) -> Path:
    """A new name next to a path that contains the host and process that write it."""
    return path.parent / f".{path.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"


def remove_stale(folder: Path) -> None:
    """Delete the staged files of dead processes of this host in a folder and its direct subfolders."""
    for stage in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:
        match = _NAME.search(stage.name)
        if match and match[1] == _host() and not _alive(int(match[2])):
            stage.unlink(missing_ok=True)


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
