"""Saving and loading in the training loop: validation loss, checkpoints, snapshots, and their failures."""

import logging

from fm_core.checkpoint import save_load
from fm_core.checkpoint.catalog import CheckpointCatalog
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
    return save_load.load(
        trainer.sharded,
        trainer.checkpoints,
        trainer.recipe,
        trainer.completed,
        lambda at: trainer.heartbeat(at, SAVE_FACTOR),
    )


def save_snapshot(trainer: Trainer, state: TrainState, last: bool) -> None:
    """Save a snapshot of the averages; if that fails, retry at the next checkpoint."""
    names = [power_name(width) for width in trainer.train.ema_power_widths]
    problem = _write(trainer, state, trainer.snapshots, names)
    trainer.snapshot_missing = problem is not None
    if problem:
        _report(trainer, state, problem, last)


def save_checkpoint(trainer: Trainer, state: TrainState, scheduled: bool, last: bool) -> None:
    """Save a checkpoint; if it cannot be written, training continues unless this is the `last` one.

    The validation loss is measured for `scheduled` checkpoints, not for those of stop requests.
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
    problem = _write(trainer, state, trainer.checkpoints)
    if problem:
        _report(trainer, state, problem, last)
    elif trainer.log:
        trainer.completed = trainer.log.facts["last_checkpoint"] = step_name(state.step)
        trainer.log.facts.pop(NOT_SAVED, None)
        trainer.log.status(state, now=True)


def _write(
    trainer: Trainer, state: TrainState, catalog: CheckpointCatalog | None, parts: list[str] | None = None
) -> SaveProblem | None:
    trainer.heartbeat(f"saving step {state.step}", SAVE_FACTOR)
    if catalog and trainer.watchdog:
        catalog.progress = trainer.watchdog.progress
    return save_load.save(
        trainer.sharded,
        state,
        catalog,
        trainer.recipe,
        parts,
        lambda at: trainer.heartbeat(f"{at}, saving step {state.step}", SAVE_FACTOR),
        # The metrics that a checkpoint covers must be on the disk before it becomes valid.
        trainer.log.sync if trainer.log else lambda: None,
    )


def _report(trainer: Trainer, state: TrainState, problem: SaveProblem, last: bool) -> None:
    """Report that a checkpoint could not be written. Raises UserError if no later one will follow."""
    if last:
        raise UnreachableError(problem.message) if problem.temporary else UserError(problem.message)
    if trainer.log:
        LOG.error("%s. Training continues; the next checkpoint is attempted as scheduled", problem.message)
        trainer.log.facts[NOT_SAVED] = problem.message
        trainer.log.status(state, now=True)
