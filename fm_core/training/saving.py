"""Saving and loading in the training loop: validation loss, checkpoints, snapshots, and their failures."""

import logging

from fm_core.checkpoint import checkpoint_loader
from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import no_progress
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.writer import SaveProblem
from fm_core.errors import UnreachableError, UserError
from fm_core.run.directory import step_name
from fm_core.training.ema import power_name
from fm_core.training.hang_watchdog import FIRST_STEP_FACTOR, SAVE_FACTOR
from fm_core.training.trainer import Trainer

LOG = logging.getLogger(__name__)
NOT_SAVED = "checkpoint_problem"
"""Key in status.json: why the newest checkpoint could not be written; removed once one is."""


def load_checkpoint(trainer: Trainer) -> TrainState | None:
    """Load the newest checkpoint and return its state; None if the run never had one. See `load`."""
    if trainer.checkpoints and trainer.watchdog:
        trainer.checkpoints.progress = trainer.watchdog.progress
    return checkpoint_loader.load(
        trainer.sharded,
        trainer.checkpoints,
        trainer.recipe,
        trainer.completed,
        lambda at: trainer.heartbeat(at, SAVE_FACTOR),
    )


def save_snapshot(trainer: Trainer, state: TrainState, last: bool) -> None:
    """Start to save a snapshot of the averages; if that fails, it is retried at the next checkpoint."""
    names = [power_name(width) for width in trainer.train.ema_power_widths]
    _start(trainer, state, trainer.snapshots, names, last)


def save_checkpoint(trainer: Trainer, state: TrainState, scheduled: bool, last: bool) -> None:
    """Start to save a checkpoint, which is written while training continues; wait for the `last` one.

    If it cannot be written, training continues unless it is the last. The validation loss is measured for
    `scheduled` checkpoints, not for those of stop requests.
    """
    if trainer.validation and scheduled:
        trainer.heartbeat(f"the validation loss of step {state.step}", FIRST_STEP_FACTOR)
        loss = trainer.validation.loss(
            trainer.engine,
            trainer.objective,
            trainer.conditional,
            trainer.device,
            lambda: trainer.heartbeat(f"the validation loss of step {state.step}", FIRST_STEP_FACTOR),
        )
        state = state.model_copy(update={"held_out_loss": loss})
        if trainer.log:
            trainer.log.validation_line({"step": state.step, "images_seen": state.images_seen, "loss": loss})
    _start(trainer, state, trainer.checkpoints, None, last)
    if last:
        finish_saves(trainer)


def finish_saves(trainer: Trainer) -> None:
    """Wait until everything is written whose save was started; all ranks must call it."""
    if trainer.saver.step is not None:
        trainer.heartbeat(f"writing step {trainer.saver.step}", SAVE_FACTOR)
        trainer.saver.wait(trainer.watchdog.progress if trainer.watchdog else no_progress)
        take_saves(trainer)


def take_saves(trainer: Trainer) -> None:
    """Act on the results of saves that all ranks have finished; all ranks must call it after the same step.

    Raises what `CheckpointCatalog.finish` raises, and UserError if a last one could not be written.
    """
    for save in trainer.saver.take():
        if isinstance(save.result, Exception):
            raise save.result
        if save.parts != trainer.sharded.parts:
            trainer.snapshot_missing = save.result is not None
        elif trainer.log and not save.result:
            trainer.completed = trainer.log.facts["last_checkpoint"] = step_name(save.state.step)
            trainer.log.facts.pop(NOT_SAVED, None)
            trainer.log.status(save.state, now=True)
        if save.result:
            _report(trainer, save.state, save.result, save.last)


def _start(
    trainer: Trainer,
    state: TrainState,
    catalog: CheckpointCatalog | None,
    parts: list[str] | None,
    last: bool,
) -> None:
    if trainer.saver.step not in (None, state.step):
        finish_saves(trainer)  # its copy of the state is still being written
    trainer.heartbeat(f"copying step {state.step}", SAVE_FACTOR)
    # The metrics that a checkpoint covers must be on the disk before it becomes valid.
    before = trainer.log.sync if trainer.log else lambda: None
    trainer.saver.start(trainer.sharded, state, catalog, trainer.recipe, parts, last, before)


def _report(trainer: Trainer, state: TrainState, problem: SaveProblem, last: bool) -> None:
    """Report that a checkpoint could not be written. Raises UserError if no later one will follow."""
    if last:
        raise UnreachableError(problem.message) if problem.temporary else UserError(problem.message)
    if trainer.log:
        LOG.error("%s. Training continues; the next checkpoint is attempted as scheduled", problem.message)
        trainer.log.facts[NOT_SAVED] = problem.message
        trainer.log.status(state, now=True)
