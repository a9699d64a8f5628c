"""The evaluate.beside section: scores of checkpoints while training goes on."""

from pydantic import Field

from fm_core.config.section import Section


class OnlineEvalSection(Section):
    """Each new checkpoint is sampled and scored, at the lowest priority, while training goes on."""

    images: int = Field(default=0, ge=0)
    """Images to draw from each checkpoint; 0 leaves all of this out."""
    solver: str = "midpoint"
    """A fixed-step solver of torchdiffeq, or dopri5."""
    steps: int | None = Field(default=20, ge=1)
    """Steps of a fixed-step solver; null for dopri5."""
    processes: int = Field(default=1, ge=1)
    """Processes that draw."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each process."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the scoring, such as a GPU that does not train; by default that of training."""
