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
from fm_core.errors import LeaseLostError, UnreachableError, UserError
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

    @classmethod
    def of(cls, error: Exception, checkpoint: Path) -> "SaveProblem":
        """The problem of writing a checkpoint with this name."""
        message = " ".join(str(error).split())
        number = error.errno if isinstance(error, OSError) else None
        return cls(
            f"cannot write checkpoint {checkpoint} ({message}); earlier checkpoints are intact: fix the "
            "cause and rerun",
            temporary=number not in FINAL,
        )


Result = SaveProblem | Exception | None
"""Of a save: None if the checkpoint is complete; an exception is to be raised on all ranks."""


def attempt(action: Callable[[], SaveProblem | None]) -> Result:
    """Run an action of rank 0 and return its problem, or the exception that all ranks are to raise."""
    try:
        return action()
    except UnreachableError as error:
        return SaveProblem(str(error), temporary=True)
    except (LeaseLostError, UserError) as error:
        return error
    except OSError as error:
        return SaveProblem(" ".join(str(error).split()), temporary=error.errno not in FINAL)


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

        directory = self.directory(step)

        def write() -> None:
            facts = write_tensors(directory, name, tensors, metadata, self.progress, content)
            self._written[tensors_file(name)] = facts

        return self._attempt(step, write)

    def record(self, facts: Mapping[str, dict[str, Any]]) -> None:
        """Record size and SHA-256, by name, of files that other ranks wrote into the checkpoint."""
        self._written.update(facts)

    def explained(self, problem: SaveProblem) -> SaveProblem:
        """A problem that another rank had. Raises LeaseLostError if the cause is a job that took over."""
        with suppress(OSError):  # report the error of the checkpoint, not this one
            self.place.fence.check()
        return problem

    def commit(self, state: TrainState) -> SaveProblem | None:
        """Make the checkpoint valid; it is durable under its name when this returns."""
        return self._attempt(state.step, lambda: self._commit(state))

    def discard(self, step: int) -> None:
        """Delete a checkpoint that could not be written."""
        shutil.rmtree(self.directory(step), ignore_errors=True)

    def directory(self, step: int) -> Path:
        """The directory of the checkpoint while it is being written."""
        return temporary(WRITING, self.folder / step_name(step), self.place)

    def _begin(self, step: int) -> None:
        self.local.claim()
        directory = self.directory(step)
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        self._written = {}

    def _commit(self, state: TrainState) -> None:
        directory, target = self.directory(state.step), self.folder / step_name(state.step)
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
            return self.explained(SaveProblem.of(error, self.folder / step_name(step)))
        return None
