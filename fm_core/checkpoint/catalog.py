"""The checkpoints of a run, wherever train.checkpoint_root is: list, latest, best, write, fetch.

At a local URL a checkpoint is written where it stays. At any other URL it is written into a local staging
folder, where it is valid at once, and uploaded while training continues; resuming takes the newest of both
places. Importing this module does not import torch.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from safetensors import SafetensorError

from fm_core.checkpoint.format import (
    COMPLETE,
    commit,
    complete_steps,
    fingerprint_of,
    is_complete,
    recorded_files,
    remove,
    stored_files,
    stored_steps,
    stored_validation_loss,
    verify,
)
from fm_core.checkpoint.retention import Retention, best_step, remove_old, retain_local
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.uploader import CheckpointUploader
from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory, step_name
from fm_core.storage.local_paths import local_path
from fm_core.storage.store import Store

if TYPE_CHECKING:
    from torch import Tensor

SNAPSHOTS = "snapshots"


class CheckpointCatalog:
    """The checkpoints of one run. Rank 0 alone writes; anyone may list."""

    def __init__(self, url: str, staging: Path, retention: Retention, shared: bool = False) -> None:
        """`staging` holds checkpoints on their way to a store that is not local.

        `shared`: `url` is outside the run directory, so other runs may name it, too.
        """
        self.store = Store.at(url)
        self.folder = self.store.local or staging
        """Local folder that checkpoints are written to."""
        self.retention, self.shared = retention, shared
        self.uploads = None if self.store.local else CheckpointUploader(self.store, staging, retention)

    @classmethod
    def snapshots_of(cls, config: RunConfig) -> Self:
        """The snapshots of a run's power-function averages; all of them stay."""
        run = cls.of(config)
        return cls(f"{run.store.url}/{SNAPSHOTS}", run.folder / SNAPSHOTS, Retention(None))

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """The checkpoints of a run; those that go to a store are staged in the run directory by default.

        Raises UserError for a URL with an unknown or unavailable protocol.
        """
        directory, train = RunDirectory(config), config.train
        retention = Retention(train.keep_checkpoints, train.keep_every_images)
        return cls(
            directory.checkpoints, staging_folder(config), retention, shared=train.checkpoint_root is not None
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, staged or stored, oldest first."""
        remote = stored_steps(self.store) if self.uploads else []
        return sorted({*complete_steps(self.folder), *remote})

    def stored_steps(self) -> list[int]:
        """Steps of the complete checkpoints at train.checkpoint_root, oldest first."""
        return stored_steps(self.store)

    def best_stored_step(self) -> int | None:
        """The step of the lowest validation loss at train.checkpoint_root; None if none was measured."""
        losses = {step: stored_validation_loss(self.store, step) for step in self.stored_steps()}
        return best_step([TrainState(step=step, held_out_loss=loss) for step, loss in losses.items()])

    def fingerprints(self) -> dict[int, str]:
        """For each complete local checkpoint, by step, what tells it from another one of the same step."""
        fingerprints: dict[int, str] = {}
        for step in complete_steps(self.folder):
            try:
                fingerprints[step] = fingerprint_of(self.folder / step_name(step))
            except FileNotFoundError:  # it was removed meanwhile
                continue
        return fingerprints

    def newest(self) -> Path | None:
        """A local folder that holds the newest intact checkpoint; None if there is no checkpoint at all.

        Reports every damaged one on the way. Raises UserError if there are checkpoints and none is intact,
        UnreachableError if the store does not answer.
        """
        local = set(complete_steps(self.folder))
        remote = set(stored_steps(self.store)) if self.uploads else set[int]()
        problem = None
        for step in sorted(local | remote, reverse=True):
            for get in (
                *([self._verify_local] if step in local else []),
                *([self._fetch] if step in remote else []),
            ):
                problem = get(step)
                if problem is None:
                    if self.uploads:
                        self.uploads.catch_up(self._not_stored(step), newest=step)
                    return self.folder / step_name(step)
                print(f"warning: {problem}; trying an older checkpoint", flush=True)
        if problem:
            raise UserError(f"no checkpoint under {self.store.url} is intact: {problem}")
        return None

    def folder_of(self, step: int) -> Path:
        """A local folder that holds an intact checkpoint, fetched if need be; UserError if damaged."""
        local = self.folder / step_name(step)
        problem = self._verify_local(step) if is_complete(local) or not self.uploads else self._fetch(step)
        if problem:
            raise UserError(problem)
        return local

    def catch_up(self, newest: int | None = None) -> None:
        """Upload what an earlier session could not, up to the step `newest` where that is known."""
        if self.uploads:
            self.uploads.catch_up(self._not_stored(newest), newest=newest)

    def begin(self, step: int) -> str | None:
        """Make an empty directory for a checkpoint of this step; returns what failed, or None."""
        return _attempt(self.folder, lambda: self._clear(step))

    def write(
        self, step: int, name: str, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]
    ) -> str | None:
        """Write one file of tensors of the checkpoint; returns what failed, or None."""
        # Not at the top: torch takes seconds to import, which a flow need not wait for.
        from fm_core.checkpoint.weights_file import write_tensors

        directory = self.folder / step_name(step)
        return _attempt(directory, lambda: write_tensors(directory, name, tensors, metadata))

    def finish(self, state: TrainState) -> str | None:
        """Make the checkpoint valid, remove old ones, start its upload; returns what failed, or None."""
        directory = self.folder / step_name(state.step)
        problem = _attempt(directory, lambda: commit(directory, state))
        if problem is None:
            if self.uploads:
                self.uploads.add(state.step)
            else:
                remove_old(lambda: retain_local(self.folder, self.retention, newest=state.step))
        return problem

    def give_up(self, step: int) -> None:
        """Free the space of a checkpoint that could not be written."""
        shutil.rmtree(self.folder / step_name(step), ignore_errors=True)

    def wait(self, seconds: float) -> str | None:
        """Wait at most so long until everything is in the store; returns what is in the way, or None."""
        return self.uploads.wait(seconds) if self.uploads else None

    def close(self) -> None:
        """Stop uploading; a later session uploads what is left."""
        if self.uploads:
            self.uploads.close()

    def problem_of(self, name: str) -> str | None:
        """What is wrong with a checkpoint at train.checkpoint_root, or None; in a store, by file sizes."""
        if self.store.local:
            return verify(self.store.local / name)
        files = stored_files(self.store, name)
        if files is None:
            return f"{self.store.url}/{name} is not complete"
        for file, facts in files.items():
            if self.store.size(f"{name}/{file}") != facts["bytes"]:
                return f"{self.store.url}/{name}/{file} does not have the size in {COMPLETE}"
        return None

    def _not_stored(self, newest: int | None = None) -> list[int]:
        """Steps up to `newest` whose checkpoints are complete here and not in the store."""
        steps = [step for step in complete_steps(self.folder) if newest is None or step <= newest]
        return [step for step in steps if not self._is_stored(step)]

    def _is_stored(self, step: int) -> bool:
        """Whether the store has this very checkpoint, and not one of the same step that was damaged."""
        return stored_files(self.store, step_name(step)) == recorded_files(self.folder / step_name(step))

    def _clear(self, step: int) -> None:
        directory = self.folder / step_name(step)
        if directory.exists():
            remove(directory)
        directory.mkdir(parents=True)

    def _verify_local(self, step: int) -> str | None:
        return verify(self.folder / step_name(step))

    def _fetch(self, step: int) -> str | None:
        """Fetch a checkpoint from the store into the local folder; returns what is wrong with it, or None."""
        name = step_name(step)
        partial = self.folder / f".fetch-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = stored_files(self.store, name)
        if files is None:
            return f"{self.store.url}/{name}/{COMPLETE} cannot be read"
        try:
            for file in (*files, COMPLETE):
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                self.store.fetch(f"{name}/{file}", partial / file)
        except FileNotFoundError as error:
            return f"{self.store.url}/{name}: {error} is missing"
        problem = verify(partial)
        if problem:
            return f"{self.store.url}/{name}: {problem}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        partial.replace(self.folder / name)
        return None


def staging_folder(config: RunConfig) -> Path:
    """The local folder in which a run's checkpoints wait for their upload to a store."""
    return Path(config.train.checkpoint_staging or RunDirectory(config).path / "train" / "staging")


def newest_local_checkpoint(url: str) -> str | None:
    """Name of the newest complete checkpoint at a local URL; None if there is none or it is not local."""
    root = local_path(url)
    steps = complete_steps(root) if root else []
    return step_name(steps[-1]) if steps else None


def _attempt(where: Path, action: Callable[[], None]) -> str | None:
    try:
        action()
    except (OSError, SafetensorError) as error:
        message = " ".join(str(error).split())
        return (
            f"cannot write checkpoint {where} ({message}); earlier checkpoints are intact: "
            "fix the cause and rerun"
        )
    return None
