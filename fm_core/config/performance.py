"""The train.speed section: performance options of training."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fm_core.config.section import Section


class PerformanceSection(Section):
    """Performance options. They change results only by rounding and are not part of the run's identity."""

    compile: bool = False
    """Compile the network with torch.compile; the first step then takes minutes."""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile; max-autotune benchmarks kernels first. Modes with CUDA graphs are not available,
    because the gradients that ZeRO collects would be in the graph's memory."""
    compile_channels_last: bool = False
    """Keep convolutions channels-last in the compiled backward pass as well."""
    fused_optimizer: bool = True
    """Run AdamW as one fused kernel."""
    bucket_elements: int | None = Field(default=None, ge=1)
    """Gradient elements per communication bucket; by default an eighth of the network, 1 to 25 million."""
    overlap: bool = False
    """Overlap gradient communication with the backward pass."""
    cudnn_benchmark: bool = False
    """Let cuDNN benchmark convolution algorithms and use the fastest. A resumed run may then round
    differently."""
    tf32: bool = False
    """Use TF32 for float32 matrix products on GPUs that support it."""

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if not self.compile:
            for key in self.set_without("compile", "compile_mode", "compile_channels_last"):
                raise ValueError(f"train.speed.{key} does nothing without train.speed.compile: true")
        return self
