"""On-disk checkpoint format. A checkpoint is valid only if COMPLETE exists and its hashes match.

A checkpoint is a directory such as step-00001000 that holds files of float32 weights (raw.safetensors and one
ema-*.safetensors for each average), AdamW's moments (optimizer/, in shards, see optimizer_shards.py),
state.json, and COMPLETE. COMPLETE names every file with its size and SHA-256, the run, the job and its epoch,
and is written last. A directory without COMPLETE, or whose files do not match it, is never loaded. Nothing in
a checkpoint is pickled, and any number of processes can load it.

This module does not import torch, because the command line and the flows use it and must start quickly.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from fm_core.checkpoint.train_state import TrainState, parse_state
from fm_core.errors import DamagedRecordError, UserError
from fm_core.run.directory import step_name
from fm_core.storage.atomic_files import read_json, sync, write_json
from fm_core.storage.hashing import sha256_bytes, sha256_stream
from fm_core.storage.store import Store

COMPLETE = "COMPLETE"
STATE = "state.json"
RAW = "raw"
"""Name of the weights themselves, as opposed to their averages."""
OPTIMIZER = "optimizer"
"""Folder of AdamW's moments."""
TENSORS_SUFFIX = ".safetensors"
STEP_PREFIX = "step-"

Progress = Callable[[str], None]
"""Called with the next operation, at least once per file and every few megabytes."""


def no_progress(at: str) -> None:
    """Do nothing: the default callback for progress."""


def tensors_file(name: str) -> str:
    """Path of a file of tensors relative to the directory of its checkpoint."""
    return f"{name}{TENSORS_SUFFIX}"


def step_of(name: str) -> int:
    """The optimizer step in the name of a checkpoint directory."""
    return int(name.removeprefix(STEP_PREFIX))


def checkpoint_directories(root: Path) -> list[Path]:
    """Directories of checkpoints below a local folder, complete or not, in no particular order."""
    return [path for path in root.glob(f"{STEP_PREFIX}*") if re.fullmatch(rf"{STEP_PREFIX}\d+", path.name)]


def is_complete(directory: Path) -> bool:
    """Whether a local checkpoint has its COMPLETE file; hashes are not compared (see `verify`)."""
    return (directory / COMPLETE).exists()


def complete_steps(root: Path) -> list[int]:
    """Steps of the checkpoints in a local folder that have COMPLETE, oldest first."""
    return sorted(step_of(path.name) for path in checkpoint_directories(root) if is_complete(path))


def commit(
    directory: Path,
    state: TrainState,
    origin: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
    written: Mapping[str, dict[str, Any]] = {},
) -> None:
    """Make a checkpoint valid: write state.json, sync everything to the disk, write COMPLETE last.

    `written` has size and SHA-256 of files that were hashed when they were written.
    """
    write_json(directory / STATE, state.model_dump())
    seal(directory, origin, progress, written)


def seal(
    directory: Path,
    origin: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
    written: Mapping[str, dict[str, Any]] = {},
) -> None:
    """Write COMPLETE for the files that are in a directory; `origin` says which run and job wrote them."""
    files = _synced_files(directory, progress, written)
    write_json(directory / COMPLETE, {"files": files, **(origin or {})})
    sync(directory)


