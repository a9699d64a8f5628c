"""When no step can be applied: back to the last checkpoint once, past the data that did it; then stop.

DeepSpeed skips a step whose gradient is not finite on any rank: neither weights nor averages see it. That
is counted. After train.skipped_limit such steps in a row, or a logging interval of nothing else, training
goes back to the last checkpoint and continues with the stream position where it is now: images seen and
position part. If that happens again before a checkpoint of clean steps was made, it gives up, with the facts.
"""

from pathlib import Path

import torch.distributed as dist

from fm_core.checkpoint.train_state import TrainState
from fm_core.config import TrainSection
from fm_core.errors import NonFiniteGradientsError, UnrecoverableError
from fm_core.storage.atomic_files import read_json, write_json


def check(train: TrainSection, state: TrainState, logged: bool) -> None:
    """Raise NonFiniteGradientsError if it is time; `logged` says that a logging interval ends here."""
    whole_interval = logged and 1 < interval_steps(train, state.images_seen) <= state.skipped_in_a_row
    if whole_interval or state.skipped_in_a_row >= train.skipped_limit:
        raise NonFiniteGradientsError(facts(state), state)


def interval_steps(train: TrainSection, images_seen: int) -> int:
    """Steps of the logging interval that ends at `images_seen`, sessions before this one included."""
    batch = train.global_batch
    multiple = (images_seen - batch) // train.log_images * train.log_images
    began = -(-multiple // batch) * batch
    return (images_seen - began) // batch


def facts(state: TrainState) -> str:
    """What happened, for a person."""
    return (
        f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, the last of them step "
        f"{state.step} (stream position {state.position:,}; {state.step - state.applied_steps} skipped)"
    )


def continued(trouble: TrainState, found: TrainState | None, record: Path | None) -> TrainState:
    """The state to go on with: the last checkpoint's, at the troubled state's stream position.

    `record` is written on rank 0, so that a run that is killed before its next checkpoint goes on in the
    same way.

    Raises:
        UnrecoverableError: training went back before and has not recovered since, or there is no checkpoint.
    """
    if not may_go_back(trouble):
        raise UnrecoverableError(
            f"{facts(trouble)}, after going back to a checkpoint once already; look at the data there, or "
            "start another run.name with train.init_from = this run and a lower train.learning_rate"
        )
    if found is None:
        raise UnrecoverableError(
            f"{facts(trouble)}, and there is no checkpoint to go back to; look at data and model"
        )
    state = _gone_back(found, trouble.position, trouble.rollbacks + 1)
    if record:
        print(f"warning: {facts(trouble)}; back to step {state.step}, past that data", flush=True)
        where = {"step": state.step, "position": state.position, "rollbacks": state.rollbacks}
        write_json(record, {**where, "because": facts(trouble)})
    return state


def may_go_back(trouble: TrainState) -> bool:
    """Whether training never went back, or has recovered since."""
    return trouble.skipped_at_rollback is None


def recovered(state: TrainState) -> TrainState:
    """The state of a checkpoint: where no step since the last one was skipped, training may go back again."""
    skipped = state.step - state.applied_steps
    if state.skipped_at_rollback in (None, skipped):
        return state.model_copy(update={"skipped_at_rollback": None})
    return state.model_copy(update={"skipped_at_rollback": skipped})


def _gone_back(found: TrainState, position: int, rollbacks: int) -> TrainState:
    return found.model_copy(
        update={
            "position": position,
            "rollbacks": rollbacks,
            "skipped_in_a_row": 0,
            "skipped_at_rollback": found.step - found.applied_steps,
        }
    )


def recalled(state: TrainState, record: Path | None) -> TrainState:
    """A checkpoint's state, moved past bad data if training had gone back to it before it was killed.

    All ranks must call it; rank 0 has the record.
    """
    told = [read_json(record) if record else None]
    dist.broadcast_object_list(told, src=0)
    before = told[0]
    rollbacks = before.get("rollbacks", 1) if before else 0
    if before is None or before["step"] != state.step or state.rollbacks >= rollbacks:
        return state
    return _gone_back(state, before["position"], rollbacks)
