"""Checkpoint retention: which checkpoints are kept, locally and in a store, and removal of the others."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fm_core.checkpoint.format import (
    checkpoint_directories,
    is_complete,
    read_state,
    recorded_origin,
    size_problem,
    step_of,
    stored_files,
    stored_names,
    stored_origin,
    stored_state,
)
from fm_core.checkpoint.ownership import RunIdentity, WriteAccess
from fm_core.checkpoint.remote_removal import RemoteRemoval
from fm_core.checkpoint.set_aside import remove_checkpoint, set_aside, tidy
from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import DamagedRecordError, UserError
from fm_core.run.directory import step_name
from fm_core.storage.store import Store

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints are kept; the newest always is."""

    last: int | None
    """How many of the newest; None for all."""
    every_images: int | None = None
    """The first one at or after each multiple of this number of images is kept as well."""
    best: bool = True
    """Whether to keep the one with the lowest validation loss."""

    def retained(self, states: Sequence[TrainState]) -> set[int]:
        """Steps to keep, given the states of all complete checkpoints."""
        states = sorted(states, key=lambda state: state.step)
        steps = {state.step for state in (states if self.last is None else states[-self.last :])}
        if self.every_images:
            firsts: dict[int, int] = {}
            for state in states:
                firsts.setdefault(state.images_seen // self.every_images, state.step)
            steps |= {step for multiple, step in firsts.items() if multiple}
        best = best_step(states)
        if self.best and best is not None:
            steps.add(best)
        return steps


def best_step(states: Sequence[TrainState]) -> int | None:
    """The step with the lowest validation loss, the later of two equal ones; None if none was measured."""
    measured = [state for state in states if state.held_out_loss is not None]
    if not measured:
        return None
    return min(measured, key=lambda state: (state.held_out_loss, -state.step)).step


def retain_local(
    root: Path,
    retention: Retention,
    newest: int,
    access: WriteAccess | None = None,
    damaged: Mapping[int, str] = {},
) -> None:
    """Remove complete checkpoints of this run that step `newest` supersedes and that are not to be kept.

    Every other directory is kept: later steps, and what cannot be read as complete. Only those that this job
    found `damaged` (problem by step), and older ones that were never completed, are set aside.

    Raises what `WriteAccess.check` raises; OSError.
    """
    access = access or WriteAccess(Store.at(str(root)))
    tidy(root, access, newest)
    states: list[TrainState] = []
    for directory in checkpoint_directories(root):
        step = step_of(directory.name)
        if step in damaged and step != newest:
            set_aside(directory, access, damaged[step])
        elif step < newest and not is_complete(directory):
            set_aside(directory, access, f"{directory} was never completed")
        elif step <= newest and proof_problem(directory, access.identity) is None:
            states.append(read_state(directory))
    retained = retention.retained(states)
    if newest not in retained:
        return  # the checkpoint that supersedes the others is unavailable
    for step in sorted({state.step for state in states} - retained):
        remove_checkpoint(root / step_name(step), access)


def proof_problem(directory: Path, identity: RunIdentity | None) -> str | None:
    """Why a superseded checkpoint must not be removed; None if it is complete and of this run.

    A checkpoint whose state cannot be read may be the best.
    """
    problem = size_problem(directory)
    if problem is None and identity and not identity.is_of(recorded_origin(directory)):
        return f"{directory} is of another run"
    try:
        read_state(directory)
    except UserError as error:
        return problem or str(error)
    return problem


def retain_remote(
    store: Store,
    retention: Retention,
    newest: int,
    access: WriteAccess | None = None,
    damaged: Mapping[int, str] = {},
) -> list[TrainState]:
    """`retain_local` for a store; returns the states of the checkpoints that are kept."""
    access = access or WriteAccess(store)
    names = stored_names(store)
    removal = RemoteRemoval(store, access)
    states: list[TrainState] = []
    for name in names:
        step = step_of(name)
        if step in damaged and step != newest:
            removal.set_aside(name, damaged[step])
            continue
        removal.recover(name)
        if step <= newest and _is_proven(store, name, access.identity):
            state = stored_state(store, step)
            states += [state] if state else []  # an unreadable one may be the best, so it is kept
    retained = retention.retained(states)
    if newest not in retained:
        return states
    for step in sorted({state.step for state in states} - retained):
        removal.remove(step_name(step))
    return [state for state in states if state.step in retained]


def _is_proven(store: Store, name: str, identity: RunIdentity | None) -> bool:
    try:
        files = stored_files(store, name)
    except DamagedRecordError:
        return False
    return files is not None and (identity is None or identity.is_of(stored_origin(store, name)))


def superfluous_staged(
    steps: Sequence[int], newest: int, waiting: Collection[int], copying: int | None, copied: Collection[int]
) -> list[int]:
    """Steps of staged checkpoints that are needed neither for an upload nor to resume, so can be removed.

    The newest, those that are queued or being uploaded and, until the newest is in the store, the one before
    it are needed.
    """
    older = [step for step in sorted(steps) if step < newest]
    needed = {*waiting, *([] if newest in copied else older[-1:])}
    if copying is not None and copying not in copied:
        needed.add(copying)
    return [step for step in older if step not in needed]


def remove_old(action: Callable[[], None]) -> None:
    """Run a removal of old checkpoints; a failure is only reported, because it costs nothing but space."""
    try:
        action()
    except (OSError, UserError) as error:
        LOG.warning("cannot remove old checkpoints: %s", error)
