"""Checkpoint retention: which checkpoints stay, locally and in a store, and removal of the others."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fm_core.checkpoint.format import (
    COMPLETE,
    checkpoint_directories,
    complete_steps,
    read_state_or_default,
    remove,
    stored_names,
    stored_state,
    stored_steps,
)
from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import UserError
from fm_core.run.directory import step_name
from fm_core.storage.store import Store


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay; the newest always does."""

    last: int | None
    """How many of the newest; None for all."""
    every_images: int | None = None
    """The first one at or after each multiple of this number of images stays as well."""
    best: bool = True
    """So does the one with the lowest validation loss."""

    def retained(self, states: Sequence[TrainState]) -> set[int]:
        """Steps that stay, given the states of all complete checkpoints."""
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


def retain_local(root: Path, retention: Retention, newest: int) -> None:
    """Remove incomplete checkpoints, and complete ones that need not stay, up to step `newest`.

    Later checkpoints were found damaged when this session resumed from one before them. They are removed too,
    and they are not counted: otherwise they would displace the intact ones.
    """
    states = [read_state_or_default(root, step) for step in complete_steps(root) if step <= newest]
    names = {step_name(step) for step in retention.retained(states)}
    for directory in checkpoint_directories(root):
        if directory.name not in names:
            remove(directory)


def retain_remote(store: Store, retention: Retention, newest: int) -> list[TrainState]:
    """As `retain_local` in a store; returns the states of the checkpoints that stay."""
    states = [stored_state(store, step) for step in stored_steps(store) if step <= newest]
    steps = retention.retained(states)
    names = {step_name(step) for step in steps}
    for name in stored_names(store):
        if name not in names:
            # COMPLETE goes first: an interrupted removal leaves an invalid checkpoint.
            store.remove(f"{name}/{COMPLETE}")
            store.remove_folder(name)
    return [state for state in states if state.step in steps]


def superfluous_staged(
    steps: Sequence[int], newest: int, waiting: Collection[int], copying: int | None, copied: Collection[int]
) -> list[int]:
    """Steps of staged checkpoints whose local space can be freed: they are not needed to copy or to resume.

    Kept are the newest, those that wait for their upload or are being copied and, until the newest is in
    the store, the one before it.
    """
    older = [step for step in sorted(steps) if step < newest]
    needed = {*waiting, *([] if newest in copied else older[-1:])}
    if copying is not None and copying not in copied:
        needed.add(copying)
    return [step for step in older if step not in needed]


def remove_old(action: Callable[[], None]) -> None:
    """Run a removal of old checkpoints; a failure is reported and costs space, not the run."""
    try:
        action()
    except (OSError, UserError) as error:
        print(f"warning: cannot remove old checkpoints: {error}", flush=True)
