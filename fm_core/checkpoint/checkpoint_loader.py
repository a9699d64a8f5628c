"""Load a checkpoint into a sharded training state; checkpoint_saver.py writes it.

Guarantees of both, tested with real processes:

- With the same number of processes a resumed run is bit-identical to an uninterrupted one: losses, weights,
  AdamW's moments, averages, batches.
- With any other number of processes, or another ZeRO stage, it has the same batches and noise, and losses
  equal up to rounding: a checkpoint says which elements its shards hold, and every start shards the complete
  tensors for its ranks. Only dropout differs: a mask is drawn for an entire micro-batch, keyed by its first
  stream position, so another number of ranks, or another micro_batch, draws other masks of the same
  probability.
- Whichever process is killed while a checkpoint is written, uploaded or removed, the next start loads the
  newest complete one. Rank 0 detects a damaged one by its hashes, for all ranks, reports it, and loads the
  one before it. If there are checkpoints and none is intact, that is an error.
- A run that has ever completed a checkpoint never starts at step 0 without train.start_over: if no checkpoint
  is found, the job fails and is restarted as if a store did not answer.
- Disk failures do not stop training: if a checkpoint cannot be written, all ranks get the problem. Only if
  another job or run owns the checkpoint root does the job end at once.

DeepSpeed's own files are not used because they are sharded for one number of processes and one stage,
pickled, spread over the hosts that wrote them, and can be converted to a Universal Checkpoint only where all
of them are in one place. These float32 tensors are fewer bytes than both, need no directory that hosts share,
and make every start the same.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import (
    RAW,
    checkpoint_directories,
    is_complete,
    no_progress,
    read_state,
    tensors_file,
)
from fm_core.checkpoint.optimizer_shards import is_sharded, opened_shards, problem_of_part
from fm_core.checkpoint.ownership import staging_folder
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.weights_file import read_recipe
from fm_core.config import RunConfig
from fm_core.errors import LeaseLostError, UnreachableError, UserError
from fm_core.run.directory import differences
from fm_core.storage.keyed_random import UNNAMED

Heartbeat = Callable[[str], None]
"""Called with a description of the next operation."""
ReadTensor = Callable[[str], Tensor]
"""Returns the full float32 tensor of a parameter by name; called on rank 0 only."""


class LoadedState(Protocol):
    """The tensors to load: named parts with one tensor per parameter, sharded among the ranks."""

    @property
    def parts(self) -> Sequence[str]:
        """Names of all parts, in the same order on all ranks; the first is RAW, the weights themselves.

        Each becomes a file of a checkpoint, `tensors_file(part)`, or a part of its optimizer shards.
        """
        ...

    def scatter(self, part: str, read: ReadTensor) -> None:
        """Fill this rank's shards of a part from full tensors; all ranks, however many, must call it."""
        ...

    def set_applied_steps(self, steps: int) -> None:
        """Set the number of optimizer steps that were applied; called after all parts were scattered."""
        ...


def load(
    sharded: LoadedState,
    checkpoints: CheckpointCatalog | None,
    recipe: dict[str, Any],
    completed: str | None = None,
    heartbeat: Heartbeat = no_progress,
) -> TrainState | None:
    """Resume from the newest checkpoint that is complete and matches its hashes.

    Only rank 0 is given `checkpoints`; it chooses and reads one, and all ranks get their shards from it.
    Returns None if there is no checkpoint and, according to the run's history, never was one; `completed`, on
    rank 0, names the last one that was.

    Raises, on all ranks:
        UserError: there are checkpoints but none is intact, or the newest belongs to another recipe or run.
        UnreachableError: the store does not answer, or checkpoints that existed are unavailable.
    """
    choice: list[Any] = [None, None]
    if checkpoints:
        choice = _choose(checkpoints, sharded.parts, recipe, completed)
    heartbeat("choosing a checkpoint")
    dist.broadcast_object_list(choice, src=0)
    directory, state = choice
    if isinstance(directory, Exception):
        raise directory
    if directory is None:
        return None
    for part in sharded.parts:
        heartbeat(f"loading {part}")
        with _reader(directory, part) as read:
            sharded.scatter(part, read)
    sharded.set_applied_steps(state.applied_steps)
    if checkpoints and state.processes != dist.get_world_size():
        print(f"{directory}: written by {state.processes} processes, resharded for {dist.get_world_size()}")
    return state


