"""Published architectures of the networks.

The U-Nets are those of Lipman et al. (2023), Table 3; the transformers are those of Peebles & Xie (2023)
and of SiT, Ma et al. (2024).
"""

from typing import Any, Literal

Size = Literal[
    "cifar10",
    "imagenet32",
    "imagenet64",
    "imagenet128",
    "DiT-S/2",
    "DiT-S/4",
    "DiT-B/2",
    "DiT-B/4",
    "DiT-L/2",
    "DiT-L/4",
    "DiT-XL/2",
    "DiT-XL/4",
]


def _unet(
    channels: int, multipliers: tuple[int, ...], blocks: int, attention: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "kind": "unet",
        "channels": channels,
        "channel_multipliers": multipliers,
        "residual_blocks": blocks,
        "attention_resolutions": attention,
        "head_channels": 64,
    }


def _transformer(width: int, depth: int, heads: int, patch: int) -> dict[str, Any]:
    return {"kind": "transformer", "width": width, "depth": depth, "heads": heads, "patch": patch}


SIZES: dict[str, dict[str, Any]] = {
    "cifar10": _unet(256, (1, 2, 2, 2), 2, (16,)),
    "imagenet32": _unet(256, (1, 2, 2, 2), 3, (16, 8)),
    "imagenet64": _unet(192, (1, 2, 3, 4), 3, (32, 16, 8)),
    "imagenet128": _unet(256, (1, 1, 2, 3, 4), 3, (32, 16, 8)),
    **{f"DiT-S/{patch}": _transformer(384, 12, 6, patch) for patch in (2, 4)},
    **{f"DiT-B/{patch}": _transformer(768, 12, 12, patch) for patch in (2, 4)},
    **{f"DiT-L/{patch}": _transformer(1024, 24, 16, patch) for patch in (2, 4)},
    **{f"DiT-XL/{patch}": _transformer(1152, 28, 16, patch) for patch in (2, 4)},
}
