"""train.start_over: start training again at step 0, after setting existing checkpoints and metrics aside.

The key takes effect once: repeating the command, or a restart of its job, continues the new training. A start
without the key makes it effective again.
"""

import logging
from pathlib import Path

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.checkpoint_loader import incompatibilities
from fm_core.checkpoint.format import (
    checkpoint_directories,
    is_complete,
    recorded_origin,
    stored_names,
    stored_origin,
)
from fm_core.checkpoint.ownership import RunIdentity, begin_history
from fm_core.checkpoint.remote_removal import RemoteRemoval
from fm_core.checkpoint.set_aside import set_aside
from fm_core.config import RunConfig
from fm_core.errors import ForeignCheckpointsError, UnreachableError
from fm_core.run.directory import RunDirectory
from fm_core.run.fence import Fence
from fm_core.run.history import RunHistory, open_history, rearm_start_over, write_history
from fm_core.training.train_log import set_lines_aside

LOG = logging.getLogger(__name__)


def prepare_history(config: RunConfig, fence: Fence) -> RunHistory:
    """Apply train.start_over if it is set, on rank 0, and return the history of the run.

    Raises UserError if the checkpoint root holds checkpoints of another run, UnreachableError if a store does
    not answer or nothing of this run is visible there, LeaseLostError; OSError.
    """
    run = RunDirectory(config)
    _check_mounted(run, fence)
    begin_history(config)
    _check_mounted(run, fence)
    if not config.train.start_over:
        rearm_start_over(run.path)
        return open_history(run.path)
    history = open_history(run.path)
    if history.start_over_obeyed:
        LOG.info("train.start_over was applied by an earlier start; training continues")
        return history
    fence.check()
    number = history.start_overs + 1
    checkpoints = CheckpointCatalog.of(config, fence)
    if not checkpoints.access.find():
        _check_unowned(config, checkpoints, history)
    for catalog in (checkpoints, checkpoints.snapshots()):
        _set_all_aside(catalog)
        catalog.close()
    for name in ("DONE.json", "setback.json", "averages"):
        _rename(run.path / "train" / name, number)
    for name in ("metrics.jsonl", "held_out.jsonl"):
        set_lines_aside(run.path / "train" / name, step=0)
    update = {"completed_step": None, "completed_at": None, "start_overs": number, "start_over_obeyed": True}
    history = history.model_copy(update=update)
    write_history(run.path, history)
    LOG.warning("train.start_over: training starts at step 0; earlier checkpoints and metrics were renamed")
    return history


def _check_mounted(run: RunDirectory, fence: Fence) -> None:
    """Check that this job's lease is visible, so that an empty mount point is not taken for a new run."""
    try:
        fence.check()
    except OSError as error:
        raise UnreachableError(f"{run.path}: {error}; check that the run directory is mounted") from None


def _check_unowned(config: RunConfig, checkpoints: CheckpointCatalog, history: RunHistory) -> None:
    """Check that a checkpoint root without an owner record is mounted and has no other run's checkpoints."""
    store = checkpoints.store
    paths = [path for path in checkpoint_directories(checkpoints.folder) if is_complete(path)]
    names = stored_names(store) if checkpoints.uploads else []
    if history.completed_step is not None and not (paths or names):
        raise UnreachableError(
            f"train.start_over: no checkpoint in {store.url}, but this run has completed step "
            f"{history.completed_step}: check that the disk is mounted, or choose another run.name"
        )
    origins = {str(path): recorded_origin(path) for path in paths}
    origins |= {f"{store.url}/{name}": stored_origin(store, name) for name in names}
    recipe = {"run": {"name": config.run.name}}
    foreign = [
        *(place for place, origin in origins.items() if not RunIdentity(history.id, "").is_of(origin)),
        *(str(path) for path in paths if checkpoints.shared and incompatibilities(path, recipe, shared=True)),
    ]
    if foreign:
        raise ForeignCheckpointsError(
            f"train.start_over: {foreign[0]} is of another run; choose another train.checkpoint_root"
        )


def _rename(path: Path, number: int) -> None:
    if path.exists():
        path.rename(path.with_name(f"{path.stem}.set-aside-{number}{path.suffix}"))


def _set_all_aside(catalog: CheckpointCatalog) -> None:
    """Rename every checkpoint, locally and in the store, so that none is used or removed."""
    catalog.access.find()
    for path in checkpoint_directories(catalog.folder):
        set_aside(path, catalog.writer.local, "train.start_over")
    if catalog.uploads:
        for name in stored_names(catalog.store):
            RemoteRemoval(catalog.store, catalog.access).set_aside(name, "train.start_over")
