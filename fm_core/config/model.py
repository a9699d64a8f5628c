"""The model section: the network."""

from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator

from fm_core.config.section import Section
from fm_core.config.sizes import SIZES, Size

OF_KIND = {
    "unet": (
        "channels",
        "channel_multipliers",
        "residual_blocks",
        "attention_resolutions",
        "head_channels",
        "dropout",
        "scale_shift",
        "resample_with_residual_blocks",
    ),
    "transformer": ("patch", "width", "depth", "heads"),
}
"""Keys that apply to one kind of network only."""


class ModelSection(Section):
    """The network.

    Keys that are not set are derived from the resolution and the number of images; the defaults shown are
    those for the digits (8 x 8 pixels).
    """

    size: Size | None = None
    """A published architecture: it sets kind and the keys of that architecture, which can then be omitted.
    The U-Nets of Lipman et al. (2023), or a diffusion transformer of Peebles & Xie (2023) and its patch."""
    kind: Literal["unet", "transformer"] = "unet"
    """unet: the U-Net of Dhariwal and Nichol (2021); transformer: patches with adaLN-zero (DiT, SiT)."""
    channels: int = Field(default=32, ge=8)
    """unet: channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2)
    """unet: channels at each resolution, in multiples of model.channels."""
    residual_blocks: int = Field(default=1, ge=1)
    """unet: residual blocks at each resolution."""
    attention_resolutions: tuple[int, ...] = (4,)
    """unet: image sides, in pixels, at which attention follows each residual block."""
    head_channels: int = Field(default=32, ge=4)
    """unet: channels of one attention head."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """unet: probability of dropping an activation inside a residual block. The masks depend on
    how a batch is divided: they change with the number of processes and with micro_batch."""
    scale_shift: bool = True
    """unet: time and class modulate the normalized activations by scale and shift, not by addition."""
    resample_with_residual_blocks: bool = True
    """unet: change the resolution inside a residual block instead of by a strided convolution."""
    patch: int = Field(default=2, ge=1)
    """transformer: side of a patch in pixels; it must divide the side of the image."""
    width: int = Field(default=384, ge=16)
    """transformer: hidden size of a token; a multiple of 4."""
    depth: int = Field(default=12, ge=1)
    """transformer: number of blocks."""
    heads: int = Field(default=6, ge=1)
    """transformer: attention heads; they must divide model.width."""
    time_scale: float = Field(default=1000.0, gt=0)
    """Factor by which the time, 0 to 1, is multiplied before its sinusoidal embedding. Use 1 for weights of
    implementations that embed the time unscaled, such as torchcfm."""
    class_conditional: bool = False
    """Condition on the data set's labels."""

    @model_validator(mode="before")
    @classmethod
    def _apply_size(cls, keys: Any) -> Any:
        if not isinstance(keys, dict):
            return keys
        given = cast(dict[str, Any], keys)
        sized = SIZES.get(str(given.get("size")), {})
        # When a preset of another kind is overridden, its keys must not remain.
        kind = given.get("kind") or sized.get("kind")
        return {**(_defaults_of_other_kinds(kind) if kind else {}), **sized, **given}

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        for key, value in SIZES.get(self.size or "", {}).items():
            given = getattr(self, key)
            if given != value:
                raise ValueError(
                    f"model.{key} is {given}, but model.size {self.size} has {value}: remove one of the two, "
                    "or set model.size to null"
                )
        for key, default in _defaults_of_other_kinds(self.kind).items():
            if getattr(self, key) != default:
                raise ValueError(f"model.{key} is not a key of model.kind {self.kind}: remove it")
        return self


def _defaults_of_other_kinds(kind: str) -> dict[str, Any]:
    others = [key for other, keys in OF_KIND.items() if other != kind for key in keys]
    return {key: ModelSection.model_fields[key].default for key in others}
