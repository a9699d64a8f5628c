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
"""Keys that only one kind of network has."""


class ModelSection(Section):
    """The network."""

    size: Size | None = None
    """A published network: it sets kind and the keys of its architecture, which then can be left out. The
    UNets of Lipman et al. (2023), or a diffusion transformer of Peebles & Xie (2023) with its patch."""
    kind: Literal["unet", "transformer"] = "unet"
    """unet: the U-Net of Dhariwal and Nichol (2021); transformer: patches, with adaLN-zero (DiT, SiT)."""
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
    how a batch is divided: another number of processes, or another micro_batch, draws others."""
    scale_shift: bool = True
    """unet: time and class modulate the normalised activations by scale and shift, not by addition."""
    resample_with_residual_blocks: bool = True
    """unet: change the resolution inside a residual block instead of by a strided convolution."""
    patch: int = Field(default=2, ge=1)
    """transformer: side of a patch in pixels; it must divide the image's."""
    width: int = Field(default=384, ge=16)
    """transformer: numbers of a token; a multiple of 4."""
    depth: int = Field(default=12, ge=1)
    """transformer: number of blocks."""
    heads: int = Field(default=6, ge=1)
    """transformer: attention heads; they must divide model.width."""
    time_scale: float = Field(default=1000.0, gt=0)
    """Factor of the time, which runs from 0 to 1, before its sines and cosines. 1 belongs to weights of
    implementations that embed the time itself, such as torchcfm's."""
    class_conditional: bool = False
    """Condition on the data set's labels."""

    @model_validator(mode="before")
    @classmethod
    def _lay_the_size_beneath(cls, keys: Any) -> Any:
        if not isinstance(keys, dict):
            return keys
        given = cast(dict[str, Any], keys)
        sized = SIZES.get(str(given.get("size")), {})
        # Where a preset of another kind is overridden, its keys must not stay behind.
        kind = given.get("kind") or sized.get("kind")
        return {**(_defaults_of_others(kind) if kind else {}), **sized, **given}

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        for key, value in SIZES.get(self.size or "", {}).items():
            found = getattr(self, key)
            if found != value:
                raise ValueError(
                    f"model.{key} is {found} and that of model.size {self.size} is {value}: leave one of "
                    "the two out, or set model.size to null"
                )
        for key, default in _defaults_of_others(self.kind).items():
            if getattr(self, key) != default:
                raise ValueError(f"model.{key} is no key of a {self.kind}: leave it out")
        return self


def _defaults_of_others(kind: str) -> dict[str, Any]:
    others = [key for other, keys in OF_KIND.items() if other != kind for key in keys]
    return {key: ModelSection.model_fields[key].default for key in others}
