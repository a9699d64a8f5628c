"""Recovery from non-finite gradients: roll back once and skip the offending batches; abort if it recurs.

DeepSpeed skips a step whose gradient is not finite on any rank: neither weights nor averages change. Skipped
steps are counted. After train.skipped_limit consecutive ones, or a logging interval of only skipped steps,
training rolls back to the last checkpoint and continues at the current stream position; from then on, images
seen and position differ. If that happens again before a checkpoint without skipped steps was saved, training
aborts.
"""

import logging
from pathlib import Path

import torch.distributed as dist

from fm_core.checkpoint.train_state import TrainState
from fm_core.config import TrainSection
from fm_core.errors import NonFiniteGradientsError, UnrecoverableError
from fm_core.storage.atomic_files import read_json, write_json

LOG = logging.getLogger(__name__)


def check_skipped_steps(train: TrainSection, state: TrainState, logged: bool) -> None:
    """Raise NonFiniteGradientsError after too many skipped steps; `logged`: a logging interval ends here."""
    interval_skipped = logged and 1 < interval_steps(train, state.images_seen) <= state.skipped_in_a_row
    if interval_skipped or state.skipped_in_a_row >= train.skipped_limit:
        raise NonFiniteGradientsError(describe(state), state)


def interval_steps(train: TrainSection, images_seen: int) -> int:
    """Steps of the logging interval that ends at `images_seen`, including those of earlier sessions."""
    batch = train.global_batch
    multiple = (images_seen - batch) // train.log_images * train.log_images
    start = -(-multiple // batch) * batch
    return (images_seen - start) // batch


def describe(state: TrainState) -> str:
    """Describe the failure for a message."""
    return (
        f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, the last of them step "
        f"{state.step} (stream position {state.position:,}; {state.step - state.applied_steps} skipped)"
    )


def roll_back(failed: TrainState, checkpoint: TrainState | None, record: Path | None) -> TrainState:
    """Return the state to continue from: the last checkpoint's, at the stream position of the failed state.

    `record` is written on rank 0, so that a run that is killed before its next checkpoint continues from the
    same position.

    Raises:
        UnrecoverableError: training has not recovered since its last rollback, or there is no checkpoint.
    """
    if not may_roll_back(failed):
        raise UnrecoverableError(
            f"{describe(failed)}, after training had already rolled back once; check the data there, or "
            "start another run.name with train.init_from = this run and a lower train.learning_rate"
        )
    if checkpoint is None:
        raise UnrecoverableError(
            f"{describe(failed)}, and there is no checkpoint to roll back to; check data and model"
        )
    state = _rolled_back(checkpoint, failed.position, failed.rollbacks + 1)
    if record:
        LOG.warning("%s; rolled back to step %s, skipping that data", describe(failed), state.step)
        where = {"step": state.step, "position": state.position, "rollbacks": state.rollbacks}
        write_json(record, {**where, "because": describe(failed)})
    return state


def may_roll_back(state: TrainState) -> bool:
    """Whether training never rolled back, or has recovered since."""
    return state.skipped_at_rollback is None


def clear_rollback(state: TrainState) -> TrainState:
    """The state for a checkpoint; if no step since the last one was skipped, training may roll back again."""
    skipped = state.step - state.applied_steps
    if state.skipped_at_rollback in (None, skipped):
        return state.model_copy(update={"skipped_at_rollback": None})
    return state.model_copy(update={"skipped_at_rollback": skipped})


def _rolled_back(checkpoint: TrainState, position: int, rollbacks: int) -> TrainState:
    return checkpoint.model_copy(
        update={
            "position": position,
            "rollbacks": rollbacks,
            "skipped_in_a_row": 0,
            "skipped_at_rollback": checkpoint.step - checkpoint.applied_steps,
        }
    )


def restore_rollback(state: TrainState, record: Path | None) -> TrainState:
    """A checkpoint's state, moved past the skipped data if training had rolled back to it before a kill.

    All ranks must call it; rank 0 has the record.
    """
    shared = [read_json(record) if record else None]
    dist.broadcast_object_list(shared, src=0)
    before = shared[0]
    rollbacks = before.get("rollbacks", 1) if before else 0
    if before is None or before["step"] != state.step or state.rollbacks >= rollbacks:
        return state
    return _rolled_back(state, before["position"], rollbacks)