def check_compatible(directory: Path, recipe: dict[str, Any], parts: Sequence[str], shared: bool) -> None:
    """Check that a checkpoint is of this run and recipe and has all of these parts.

    `shared`: other runs may name the same checkpoint root, so the run's name must match as well; otherwise
    the name may have changed with a renamed directory. Raises UserError, which names every difference.
    """
    problems = incompatibilities(directory, recipe, shared)
    problems += filter(None, (problem_of_part(directory, part) for part in parts))
    if problems:
        raise UserError(
            f"{directory} is of another run: {'; '.join(problems)}; choose another train.checkpoint_root"
        )


def incompatibilities(directory: Path, recipe: dict[str, Any], shared: bool) -> list[str]:
    """Differences between the recipe of a checkpoint and this one, as messages."""
    theirs = read_recipe(directory / tensors_file(RAW))
    ours = json.loads(json.dumps(recipe))
    if not shared:
        ours.pop("run", None)
    for record in (ours, theirs):
        record["run.generator"] = record.pop("generator", UNNAMED)
    for section in ("run", "train", "order"):
        # Checkpoints of earlier versions record fewer keys of these sections.
        recorded = theirs.get(section, {})
        ours[section] = {key: value for key, value in ours.get(section, {}).items() if key in recorded}
        theirs[section] = {key: recorded[key] for key in ours[section]}
    return differences({key: theirs.get(key) for key in ours}, ours)


def adopt_staged(config: RunConfig, recipe: dict[str, Any]) -> None:
    """Move checkpoints that an earlier version staged in train.checkpoint_staging to the run's folder."""
    root = config.train.checkpoint_staging
    folder = staging_folder(config)
    for path in checkpoint_directories(Path(root)) if root else []:
        target = folder / path.name
        if is_complete(path) and not target.exists() and not incompatibilities(path, recipe, shared=True):
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def _choose(
    checkpoints: CheckpointCatalog, parts: Sequence[str], recipe: dict[str, Any], completed: str | None
) -> list[Any]:
    """Directory and state of the checkpoint to resume from, or an error."""
    try:
        directory = checkpoints.newest()
        if directory is None:
            return [_missing(checkpoints, completed) if completed else None, None]
        check_compatible(directory, recipe, parts, checkpoints.shared)
        checkpoints.adopt()
        return [directory, read_state(directory)]
    except (LeaseLostError, UserError) as error:
        return [_cause(checkpoints, error), None]
    except OSError as error:
        return [UnreachableError(f"{checkpoints.store.url}: {' '.join(str(error).split())}"), None]


def _cause(checkpoints: CheckpointCatalog, error: Exception) -> Exception:
    """The error, or a missing mount, which explains any other error."""
    try:
        checkpoints.access.check()
    except (LeaseLostError, UserError) as cause:
        return cause
    except OSError as cause:
        return UnreachableError(f"{checkpoints.store.url}: {' '.join(str(cause).split())}")
    return error


def _missing(checkpoints: CheckpointCatalog, completed: str) -> UnreachableError:
    return UnreachableError(
        f"train.checkpoint_root: no checkpoint in {checkpoints.store.url}, but this run has completed "
        f"{completed}: check that the disk is mounted and the URL is right. To start again from step 0, "
        "make it available and set train.start_over true; if it is lost, choose another run.name"
    )


@contextmanager
def _reader(directory: Path, part: str) -> Generator[ReadTensor]:
    """Return a reader of single tensors of a file; only rank 0 may call it."""
    if dist.get_rank() != 0:
        yield _refuse_to_read
        return
    path = directory / tensors_file(part)
    if not path.exists() and is_sharded(part):
        with opened_shards(directory, part) as shards:
            yield shards.get_tensor
        return
    with safe_open(path, framework="pt") as file:
        yield file.get_tensor


def _refuse_to_read(name: str) -> Any:
    raise AssertionError(f"{name}: only rank 0 reads checkpoints")
