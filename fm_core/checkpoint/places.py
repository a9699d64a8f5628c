"""Where a run's checkpoints are, locally and in a store, and which run they belong to."""

import logging
from pathlib import Path
from typing import Any

from fm_core.checkpoint.format import checkpoint_directories, is_complete
from fm_core.checkpoint.ownership import RunIdentity, owner_of
from fm_core.config import RunConfig
from fm_core.run.directory import RunDirectory
from fm_core.run.history import open_history, read_history
from fm_core.storage.local_paths import local_path
from fm_core.storage.store import Store

LOG = logging.getLogger(__name__)


def identity_of(config: RunConfig) -> RunIdentity | None:
    """Which run the checkpoints of a configuration belong to; None before it was ever trained."""
    directory = RunDirectory(config)
    history = read_history(directory.path)
    return RunIdentity(history.id, config.run.name, str(directory.path.resolve())) if history else None


def is_shared(config: RunConfig) -> bool:
    """Whether train.checkpoint_root names a place outside of the run directory, as other runs may, too."""
    root = config.train.checkpoint_root
    local = local_path(root) if root else None
    inside = local is not None and local.resolve().is_relative_to(RunDirectory(config).path.resolve())
    return root is not None and not inside


def begin_history(config: RunConfig) -> None:
    """Write the history of a run that has none, before it is trained. Raises OSError, UserError."""
    directory = RunDirectory(config)
    known = None if is_shared(config) else owner_of(Store.at(directory.checkpoints))
    open_history(directory.path, known)


def staging_folder(config: RunConfig) -> Path:
    """The local folder in which a run's checkpoints wait for their upload to a store.

    Below train.checkpoint_staging each run has its own, by name and id.
    """
    if config.train.checkpoint_staging is None:
        return RunDirectory(config).path / "train" / "staging"
    identity = identity_of(config)
    name = f"{config.run.name}-{identity.id[:8]}" if identity else config.run.name
    return Path(config.train.checkpoint_staging) / name


def adopt_staged(config: RunConfig, recipe: dict[str, Any]) -> None:
    """Move what an earlier version staged directly in train.checkpoint_staging to this run's folder there."""
    # Not at the top: torch takes seconds to import.
    from fm_core.checkpoint.save_load import incompatibilities

    root = config.train.checkpoint_staging
    folder = staging_folder(config)
    for path in checkpoint_directories(Path(root)) if root else []:
        target = folder / path.name
        if is_complete(path) and not target.exists() and not incompatibilities(path, recipe, shared=True):
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(target)
            LOG.info("%s is now %s", path, target)
