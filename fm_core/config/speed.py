"""The train.speed section: ways to the same losses in less time."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fm_core.config.section import Section


class SpeedSection(Section):
    """Ways to the same losses, but for rounding, in less time. None of them belongs to what a run is."""

    compile: bool = False
    """Compile the network with torch.compile; the first step then takes minutes."""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """What the compiler tries; the second times kernels first. Modes with CUDA graphs are not offered:
    gradients, which ZeRO collects, would lie in a graph's memory."""
    compile_channels_last: bool = False
    """Make the compiler keep convolutions channels-last in the backward pass as well."""
    fused_optimizer: bool = True
    """AdamW as one kernel instead of one for each of its operations."""
    bucket_elements: int | None = Field(default=None, ge=1)
    """Gradient elements that are sent together; by default an eighth of the network's, 1 to 25 million."""
    overlap: bool = False
    """Send gradients while the backward pass goes on."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its convolutions and take the fastest. A resumed run may then round differently."""
    tf32: bool = False
    """Multiply float32 matrices with the precision of TF32 on GPUs that have it."""

    @model_validator(mode="after")
    def _the_compiler_is_on(self) -> Self:
        if not self.compile:
            for key in self.idle("compile", "compile_mode", "compile_channels_last"):
                raise ValueError(f"train.speed.{key} does nothing without train.speed.compile: true")
        return self
