"""Checkpoint writer for a local folder: a checkpoint has a name of its job until a rename makes it valid."""

import errno
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm_core.checkpoint.format import Progress, commit, no_progress, tensors_file
from fm_core.checkpoint.ownership import WriteAccess
from fm_core.checkpoint.set_aside import WRITING, set_aside, temporary
from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import UnreachableError
from fm_core.run.directory import step_name
from fm_core.storage.atomic_files import sync

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Mapping[str, Tensor]
    Content = Iterable[Tensor] | None

FINAL = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL}
"""Errors that do not resolve without intervention."""


@dataclass(frozen=True)
class SaveProblem:
    """Why a checkpoint could not be written."""

    message: str
    temporary: bool
    """Whether it may be temporary: space, I/O, an unavailable folder."""


class CheckpointWriter:
    """Writes the checkpoints of one folder; each method returns the problem, or None.

    LeaseLostError (the fence) and UserError (the owner of the root) are raised.
    """

    def __init__(self, folder: Path, place: WriteAccess, local: WriteAccess) -> None:
        """`place` is train.checkpoint_root; `local` the folder, where that is a staging folder."""
        self.folder, self.place, self.local = folder, place, local
        self.progress: Progress = no_progress
        self._written: dict[str, dict[str, Any]] = {}
        """Size and SHA-256 of the files of tensors of the checkpoint that is being written."""

    def begin(self, step: int) -> SaveProblem | None:
        """Create an empty directory for a checkpoint of this step."""
        return self._attempt(step, lambda: self._begin(step))

    def write(
        self, step: int, name: str, tensors: "Tensors", metadata: Mapping[str, str], content: "Content" = None
    ) -> SaveProblem | None:
        """Write one file of tensors of the checkpoint; `content` is that of `write_tensors`."""
        # Not imported at the top, because torch takes seconds to import and flows do not need it.
        from fm_core.checkpoint.weights_file import write_tensors

        directory = self._directory(step)

        def write() -> None:
            facts = write_tensors(directory, name, tensors, metadata, self.progress, content)
            self._written[tensors_file(name)] = facts

        return self._attempt(step, write)

    def commit(self, state: TrainState) -> SaveProblem | None:
        """Make the checkpoint valid; it is durable under its name when this returns."""
        return self._attempt(state.step, lambda: self._commit(state))

    def discard(self, step: int) -> None:
        """Delete a checkpoint that could not be written."""
        shutil.rmtree(self._directory(step), ignore_errors=True)

    def _directory(self, step: int) -> Path:
        return temporary(WRITING, self.folder / step_name(step), self.place)

    def _begin(self, step: int) -> None:
        self.local.claim()
        directory = self._directory(step)
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        self._written = {}

    def _commit(self, state: TrainState) -> None:
        directory, target = self._directory(state.step), self.folder / step_name(state.step)
        commit(directory, state, self.place.origin, self.progress, self._written)
        self.local.check()
        if target.exists():
            # Written by an earlier job, and this one did not resume from it: damaged, or from a discarded
            # branch.
            set_aside(target, self.local, f"{target} already existed when this run reached that step")
            self.local.check()
        directory.rename(target)
        sync(self.folder)

    def _attempt(self, step: int, action: Callable[[], None]) -> SaveProblem | None:
        try:
            action()
        except (OSError, UnreachableError) as error:
            with suppress(OSError):  # report the error of the checkpoint, not this one
                self.place.fence.check()  # the cause may be a successor that took over
            message = " ".join(str(error).split())
            number = error.errno if isinstance(error, OSError) else None
            return SaveProblem(
                f"cannot write checkpoint {self.folder / step_name(step)} ({message}); earlier checkpoints "
                "are intact: fix the cause and rerun",
                temporary=number not in FINAL,
            )
        return None
