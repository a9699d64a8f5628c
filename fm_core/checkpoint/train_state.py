"""Training progress: the state.json of every checkpoint."""

from typing import Any

from pydantic import ValidationError

from fm_core.config import Section
from fm_core.errors import UserError


class TrainState(Section):
    """Everything besides tensors that a resumed run needs; images seen and stream position may differ."""

    step: int = 0
    """Optimizer steps attempted, skipped ones included."""
    applied_steps: int = 0
    """Steps whose update reached the weights."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last applied one."""
    images_seen: int = 0
    """Images of applied and skipped steps: the clock of schedules and intervals."""
    position: int = 0
    """Next position of the data stream; ahead of images_seen after a rollback, which skips bad data."""
    rollbacks: int = 0
    """How often training rolled back to a checkpoint because no step could be applied."""
    skipped_at_rollback: int | None = None
    """Skipped steps up to the last checkpoint, as long as training has not recovered since its rollback."""
    seconds: float = 0.0
    """Wall time spent in training, over all sessions."""
    processes: int = 1
    """Processes that wrote the checkpoint; any number can resume from it."""
    held_out_loss: float | None = None
    """Validation loss (mean over the validation images) at this step, where it was measured and finite."""
    interval_sums: tuple[str, ...] = ()
    """Sums for the metrics line in progress, rank by rank: float32 in hex, because JSON has no NaN."""


def parse_state(record: dict[str, Any] | None, where: str) -> TrainState:
    """The state in the record of a state.json.

    Raises UserError, which names the file `where`, if another version wrote it.
    """
    tree = {key: value for key, value in (record or {}).items() if key != "schema"}
    try:
        return TrainState.model_validate(tree)
    except ValidationError as error:
        message = " ".join(str(error).split())
        raise UserError(f"{where} was written by another version: {message}") from None
