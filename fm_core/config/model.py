"""The model section: the network."""

from typing import Literal

from pydantic import Field

from fm_core.config.section import Section


class ModelSection(Section):
    """The network."""

    kind: Literal["unet"] = "unet"
    """unet: the U-Net of Dhariwal and Nichol (2021)."""
    channels: int = Field(default=32, ge=8)
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2)
    """Channels at each resolution, in multiples of model.channels."""
    residual_blocks: int = Field(default=1, ge=1)
    """Residual blocks at each resolution."""
    attention_resolutions: tuple[int, ...] = (4,)
    """Image sides, in pixels, at which attention follows each residual block."""
    head_channels: int = Field(default=32, ge=4)
    """Channels of one attention head."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping an activation inside a residual block."""
    scale_shift: bool = True
    """Time and class modulate the normalised activations by scale and shift, not by addition."""
    resample_with_residual_blocks: bool = True
    """Change the resolution inside a residual block instead of by a strided convolution."""
    class_conditional: bool = False
    """Condition on the data set's labels."""