def recorded_files(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Size ("bytes") and SHA-256 ("sha256") of every file by name, from COMPLETE; None if it is missing.

    Raises DamagedRecordError (a UserError) if COMPLETE names a file outside of its checkpoint.
    """
    path = directory / COMPLETE
    try:
        record = read_json(path)
    except UserError as error:
        if "not JSON" in str(error):  # damaged, not written by another version
            raise DamagedRecordError(str(error)) from None
        raise
    return None if record is None else files_of(record, str(path))


def recorded_origin(directory: Path) -> dict[str, Any]:
    """Run ("run": id and name), "job" and "epoch" in COMPLETE; empty for an earlier version or without it."""
    return _origin_of(read_json(directory / COMPLETE) or {})


def files_of(record: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The files that a COMPLETE names, by name.

    Raises DamagedRecordError for names that lead outside of the checkpoint and for invalid hashes: a writer
    of the store must not be able to choose where a fetched file goes.
    """
    files = record.get("files")
    if not isinstance(files, dict):
        raise DamagedRecordError(f"{where} names no files")
    for name, facts in cast(dict[str, Any], files).items():
        parts = PurePosixPath(name).parts
        if (
            not parts
            or name.startswith("/")
            or {"..", COMPLETE} & {*parts}
            or re.search(r"[\\\x00-\x1f]", name)
        ):
            raise DamagedRecordError(f"{where}: {name!r} is not the name of a file of a checkpoint")
        size, digest = (facts.get("bytes"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        if not isinstance(size, int) or size < 0 or not re.fullmatch("[0-9a-f]{64}", str(digest)):
            raise DamagedRecordError(f"{where}: size and SHA-256 of {name} are missing or not valid")
    return cast(dict[str, dict[str, Any]], files)


def verify(directory: Path, progress: Progress = no_progress) -> str | None:
    """What is wrong with a local checkpoint, or None; reads every file. OSError if one is unreadable."""
    problem = size_problem(directory)
    if problem:
        return problem
    for name, facts in (recorded_files(directory) or {}).items():
        if _sha256(directory / name, progress) != facts["sha256"]:
            return f"{directory / name} differs from its SHA-256"
    return None


def size_problem(directory: Path) -> str | None:
    """What is wrong with a local checkpoint by COMPLETE and the sizes of its files, or None."""
    try:
        files = recorded_files(directory)
    except DamagedRecordError as error:
        return str(error)
    if files is None:
        return f"{directory} is not complete"
    for name, facts in files.items():
        path = directory / name
        if not path.exists():
            return f"{path} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, not {facts['bytes']}"
    return None


def fingerprint_of(directory: Path) -> str:
    """SHA-256 of COMPLETE, which identifies one write of a step. Raises FileNotFoundError."""
    return sha256_bytes((directory / COMPLETE).read_bytes())


def read_state(directory: Path) -> TrainState:
    """state.json of a local checkpoint; UserError if it is missing, damaged or of another version."""
    record = read_json(directory / STATE)
    if record is None:
        raise DamagedRecordError(f"{directory / STATE} is missing")
    return parse_state(record, str(directory / STATE))


def read_state_or_default(root: Path, step: int) -> TrainState:
    """state.json of a checkpoint in a folder; a state with only the step if it cannot be read."""
    try:
        return read_state(root / step_name(step))
    except UserError:
        return TrainState(step=step)


def remove(directory: Path) -> None:
    """Remove a checkpoint, COMPLETE first, so that an interrupted removal leaves an invalid checkpoint."""
    (directory / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=False)


def link_weights(source: Path, target: Path) -> None:
    """Hard-link the weights, state.json and COMPLETE of a checkpoint; copies on another file system.

    The moments are not included, so the copy can be sampled but not resumed. Raises FileNotFoundError if the
    checkpoint is removed in the meantime.
    """
    target.mkdir(parents=True)
    for path in (*source.glob(f"*{TENSORS_SUFFIX}"), source / STATE, source / COMPLETE):
        link_or_copy(path, target / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that is not possible. Raises FileNotFoundError."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system
        shutil.copy2(source, target)


def stored_names(store: Store) -> list[str]:
    """Names of the checkpoint directories in a store, complete or not, oldest first."""
    return [name for name in store.folders() if re.fullmatch(rf"{STEP_PREFIX}\d+", name)]


def stored_steps(store: Store) -> list[int]:
    """Steps of the checkpoints in a store that have COMPLETE, oldest first."""
    names = stored_names(store)
    return sorted(step_of(name) for name in names if store.size(f"{name}/{COMPLETE}") is not None)


def stored_files(store: Store, name: str) -> dict[str, dict[str, Any]] | None:
    """`recorded_files` for a checkpoint in a store; also None if COMPLETE is not a JSON object."""
    return files_of(record, f"{store.url}/{name}/{COMPLETE}") if (record := _stored(store, name)) else None


def stored_origin(store: Store, name: str) -> dict[str, Any]:
    """`recorded_origin` for a checkpoint in a store."""
    return _origin_of(_stored(store, name) or {})


def stored_state(store: Store, step: int) -> TrainState | None:
    """state.json of a checkpoint in a store; None where it is missing, damaged or of another version."""
    where = f"{step_name(step)}/{STATE}"
    try:
        record = json.loads(store.read_bytes(where))
        return parse_state(record, where) if isinstance(record, dict) else None
    except (FileNotFoundError, ValueError, UserError):
        return None


def stored_validation_loss(store: Store, step: int) -> float | None:
    """The validation loss in the state.json of a checkpoint in a store, of any version; None without one."""
    try:
        return json.loads(store.read_bytes(f"{step_name(step)}/{STATE}")).get("held_out_loss")
    except (FileNotFoundError, ValueError):
        return None


def _stored(store: Store, name: str) -> dict[str, Any] | None:
    """The content of COMPLETE in a store; None if it is missing or cannot be read."""
    try:
        record = json.loads(store.read_bytes(f"{name}/{COMPLETE}"))
    except (FileNotFoundError, ValueError):
        return None
    return cast(dict[str, Any], record) if isinstance(record, dict) and "files" in record else None


def _origin_of(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("run", "job", "epoch") if key in record}


def _synced_files(
    directory: Path, progress: Progress, written: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Sync all files to the disk and return the size and SHA-256 of each by name.

    Raises OSError if one is missing or does not have the size with which it was written.
    """
    # Also by name, because a file server may not list yet what another host has written.
    named = {directory / name for name in written}
    paths = sorted({*directory.rglob("*"), *named})
    files = [path for path in paths if path in named or (path.is_file() and path.name != COMPLETE)]
    for path in (*files, *(path for path in paths if path.is_dir()), directory):
        progress(f"writing {path} to the disk")
        sync(path)
    facts: dict[str, dict[str, Any]] = {}
    for path in files:
        name, size = str(path.relative_to(directory)), path.stat().st_size
        facts[name] = written.get(name) or {"bytes": size, "sha256": _sha256(path, progress)}
        if facts[name]["bytes"] != size:
            raise OSError(errno.EIO, f"{path} has {size} bytes after {facts[name]['bytes']} were written")
    return facts


def _sha256(path: Path, progress: Progress) -> str:
    with path.open("rb") as file:
        return sha256_stream(file, lambda: progress(f"hashing {path}"))
