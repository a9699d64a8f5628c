"""Names of checkpoints that are not, or no longer, valid: being written, being removed, or set aside.

The name of a directory that is being written or removed contains the epoch and the job, so that no other job
touches it. A removal renames the checkpoint, then checks that the job still holds its lease, then deletes: a
checkpoint taken from a successor by mistake is put back, by this job or by the next one.
"""

import logging
import re
import shutil
from contextlib import suppress
from pathlib import Path

from fm_core.checkpoint.format import STEP_PREFIX, is_complete, remove, step_of
from fm_core.checkpoint.ownership import WriteAccess
from fm_core.storage.atomic_files import sync

LOG = logging.getLogger(__name__)
WRITING, FETCHING, REMOVING = ".writing", ".fetching", ".removing"
ASIDE = "set-aside"
"""Directories whose names begin with this are never removed by the program."""
_TEMPORARY = re.compile(
    rf"(?P<kind>{WRITING}|{FETCHING}|{REMOVING})-(?P<name>{STEP_PREFIX}\d+)\.(?P<tag>e(?P<epoch>\d+)-.*)"
)


def temporary(kind: str, path: Path, access: WriteAccess) -> Path:
    """The path under which this job writes, fetches or removes a checkpoint."""
    return path.with_name(f"{kind}-{path.name}.{access.tag}")


def set_aside(path: Path, access: WriteAccess, reason: str) -> None:
    """Rename a checkpoint that must not be used, without deleting anything.

    Raises what `access.check` raises, FileNotFoundError if it is gone.
    """
    access.check()
    target = path.with_name(f"{ASIDE}-{path.name}.{access.tag}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{ASIDE}-{path.name}.{access.tag}-{number}")
    path.rename(target)
    try:
        access.check()
    except BaseException:
        put_back(target, path)
        raise
    sync(path.parent)
    LOG.warning("%s: set aside as %s, which is never removed automatically", reason, target.name)


def remove_checkpoint(path: Path, access: WriteAccess) -> None:
    """Remove a checkpoint that is known to be superseded; no error if it does not exist.

    Raises what `access.check` raises; the checkpoint is then unchanged.
    """
    access.check()
    removing = temporary(REMOVING, path, access)
    if removing.exists():
        remove(removing)
    try:
        path.rename(removing)
    except FileNotFoundError:
        return
    try:
        access.check()
    except BaseException:
        put_back(removing, path)
        raise
    remove(removing)


def put_back(removing: Path, path: Path) -> None:
    """Undo the renaming of a removal, unless the checkpoint exists again."""
    with suppress(OSError):  # the target is not empty: the checkpoint was written again
        removing.rename(path)


def tidy(root: Path, access: WriteAccess, newest: int | None = None) -> None:
    """Put back checkpoints that an interrupted removal left complete; remove what no job of this run needs.

    `newest` supersedes what earlier jobs wrote but did not rename into place; at a start, without it, such a
    checkpoint is valid if it is complete. Names of a later epoch are not touched.
    """
    for path in root.glob(".*-*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or int(match["epoch"]) > access.fence.epoch:
            continue
        kind, own, complete, target = (
            match["kind"],
            match["tag"] == access.tag,
            is_complete(path),
            root / match["name"],
        )
        superseded = target.exists() or (newest is not None and step_of(target.name) <= newest)
        if complete and not target.exists() and (kind == REMOVING or (kind == WRITING and newest is None)):
            access.check()
            put_back(path, target)
        elif (kind == REMOVING or not own) and (not complete or superseded):
            _discard(path, target, access)


def _discard(path: Path, checkpoint: Path, access: WriteAccess) -> None:
    """Rename a superfluous directory to a name of this job, then remove it."""
    removing = temporary(REMOVING, checkpoint, access)
    access.check()
    with suppress(FileNotFoundError):
        if path != removing:
            shutil.rmtree(removing, ignore_errors=True)
            path.rename(removing)
            access.check()
        remove(removing)
