"""Saving and continuing: the engine's tensors, whole, to and from a checkpoint; all ranks call both.

What is guaranteed, and tested with real processes:

- The same number of processes goes on to the bit: losses, weights, AdamW's moments, averages, batches.
- Any other number, and any other ZeRO stage, goes on with the same batches and noise, and losses equal but
  for rounding: a checkpoint holds whole tensors, which every start cuts for the ranks it has. Dropout alone
  differs: a mask is drawn for a micro-batch at once, by its first stream position, so that another number of
  ranks, or another micro_batch, draws other masks of the same probability.
- Whatever is killed while a checkpoint is written, copied or retired, the next start loads the newest
  complete one and no other. A damaged one is found by its hashes, on rank 0 for all ranks, and told; the
  one before it is taken; where none is whole it is an error.

Why not DeepSpeed's own files: they are cut for one number of processes and one stage, pickled, spread over
the hosts that wrote them, and turn into a Universal Checkpoint only where all of them lie in one place.
Whole float32 tensors are fewer bytes than both, need one writer, and make every start the same start.
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import RAW, read_state, tensors_file
from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import UserError
from fm_core.run.directory import differences, step_name
from fm_core.training.ema import ModelEMA
from fm_core.training.zero_state import (
    Read,
    Shards,
    float32_partitions,
    gather_full,
    moments,
    scatter,
    set_applied_steps,
    set_weights,
)

OPTIMIZER = "optimizer"
"""Folder of AdamW's moments in a checkpoint."""


def save(
    engine: Any,
    averages: ModelEMA,
    state: TrainState,
    checkpoints: CheckpointCatalog | None,
    recipe: dict[str, Any],
) -> None:
    """Write a checkpoint; `checkpoints` is there on rank 0, `recipe` says what the weights belong to.

    Raises UserError, on all ranks, if it cannot be written; then it does not count and earlier ones stay.
    """
    shards = {RAW: float32_partitions(engine), **_moments(engine), **averages.shards}
    save_parts(engine, shards, state, checkpoints, recipe)


def save_parts(
    engine: Any,
    parts: dict[str, Shards],
    state: TrainState,
    checkpoints: CheckpointCatalog | None,
    recipe: dict[str, Any],
) -> None:
    """Write these parts, whole, as a checkpoint; see `save`."""
    metadata = {"recipe": json.dumps({**recipe, "step": state.step, "images_seen": state.images_seen})}
    state = state.model_copy(update={"processes": dist.get_world_size()})
    problem = checkpoints.begin(state.step) if checkpoints else None
    for name, shards in parts.items():
        # After a failure too: the other ranks are in this call.
        tensors = gather_full(engine, shards, keep=checkpoints is not None)
        if checkpoints and not problem:
            problem = checkpoints.write(state.step, name, tensors, metadata)
    if checkpoints:
        problem = problem or checkpoints.finish(state)
        if problem:
            checkpoints.give_up(state.step)
    told = [problem]
    dist.broadcast_object_list(told, src=0)
    if told[0]:
        raise UserError(told[0])


def load(
    engine: Any, averages: ModelEMA, checkpoints: CheckpointCatalog | None, recipe: dict[str, Any]
) -> TrainState | None:
    """Continue from the newest checkpoint that is complete and matches its hashes.

    Rank 0 chooses and reads; all ranks get their shards from it. Returns None if there is no checkpoint.

    Raises, on all ranks:
        UserError: there are checkpoints but none is intact, or the newest belongs to another recipe.
        UnreachableError: the store does not answer.
    """
    choice: list[Any] = [None, None]
    if checkpoints:
        choice = _chosen(checkpoints, averages, recipe)
    dist.broadcast_object_list(choice, src=0)
    directory, state = choice
    if isinstance(directory, UserError):
        raise directory
    if directory is None:
        return None
    with _reader(directory, RAW) as read:
        set_weights(engine, read)
    for name, shards in {**_moments(engine), **averages.shards}.items():
        with _reader(directory, name) as read:
            scatter(engine, shards, read)
    set_applied_steps(engine, state.applied_steps)
    if checkpoints and state.processes != dist.get_world_size():
        print(f"{directory}: written by {state.processes} processes, cut again for {dist.get_world_size()}")
    return state


def _moments(engine: Any) -> dict[str, Shards]:
    return {f"{OPTIMIZER}/{name}": shards for name, shards in moments(engine).items()}


def _chosen(checkpoints: CheckpointCatalog, averages: ModelEMA, recipe: dict[str, Any]) -> list[Any]:
    """Directory and state of the checkpoint to continue from, or what is wrong."""
    try:
        directory = checkpoints.newest()
        if directory is None:
            return [None, None]
        check_compatible(directory, recipe, [*averages.shards], checkpoints.shared)
        return [directory, read_state(directory)]
    except UserError as error:
        return [error, None]
    except OSError as error:
        return [UserError(str(error)), None]


def check_compatible(directory: Path, recipe: dict[str, Any], averages: list[str], shared: bool) -> None:
    """Refuse to go on from a checkpoint of another run, of another recipe, or without these averages.

    `shared`: other runs may name the same place, so that the run's name must be the same as well; elsewhere
    it changes with a directory that is renamed. Raises UserError, which names every difference.
    """
    with safe_open(directory / tensors_file(RAW), framework="pt") as file:
        theirs = json.loads(file.metadata()["recipe"])
    ours = json.loads(json.dumps(recipe))
    if not shared:
        ours.pop("run", None)
    for section in ("run", "train", "order"):
        # A checkpoint of an earlier version says less of them.
        told = theirs.get(section, {})
        ours[section] = {key: value for key, value in ours.get(section, {}).items() if key in told}
        theirs[section] = {key: told[key] for key in ours[section]}
    found = differences({key: theirs.get(key) for key in ours}, ours)
    files = [f"{OPTIMIZER}/exp_avg", *averages]
    found += [f"no {tensors_file(name)}" for name in files if not (directory / tensors_file(name)).exists()]
    if found:
        raise UserError(
            f"{directory} is of another run: {'; '.join(found)}; choose another train.checkpoint_root"
        )


@contextmanager
def _reader(directory: Path, name: str) -> Generator[Read]:
    """Reads single tensors of a file; on ranks other than 0 it is never asked."""
    if dist.get_rank() != 0:
        yield _never
        return
    with safe_open(directory / tensors_file(name), framework="pt") as file:
        yield file.get_tensor


def _never(name: str) -> Any:
    raise AssertionError(f"{name}: rank 0 alone reads checkpoints")


def directory_name(state: TrainState) -> str:
    """Name of the checkpoint of a state."""
    return step_name(state.step)
