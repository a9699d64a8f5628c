"""All checkpoints of a run, wherever train.checkpoint_root is.

At a local URL a checkpoint is written where it stays. At any other it is written whole into a local folder,
where it counts at once, and copied to the store beside training; resuming takes the newest of both places.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from safetensors import SafetensorError
from torch import Tensor

from fm_core.checkpoint.format import (
    COMPLETE,
    Retention,
    commit,
    complete_steps,
    remove,
    retain,
    verify,
    write_tensors,
)
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.uploader import CheckpointUploader, remote_files, remote_steps
from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory, step_name
from fm_core.storage.atomic_files import read_json
from fm_core.storage.store import Store

SNAPSHOTS = "snapshots"


class CheckpointCatalog:
    """The checkpoints of one run, read and written by rank 0 alone."""

    def __init__(self, url: str, staging: Path, retention: Retention, shared: bool = False) -> None:
        """`staging` holds checkpoints on their way to a store that is not local.

        `shared`: the place is not in the run directory, so that other runs may name it, too.
        """
        self.store = Store.at(url)
        self.folder = self.store.local or staging
        self.retention, self.shared = retention, shared
        self.uploads = None if self.store.local else CheckpointUploader(self.store, staging, retention)

    @classmethod
    def snapshots_of(cls, config: RunConfig) -> Self:
        """The snapshots of power-function averages of a run; all of them stay."""
        run = cls.of(config)
        return cls(f"{run.store.url}/{SNAPSHOTS}", run.folder / SNAPSHOTS, Retention(None))

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Those of a run; what goes to a store waits in the run directory. UserError for a bad URL."""
        directory, train = RunDirectory(config), config.train
        staging = Path(train.checkpoint_staging or directory.path / "train" / "staging")
        retention = Retention(train.keep_checkpoints, train.keep_every_images)
        return cls(directory.checkpoints, staging, retention, shared=train.checkpoint_root is not None)

    def newest(self) -> Path | None:
        """A local folder that holds the newest whole checkpoint; None if there is none at all.

        Every damaged one on the way is told. Raises UserError if there are some and none is whole, or if the
        store cannot be reached.
        """
        here = set(complete_steps(self.folder))
        there = set(remote_steps(self.store)) if self.uploads else set[int]()
        problem = None
        for step in sorted(here | there, reverse=True):
            for get in (
                *([self._local] if step in here else []),
                *([self._fetched] if step in there else []),
            ):
                problem = get(step)
                if problem is None:
                    if self.uploads:
                        self.uploads.catch_up(self._not_stored(step), newest=step)
                    return self.folder / step_name(step)
                print(f"warning: {problem}; trying an older checkpoint", flush=True)
        if problem:
            raise UserError(f"no checkpoint under {self.store.url} is whole: {problem}")
        return None

    def folder_of(self, step: int) -> Path:
        """A local folder that holds a complete checkpoint, fetched if need be; UserError if damaged."""
        here = self.folder / step_name(step) / COMPLETE
        problem = self._local(step) if here.exists() or not self.uploads else self._fetched(step)
        if problem:
            raise UserError(problem)
        return here.parent

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, here or in the store, oldest first."""
        there = remote_steps(self.store) if self.uploads else []
        return sorted({*complete_steps(self.folder), *there})

    def catch_up(self, newest: int | None = None) -> None:
        """Have copied what an earlier session could not, up to the step `newest`, where that is known."""
        if self.uploads:
            self.uploads.catch_up(self._not_stored(newest), newest=newest)

    def begin(self, step: int) -> str | None:
        """Make room for a checkpoint of this step; what failed, or None."""
        return _attempt(self.folder, lambda: self._clear(step))

    def write(
        self, step: int, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> str | None:
        """Write one of its files of tensors; what failed, or None."""
        directory = self.folder / step_name(step)
        return _attempt(directory, lambda: write_tensors(directory, name, tensors, metadata))

    def finish(self, state: TrainState) -> str | None:
        """Make it count, retire older ones, and have it copied to the store; what failed, or None."""
        directory = self.folder / step_name(state.step)
        problem = _attempt(directory, lambda: commit(directory, state))
        if problem is None:
            if self.uploads:
                self.uploads.add(state.step)
            else:
                retire(lambda: retain(self.folder, self.retention, newest=state.step))
        return problem

    def give_up(self, step: int) -> None:
        """Free the space of a checkpoint that could not be written."""
        shutil.rmtree(self.folder / step_name(step), ignore_errors=True)

    def wait(self, seconds: float) -> str | None:
        """Wait until everything is in the store, at most so long; what is in the way, or None."""
        return self.uploads.wait(seconds) if self.uploads else None

    def problem_of(self, name: str) -> str | None:
        """What is wrong with a checkpoint where it is to stay, or None: in a store by its files' sizes."""
        if self.store.local:
            return verify(self.store.local / name)
        files = remote_files(self.store, name)
        if files is None:
            return f"{self.store.url}/{name} is not complete"
        for file, facts in files.items():
            if self.store.size(f"{name}/{file}") != facts["bytes"]:
                return f"{self.store.url}/{name}/{file} has not the size in {COMPLETE}"
        return None

    def _not_stored(self, newest: int | None = None) -> list[int]:
        """Steps up to `newest` whose checkpoints are complete here and not in the store."""
        steps = [step for step in complete_steps(self.folder) if newest is None or step <= newest]
        return [step for step in steps if not self._is_stored(step)]

    def _is_stored(self, step: int) -> bool:
        """Whether the store has this very checkpoint, and not one of the same step that was damaged."""
        here = read_json(self.folder / step_name(step) / COMPLETE) or {}
        return remote_files(self.store, step_name(step)) == here["files"]

    def _clear(self, step: int) -> None:
        directory = self.folder / step_name(step)
        if directory.exists():
            remove(directory)
        directory.mkdir(parents=True)

    def _local(self, step: int) -> str | None:
        return verify(self.folder / step_name(step))

    def _fetched(self, step: int) -> str | None:
        """Fetch a checkpoint from the store into the folder; what is wrong with it, or None."""
        name = step_name(step)
        partial = self.folder / f".fetch-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = remote_files(self.store, name)
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


def retire(action: Callable[[], None]) -> None:
    """Remove old checkpoints; a failure to is told and costs space, not the run."""
    try:
        action()
    except (OSError, UserError) as error:
        print(f"warning: old checkpoints stay: {error}", flush=True)


def _attempt(where: Path, action: Callable[[], None]) -> str | None:
    try:
        action()
    except (OSError, SafetensorError) as error:
        told = " ".join(str(error).split())
        return (
            f"{where} could not be written ({told}); earlier checkpoints are whole, mend it and run it again"
        )
    return None
