"""The sample section: sampling images from a trained model."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fm_core.config.location import Location
from fm_core.config.section import Section


class SampleSection(Section):
    """Sampling images from a trained model."""

    images: int = Field(default=1_000, ge=1)
    """Number of images; image i depends only on (seed, i)."""
    batch: int = Field(default=250, ge=1)
    """Images solved in one batch; adaptive step sizes depend on it, so it is part of the evaluation protocol.
    """
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the noise of the samples."""
    weights: Location = "ema"
    """ema (the first of train.ema_decays), ema-<decay>, raw, or a .safetensors file of weights."""
    step: int | Literal["latest", "best"] = "latest"
    """Optimizer step of the checkpoint to sample from; best: the one with the lowest
    validation loss."""
    solver: str = "dopri5"
    """dopri5, euler, midpoint, heun2, rk4 or another method of torchdiffeq."""
    rtol: float | None = Field(default=None, gt=0)
    """Relative tolerance of an adaptive solver; by default 1e-5."""
    atol: float | None = Field(default=None, gt=0)
    """Absolute tolerance of an adaptive solver; by default 1e-5."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of a fixed-step solver."""
    guidance: float = Field(default=1.0, ge=0)
    """Scale of classifier-free guidance; 1: none. Other scales run the network twice per evaluation."""
    classes: tuple[int, ...] = ()
    """Classes to sample, cycled by image index; by default drawn from all classes by (seed, index)."""
    trajectories: int = Field(default=8, ge=0, le=64)
    """Images whose trajectories from noise are saved, from index 0; this costs no evaluations."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the network. bf16: bfloat16 weights; tf32: float32 weights, TF32 matrix products on GPUs
    (several times as fast as fp32); fp32: float32 throughout. The solver's state is always float32."""
    compile: bool = False
    """Compile the network with torch.compile for batches of sample.batch; the first batch takes minutes."""
    cuda_graphs: bool = False
    """With sample.compile: replay the network as one CUDA graph."""
    root: Location | None = None
    """fsspec URL for samples; by default samples in the run directory."""

    trust_code: bool = False
    """Import classes that are named only by the weights file, not by this configuration (also: --trust-code).
    Importing a module runs its code."""

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if not self.compile and self.set_without("compile", "cuda_graphs"):
            raise ValueError("sample.cuda_graphs does nothing without sample.compile: true")
        return self
