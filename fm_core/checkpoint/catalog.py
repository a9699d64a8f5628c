"""Catalog of a run's checkpoints at train.checkpoint_root: list, latest, best, write, fetch.

At a local URL a checkpoint is written in place. For any other URL it is written into a local staging folder,
where it is valid immediately, and uploaded while training continues; resuming takes the newest of both.
Importing this module does not import torch.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fm_core.checkpoint.format import (
    COMPLETE,
    Progress,
    complete_steps,
    fingerprint_of,
    is_complete,
    no_progress,
    recorded_files,
    stored_files,
    stored_steps,
    stored_validation_loss,
    verify,
)
from fm_core.checkpoint.ownership import (
    WriteAccess,
    access_of,
    is_shared,
    local_access,
    staging_folder,
)
from fm_core.checkpoint.retention import Retention, best_step, remove_old, retain_local
from fm_core.checkpoint.set_aside import FETCHING, set_aside, temporary, tidy
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.uploader import CheckpointUploader
from fm_core.checkpoint.writer import CheckpointWriter, SaveProblem
from fm_core.config import RunConfig
from fm_core.errors import DamagedRecordError, UserError
from fm_core.run.directory import RunDirectory, step_name
from fm_core.run.fence import Fence, Unfenced
from fm_core.run.history import record_completed
from fm_core.storage.local_paths import local_path
from fm_core.storage.store import Store

if TYPE_CHECKING:
    from fm_core.checkpoint.writer import Content, Tensors

LOG = logging.getLogger(__name__)
SNAPSHOTS = "snapshots"


class CheckpointCatalog:
    """The checkpoints of one run. Only rank 0 has one to write with; any process may list."""

    def __init__(
        self,
        url: str,
        staging: Path,
        retention: Retention,
        shared: bool = False,
        access: WriteAccess | None = None,
        on_complete: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`staging` holds checkpoints that are to be uploaded to a store.

        `shared`: `url` is outside the run directory, so other runs may name it too. `access`: the right to
        write there. `on_complete` is called with the step of each checkpoint that was completed.
        """
        self.store = Store.at(url)
        self.folder = self.store.local or staging
        """Local folder that checkpoints are written to."""
        self.retention, self.shared = retention, shared
        self.access = access or WriteAccess(self.store)
        local = self.access if self.store.local else local_access(self.folder, self.access)
        self.writer = CheckpointWriter(self.folder, self.access, local)
        self.damaged: dict[int, str] = {}
        """Local checkpoints that were found damaged: the problem by step."""
        self.progress: Progress = no_progress
        self._on_complete = on_complete
        self.uploads = (
            None if self.store.local else CheckpointUploader(self.store, staging, retention, self.access)
        )

    def snapshots(self) -> "CheckpointCatalog":
        """The snapshots of the run's power-function averages, below its checkpoints; all of them are kept."""
        url = f"{self.store.url}/{SNAPSHOTS}"
        return CheckpointCatalog(url, self.folder / SNAPSHOTS, Retention(None), access=self.access)

    @classmethod
    def of(cls, config: RunConfig, fence: Fence | None = None) -> Self:
        """The checkpoints of a run; those that go to a store are staged in the run directory by default.

        Raises UserError for a URL with an unknown or unavailable protocol.
        """
        directory, train = RunDirectory(config), config.train
        url = directory.checkpoints
        retention = Retention(train.keep_checkpoints, train.keep_every_images)
        access = access_of(config, fence or Unfenced())

        def record(step: int) -> None:
            if access.identity:
                record_completed(directory.path, access.identity.id, step, url)

        return cls(url, staging_folder(config), retention, is_shared(config), access, record)

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
        """Fingerprint of each complete local checkpoint, by step; each write of a step has its own."""
        fingerprints: dict[int, str] = {}
        for step in complete_steps(self.folder):
            try:
                fingerprints[step] = fingerprint_of(self.folder / step_name(step))
            except FileNotFoundError:  # removed in the meantime
                continue
        return fingerprints

    def newest(self) -> Path | None:
        """A local folder that holds the newest intact checkpoint; None if there is no checkpoint at all.

        Reports every damaged one that it skips. Raises UserError if the checkpoint root belongs to another
        run, or if there are checkpoints and none is intact; UnreachableError if the store does not answer.
        """
        self.access.find()
        if self.folder.is_dir():
            tidy(self.folder, self.writer.local)
        local = set(complete_steps(self.folder))
        remote = set(stored_steps(self.store)) if self.uploads else set[int]()
        problem = None
        for step in sorted(local | remote, reverse=True):
            if step in local:
                problem = self._verify_local(step)
                if problem:
                    self.damaged[step] = problem
                    LOG.warning("%s; trying an older checkpoint", problem)
            if self.uploads and step in remote and (problem or step not in local):
                problem = self._fetch(step)
                if problem:
                    self.uploads.damaged[step] = problem
                    LOG.warning("%s; trying an older checkpoint", problem)
            if problem is None:
                if self.uploads:
                    self.uploads.catch_up(self._not_stored(step), newest=step)
                return self.folder / step_name(step)
        if problem:
            raise UserError(f"no checkpoint under {self.store.url} is intact: {problem}")
        return None

    def adopt(self) -> None:
        """Claim a checkpoint root without an owner whose newest checkpoint is known to be this run's."""
        if self.store.local:  # a store is claimed before the first upload
            self.access.may_create = True
            self.access.claim()

    def folder_of(self, step: int) -> Path:
        """A local folder with an intact checkpoint, fetched if necessary; UserError if it is damaged."""
        local = self.folder / step_name(step)
        problem = self._verify_local(step) if is_complete(local) or not self.uploads else self._fetch(step)
        if problem:
            raise UserError(problem)
        return local

    def catch_up(self, newest: int | None = None) -> None:
        """Upload what an earlier session could not upload, up to step `newest` where that is known."""
        if self.uploads:
            self.uploads.catch_up(self._not_stored(newest), newest=newest)

    def begin(self, step: int) -> SaveProblem | None:
        """Create an empty directory for a checkpoint of this step; return the problem, or None.

        Raises LeaseLostError, and UserError if the checkpoint root belongs to another run.
        """
        self.writer.progress = self.progress
        if self.uploads and self.uploads.refusal:
            raise self.uploads.refusal
        return self.writer.begin(step)

    def write(
        self, step: int, name: str, tensors: "Tensors", metadata: Mapping[str, str], content: "Content" = None
    ) -> SaveProblem | None:
        """Write one file of tensors of the checkpoint (see `write_tensors`); return the problem, or None."""
        return self.writer.write(step, name, tensors, metadata, content)

    def finish(self, state: TrainState) -> SaveProblem | None:
        """Make the checkpoint valid, remove old ones, start its upload; return the problem, or None.

        Raises as `begin`.
        """
        problem = self.writer.commit(state)
        if problem:
            return problem
        self.damaged.pop(state.step, None)
        try:
            self._on_complete(state.step)
        except (OSError, UserError) as error:
            # The next checkpoint is recorded again; until then, this one's COMPLETE has to suffice.
            LOG.warning("cannot record that step %s is complete: %s", state.step, error)
        if self.uploads:
            self.uploads.add(state.step)
        else:
            remove_old(
                lambda: retain_local(self.folder, self.retention, state.step, self.access, self.damaged)
            )
        return None

    def discard(self, step: int) -> None:
        """Delete a checkpoint that could not be written."""
        self.writer.discard(step)

    def wait(self, seconds: float) -> str | None:
        """Wait at most `seconds` until everything is uploaded; return why it is not, or None."""
        return self.uploads.wait(seconds) if self.uploads else None

    def close(self) -> None:
        """Stop uploading; a later session uploads the rest."""
        if self.uploads:
            self.uploads.close()

    def problem_of(self, name: str) -> str | None:
        """What is wrong with a checkpoint at train.checkpoint_root, or None; in a store, by file sizes."""
        if self.store.local:
            return verify(self.store.local / name)
        try:
            files = stored_files(self.store, name)
        except DamagedRecordError as error:
            return str(error)
        if files is None:
            return f"{self.store.url}/{name} is not complete"
        for file, facts in files.items():
            if self.store.size(f"{name}/{file}") != facts["bytes"]:
                return f"{self.store.url}/{name}/{file} does not have the size in {COMPLETE}"
        return None

    def _not_stored(self, newest: int | None = None) -> list[int]:
        """Steps up to `newest` whose checkpoints are complete locally but not in the store."""
        steps = [step for step in complete_steps(self.folder) if newest is None or step <= newest]
        return [step for step in steps if not self._is_stored(step)]

    def _is_stored(self, step: int) -> bool:
        """Whether the store has exactly this checkpoint, not an earlier one of the same step."""
        try:
            return stored_files(self.store, step_name(step)) == recorded_files(self.folder / step_name(step))
        except DamagedRecordError:
            return False

    def _verify_local(self, step: int) -> str | None:
        directory = self.folder / step_name(step)
        if verify(directory, self.progress):
            self.access.check()  # the directory may be unmounted, and mounted again by the second attempt
            return verify(directory, self.progress)
        return None

    def _fetch(self, step: int) -> str | None:
        """Fetch a checkpoint from the store into the local folder; return its problem, or None."""
        name = step_name(step)
        target = self.folder / name
        partial = temporary(FETCHING, target, self.access)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            files = stored_files(self.store, name)
            if files is None:
                return f"{self.store.url}/{name}/{COMPLETE} cannot be read"
            for file in (*files, COMPLETE):
                self.progress(f"fetching {self.store.url}/{name}/{file}")
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                self.store.fetch(f"{name}/{file}", partial / file)
        except FileNotFoundError as error:
            return f"{self.store.url}/{name}: {error} is missing"
        except DamagedRecordError as error:
            return str(error)
        problem = verify(partial, self.progress)
        if problem:
            return f"{self.store.url}/{name}: {problem}"
        if target.exists():
            set_aside(target, self.writer.local, self.damaged.pop(step, f"{target} is not complete"))
        partial.replace(target)
        return None


def newest_local_checkpoint(url: str) -> str | None:
    """Name of the newest complete checkpoint at a local URL; None if there is none or it is not local."""
    root = local_path(url)
    steps = complete_steps(root) if root else []
    return step_name(steps[-1]) if steps else None
