"""Where training stands; kept in the state.json of every checkpoint."""

from typing import Any

from pydantic import ValidationError

from fm_core.config import Section
from fm_core.errors import UserError


class TrainState(Section):
    """Everything that a resumed run needs beside tensors. Images seen and position are two numbers."""

    step: int = 0
    """Optimizer steps tried, skipped ones included."""
    applied_steps: int = 0
    """Steps whose update reached the weights."""
    skipped_in_a_row: int = 0
    """Steps without an update since the last one with."""
    images_seen: int = 0
    """Images of applied and skipped steps: the clock of schedules and intervals."""
    position: int = 0
    """Next position of the data stream; ahead of images_seen where training went back past bad data."""
    rollbacks: int = 0
    """How often training went back to a checkpoint because no step could be applied."""
    skipped_at_rollback: int | None = None
    """Skipped steps up to the last checkpoint, as long as training has not recovered since it went back."""
    seconds: float = 0.0
    """Wall time spent in training, over all sessions."""
    processes: int = 1
    """Processes that wrote the checkpoint; any number can go on from it."""
    held_out_loss: float | None = None
    """Mean loss of the held-out images at this step, where it was measured and finite."""
    interval_sums: tuple[str, ...] = ()
    """Sums for the metrics line in progress, rank by rank: float32 in hex, as a NaN is no JSON."""


def state_of(record: dict[str, Any] | None, where: str) -> TrainState:
    """The state in the record of a state.json; UserError, which names `where`, for one of another version."""
    tree = {key: value for key, value in (record or {}).items() if key != "schema"}
    try:
        return TrainState.model_validate(tree)
    except ValidationError as error:
        told = " ".join(str(error).split())
        raise UserError(f"{where} was written by another version: {told}") from None
