"""Checkpoints that are whole or do not count.

A checkpoint is a directory step-XXXXXXXX of DeepSpeed's files, the averaged and the raw weights,
state.json, and COMPLETE, which names every file with its size and SHA-256 and is written last. A
directory without COMPLETE, or whose files do not match it, is never loaded.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fm_core.config import Section
from fm_core.errors import UserError
from fm_core.run.directory import differences, step_name
from fm_core.run.files import read_json, write_json
from fm_core.training.ema import Averages, whole_weights

COMPLETE = "COMPLETE"
RAW = "raw.safetensors"
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""DeepSpeed leaves its conversion scripts beside its checkpoints; raw.safetensors is the conversion."""


class TrainState(Section):
    """Where training stands; kept in state.json."""

    step: int = 0
    """Optimizer steps tried, skipped ones included."""
    applied_steps: int = 0
    """Steps whose update reached the weights."""
    images_seen: int = 0
    """Images of applied and skipped steps."""
    position: int = 0
    """Next position of the data stream."""
    seconds: float = 0.0
    """Wall time spent in training, over all sessions."""
    processes: int = 1
    """Processes that wrote the checkpoint."""
    interval_sums: tuple[str, ...] = ()
    """Sums for the metrics line in progress, rank by rank: float32 in hex, as a NaN is no JSON."""


def ema_file(decay: float) -> str:
    """File name of an average."""
    return f"ema-{decay:g}.safetensors"


def save(engine: Any, averages: Averages, state: TrainState, root: Path, recipe: dict[str, Any]) -> Path:
    """Write a checkpoint; all ranks must call it. `recipe` says what the weights belong to."""
    directory = root / step_name(state.step)
    first = dist.get_rank() == 0
    if first and directory.exists():
        shutil.rmtree(directory)
    dist.barrier()
    engine.save_checkpoint(str(root), tag=directory.name, save_latest=False)
    metadata = {"recipe": json.dumps({**recipe, "step": state.step, "images_seen": state.images_seen})}
    raw = whole_weights(engine)
    if first:
        for script in _SCRIPTS:
            (root / script).unlink(missing_ok=True)
        save_file(raw, directory / RAW, metadata)
    for decay in averages.shards:
        weights = averages.weights(decay)
        if first:
            save_file(weights, directory / ema_file(decay), metadata)
    dist.barrier()
    if first:
        write_json(directory / "state.json", state.model_dump())
        write_json(directory / COMPLETE, {"files": _written_out(directory)})
    dist.barrier()
    return directory


def load(engine: Any, averages: Averages, root: Path, recipe: dict[str, Any]) -> TrainState | None:
    """Continue from the newest checkpoint that is complete and matches its hashes.

    Rank 0 chooses, all ranks load the same. None if there is no checkpoint at all; UserError if
    there are some and none is whole, if it is of another recipe, or if another number of processes
    wrote it.
    """
    choice: list[Any] = [None]
    if dist.get_rank() == 0:
        choice = [_newest_whole(root)]
        if isinstance(choice[0], str):
            problem = _stranger(root / choice[0], recipe, [*averages.shards])
            choice = [UserError(problem)] if problem else choice
    dist.broadcast_object_list(choice, src=0)
    name = choice[0]
    if isinstance(name, UserError):
        raise name
    if name is None:
        return None
    directory = root / name
    state = read_state(directory)
    ranks = dist.get_world_size()
    if state.processes != ranks:
        raise UserError(
            f"{directory} was written by {state.processes} processes and this start has {ranks}; "
            f"set launch.processes to {state.processes}"
        )
    path, _ = engine.load_checkpoint(str(root), tag=name, load_lr_scheduler_states=False)
    if path is None:
        raise RuntimeError(f"DeepSpeed did not load {directory}")
    for decay in averages.shards:
        averages.load(decay, load_file(directory / ema_file(decay)))
    return state


def complete_steps(root: Path) -> list[int]:
    """Steps of the checkpoints that carry COMPLETE, oldest first."""
    marks = root.glob(f"step-*/{COMPLETE}")
    return sorted(int(mark.parent.name.removeprefix("step-")) for mark in marks)


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
        if _sha256(path) != facts["sha256"]:
            return f"{path} differs from its SHA-256"
    return None


def read_state(directory: Path) -> TrainState:
    """state.json of a checkpoint."""
    record = read_json(directory / "state.json") or {}
    record.pop("schema", None)
    try:
        return TrainState.model_validate(record)
    except ValidationError as error:
        raise UserError(f"{directory / 'state.json'} was written by another version: {error}") from None


def retain(root: Path, keep: int, newest: int) -> None:
    """Remove incomplete checkpoints and all but the last `keep` complete ones up to step `newest`.

    Later ones are those that were found damaged when this session went back behind them; were they
    counted, they would push out the good ones.
    """
    kept = {step_name(step) for step in [step for step in complete_steps(root) if step <= newest][-keep:]}
    for directory in root.glob("step-*"):
        if directory.name not in kept:
            # COMPLETE goes first: a removal that is cut short leaves nothing that counts.
            (directory / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(directory)


def _newest_whole(root: Path) -> str | UserError | None:
    steps = complete_steps(root)
    problem = None
    for step in reversed(steps):
        problem = verify(root / step_name(step))
        if problem is None:
            return step_name(step)
        print(f"warning: {problem}; trying an older checkpoint", flush=True)
    return UserError(f"no checkpoint under {root} is whole: {problem}") if steps else None


def _stranger(directory: Path, recipe: dict[str, Any], decays: list[float]) -> str | None:
    """Why a whole checkpoint is not of this run, or None."""
    with safe_open(directory / RAW, framework="pt") as file:
        theirs = json.loads(file.metadata()["recipe"])
    ours = json.loads(json.dumps(recipe))
    found = differences({key: theirs.get(key) for key in ours}, ours)
    found += [f"no {ema_file(decay)}" for decay in decays if not (directory / ema_file(decay)).exists()]
    if not found:
        return None
    return f"{directory} is of another model: {'; '.join(found)}; choose another train.checkpoint_root"


def _written_out(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file, once all are on the disk and not only in its cache."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != COMPLETE)
    for path in (*files, directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
