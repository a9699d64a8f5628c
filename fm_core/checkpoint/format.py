"""Which checkpoints count: files that are whole, or that do not count.

A checkpoint is a directory such as step-00001000 with files of weights, AdamW's moments, state.json, and
COMPLETE, which names every file with its size and SHA-256 and is written last. A directory without COMPLETE,
or whose files do not match it, is never loaded. Nothing in it is pickled, and nothing in it depends on how
many processes wrote it.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fm_core.checkpoint.train_state import TrainState, state_of
from fm_core.errors import UserError
from fm_core.run.directory import step_name
from fm_core.storage.atomic_files import read_json, write_json

COMPLETE = "COMPLETE"
STATE = "state.json"
RAW = "raw"
"""Name of the weights themselves, beside their averages."""


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay; the newest always does."""

    last: int | None
    """How many of the newest; None for all."""
    every_images: int | None = None
    """The first one at or after each multiple of so many images stays as well."""
    best: bool = True
    """So does the one with the lowest held-out loss."""

    def kept(self, states: Sequence[TrainState]) -> set[int]:
        """Steps that stay, of all that are complete."""
        states = sorted(states, key=lambda state: state.step)
        kept = {state.step for state in (states if self.last is None else states[-self.last :])}
        if self.every_images:
            firsts: dict[int, int] = {}
            for state in states:
                firsts.setdefault(state.images_seen // self.every_images, state.step)
            kept |= {step for multiple, step in firsts.items() if multiple}
        measured = [state for state in states if state.held_out_loss is not None]
        if self.best and measured:
            kept.add(min(measured, key=lambda state: (state.held_out_loss, -state.step)).step)
        return kept


def tensors_file(name: str) -> str:
    """Name of a file of tensors below a checkpoint's directory."""
    return f"{name}.safetensors"


def write_tensors(
    directory: Path, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one file of tensors into a checkpoint that is not complete yet."""
    path = directory / tensors_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, dict(metadata))


def commit(directory: Path, state: TrainState) -> None:
    """Make a checkpoint count: state.json, everything on the disk, COMPLETE last."""
    write_json(directory / STATE, state.model_dump())
    write_json(directory / COMPLETE, {"files": files_of(directory)})


def files_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file by name, once all are on the disk and not only in its cache."""
    found = sorted(directory.rglob("*"))
    files = [path for path in found if path.is_file() and path.name != COMPLETE]
    for path in (*files, *(path for path in found if path.is_dir()), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }


def verify(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    record = read_json(directory / COMPLETE)
    if record is None:
        return f"{directory} is not complete"
    for name, facts in record["files"].items():
        path = directory / name
        if not path.exists():
            return f"{path} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, not {facts['bytes']}"
        if file_sha256(path) != facts["sha256"]:
            return f"{path} differs from its SHA-256"
    return None


def complete_steps(root: Path) -> list[int]:
    """Steps of the checkpoints in a folder that carry COMPLETE, oldest first."""
    return sorted(step_of(mark.parent.name) for mark in root.glob(f"step-*/{COMPLETE}"))


def step_of(name: str) -> int:
    """The step in the name of a checkpoint."""
    return int(name.removeprefix("step-"))


def read_state(directory: Path) -> TrainState:
    """state.json of a checkpoint; UserError if another version wrote it."""
    return state_of(read_json(directory / STATE), str(directory / STATE))


def retain(root: Path, retention: Retention, newest: int) -> None:
    """Remove incomplete checkpoints, and complete ones that need not stay, up to step `newest`.

    Later ones are those that were found damaged when this session went back behind them; were they
    counted, they would push out the good ones.
    """
    states = [read_state_or_default(root, step) for step in complete_steps(root) if step <= newest]
    kept = {step_name(step) for step in retention.kept(states)}
    for directory in root.glob("step-*"):
        if directory.name not in kept:
            remove(directory)


def remove(directory: Path) -> None:
    """Remove a checkpoint. COMPLETE goes first: a removal that is cut short leaves nothing that counts."""
    (directory / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=False)


def read_state_or_default(root: Path, step: int) -> TrainState:
    """state.json of a checkpoint in a folder; its step alone where it cannot be read."""
    try:
        return read_state(root / step_name(step))
    except UserError:
        return TrainState(step=step)


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
