"""The evaluate.online section: online evaluation of checkpoints during training."""

from pydantic import Field

from fm_core.config.section import Section


class OnlineEvalSection(Section):
    """Online evaluation: each new checkpoint is sampled and scored during training, at lowest priority."""

    images: int = Field(default=0, ge=0)
    """Images to sample from each checkpoint; 0 turns online evaluation off."""
    solver: str = "midpoint"
    """A fixed-step solver of torchdiffeq, dopri5, or flow_map for a flow map."""
    steps: int | None = Field(default=20, ge=1)
    """Steps of a fixed-step solver; null for dopri5."""
    processes: int = Field(default=1, ge=1)
    """Processes that sample."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each process."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the evaluation, e.g. a GPU that training does not use; by default as for
    training."""
