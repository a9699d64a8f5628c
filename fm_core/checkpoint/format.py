"""On-disk checkpoint format. A checkpoint is valid only if COMPLETE exists and its hashes match.

A checkpoint is a directory such as step-00001000 that holds files of float32 weights (raw.safetensors and one
ema-*.safetensors for each average), AdamW's moments (optimizer/), state.json, and COMPLETE. COMPLETE names
every file with its size and SHA-256 and is written last. A directory without COMPLETE, or whose files do not
match it, is never loaded. Nothing in a checkpoint is pickled, and nothing in it depends on the number of
processes that wrote it.

This module does not import torch: the command line and the flows, which start quickly, ask it too.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

from fm_core.checkpoint.train_state import TrainState, parse_state
from fm_core.errors import DamagedRecordError, UserError
from fm_core.run.directory import step_name
from fm_core.storage.atomic_files import read_json, write_json
from fm_core.storage.hashing import is_sha256, sha256_bytes, sha256_file
from fm_core.storage.local_paths import require_relative_name
from fm_core.storage.store import Store

COMPLETE = "COMPLETE"
STATE = "state.json"
RAW = "raw"
"""Name of the weights themselves, as opposed to their averages."""
OPTIMIZER = "optimizer"
"""Folder of AdamW's moments."""
TENSORS_SUFFIX = ".safetensors"
STEP_PREFIX = "step-"


def tensors_file(name: str) -> str:
    """Path of a file of tensors relative to the directory of its checkpoint."""
    return f"{name}{TENSORS_SUFFIX}"


def step_of(name: str) -> int:
    """The optimizer step in the name of a checkpoint directory."""
    return int(name.removeprefix(STEP_PREFIX))


def checkpoint_directories(root: Path) -> list[Path]:
    """Directories of checkpoints below a local folder, complete or not, in no particular order."""
    return list(root.glob(f"{STEP_PREFIX}*"))


def is_complete(directory: Path) -> bool:
    """Whether a local checkpoint has been written to its end; its hashes are not compared (`verify`)."""
    return (directory / COMPLETE).exists()


def complete_steps(root: Path) -> list[int]:
    """Steps of the checkpoints in a local folder that have COMPLETE, oldest first."""
    return sorted(step_of(path.name) for path in checkpoint_directories(root) if is_complete(path))


def commit(directory: Path, state: TrainState) -> None:
    """Make a checkpoint valid: write state.json, sync everything to the disk, write COMPLETE last."""
    write_json(directory / STATE, state.model_dump())
    seal(directory)


def seal(directory: Path) -> None:
    """Write COMPLETE for the files that are in a directory."""
    write_json(directory / COMPLETE, {"files": _synced_files(directory)})


def recorded_files(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Size ("bytes") and SHA-256 ("sha256") of every file by name, from COMPLETE; None if it is missing."""
    record = read_json(directory / COMPLETE)
    return None if record is None else checked_files(record["files"], str(directory / COMPLETE))


def checked_files(files: object, where: str) -> dict[str, dict[str, Any]]:
    """The files that a COMPLETE names, once every name leads below its folder and every hash is one.

    Raises DamagedRecordError, which names `where`; nothing was fetched or opened by these names.
    """
    if not isinstance(files, dict):
        raise DamagedRecordError(f"{where}: the record of its files is damaged")
    checked = cast(dict[str, dict[str, Any]], files)
    for name, facts in checked.items():
        require_relative_name(name, where)
        if not is_sha256(facts.get("sha256")):
            raise DamagedRecordError(f"{where}: the SHA-256 of {name} is not 64 hexadecimal digits")
    return checked


def verify(directory: Path) -> str | None:
    """What is wrong with a local checkpoint, or None; reads every file."""
    files = recorded_files(directory)
    if files is None:
        return f"{directory} is not complete"
    for name, facts in files.items():
        path = directory / name
        if not path.exists():
            return f"{path} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, not {facts['bytes']}"
        if sha256_file(path) != facts["sha256"]:
            return f"{path} differs from its SHA-256"
    return None


def fingerprint_of(directory: Path) -> str:
    """SHA-256 of COMPLETE: tells a checkpoint from any other of the same step. FileNotFoundError."""
    return sha256_bytes((directory / COMPLETE).read_bytes())


def read_state(directory: Path) -> TrainState:
    """state.json of a local checkpoint; UserError if another version wrote it."""
    return parse_state(read_json(directory / STATE), str(directory / STATE))


def read_state_or_default(root: Path, step: int) -> TrainState:
    """state.json of a checkpoint in a folder; a state with the step alone where it cannot be read."""
    try:
        return read_state(root / step_name(step))
    except UserError:
        return TrainState(step=step)


def remove(directory: Path) -> None:
    """Remove a checkpoint. COMPLETE goes first: an interrupted removal leaves an invalid checkpoint."""
    (directory / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=False)


def link_weights(source: Path, target: Path) -> None:
    """Hard-link the weights, state.json and COMPLETE of a checkpoint; copies on another file system.

    The moments stay behind, so the copy can be sampled but not continued. Raises FileNotFoundError if the
    checkpoint is removed meanwhile.
    """
    target.mkdir(parents=True)
    for path in (*source.glob(f"*{TENSORS_SUFFIX}"), source / STATE, source / COMPLETE):
        try:
            os.link(path, target / path.name)
        except FileNotFoundError:
            raise
        except OSError:  # another file system
            shutil.copy2(path, target / path.name)


def stored_names(store: Store) -> list[str]:
    """Names of the checkpoint directories in a store, complete or not, oldest first."""
    return [name for name in store.folders() if name.startswith(STEP_PREFIX)]


def stored_steps(store: Store) -> list[int]:
    """Steps of the checkpoints in a store that have COMPLETE, oldest first."""
    names = stored_names(store)
    return sorted(step_of(name) for name in names if store.size(f"{name}/{COMPLETE}") is not None)


def stored_files(store: Store, name: str) -> dict[str, dict[str, Any]] | None:
    """Size and SHA-256 of every file of a checkpoint in a store, as `recorded_files`; None if unreadable.

    Raises DamagedRecordError as `checked_files`.
    """
    try:
        files = json.loads(store.read_bytes(f"{name}/{COMPLETE}"))["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return checked_files(files, f"{store.url}/{name}/{COMPLETE}")


def stored_state(store: Store, step: int) -> TrainState:
    """state.json of a checkpoint in a store; a state with the step alone where it cannot be read."""
    where = f"{step_name(step)}/{STATE}"
    try:
        return parse_state(json.loads(store.read_bytes(where)), where)
    except (FileNotFoundError, ValueError, UserError):
        return TrainState(step=step)


def stored_validation_loss(store: Store, step: int) -> float | None:
    """The validation loss in the state.json of a checkpoint in a store, of any version; None without one."""
    try:
        return json.loads(store.read_bytes(f"{step_name(step)}/{STATE}")).get("held_out_loss")
    except (FileNotFoundError, ValueError):
        return None


def _synced_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file by name, once all are on the disk and not only in its cache."""
    paths = sorted(directory.rglob("*"))
    files = [path for path in paths if path.is_file() and path.name != COMPLETE]
    for path in (*files, *(path for path in paths if path.is_dir()), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
