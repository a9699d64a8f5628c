"""Defaults that depend on the data set: its name, the network for its resolution, the length of training.

A key that a file, an override or a preset sets is kept; only absent keys are derived. For the digits (8 x 8
pixels, 1,297 training images) the values are the defaults of the sections.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from fm_core.config.data import DataSection
from fm_core.config.model import ModelSection
from fm_core.config.run import NEW_GENERATOR
from fm_core.config.tree import RunConfig, merge, parse_config

UNET_KEYS = (
    "channels",
    "channel_multipliers",
    "residual_blocks",
    "attention_resolutions",
    "head_channels",
)
MODEL_KEYS: dict[str, tuple[str, ...]] = {"unet": UNET_KEYS, "transformer": ("patch",)}
"""By model.kind: keys of the network that are derived. A kind that is not listed has none."""
TRAIN_KEYS = ("images", "learning_rate", "ema_decays", "checkpoint_images")
DATA_KEYS = ("name", "validation_images")

SMALL_DATASET = 20_000
"""Data sets with fewer training images get a network of half the width."""
ATTENTION_SIDE = 16
"""Largest side, in pixels, of a resolution with attention."""
MAX_TOKENS = 1024
"""Largest number of patches of a transformer."""
LOG_IMAGES = 12_800
"""Derived numbers of images are multiples of this."""
SHORTEST, LONGEST_CHECKPOINT_SHARE = 128_000, 20
"""Minimum of train.images, and the number of checkpoints of a run at the default interval."""
LONG_RUN_STEPS = 10_000
"""Runs with at least this many steps average their weights over 10,000 steps instead of 1,000."""
FEW_IMAGES = 1_500
"""Sources with fewer images and no validation split use a tenth of them for validation instead of 500."""


@dataclass(frozen=True)
class DatasetSize:
    """What the defaults of a run depend on."""

    side: int
    """Height and width of the images in pixels."""
    images: int
    """Number of training images."""


def absent_keys(config: RunConfig) -> dict[str, list[str]]:
    """The keys, by section, that are derived because nothing sets them."""
    model = MODEL_KEYS.get(config.model.kind, ())
    names: dict[str, tuple[str, ...]] = {"model": model, "train": TRAIN_KEYS}
    if config.data.source.url:
        names["data"] = DATA_KEYS
    absent = {
        name: [key for key in keys if not getattr(config, name).given(key)] for name, keys in names.items()
    }
    return {name: keys for name, keys in absent.items() if keys}


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with nested values merged in; their keys count as set. Raises UserError."""
    return parse_config(merge(config.model_dump(), values), where="configuration with derived values")


def with_generator(config: RunConfig, recorded: RunConfig | None = None) -> RunConfig:
    """The configuration with run.generator set: by default that of `recorded`, or of new runs."""
    if config.run.generator is not None:
        return config
    generator = recorded.run.generator if recorded else None
    run = config.run.model_copy(update={"generator": generator or NEW_GENERATOR})
    return config.model_copy(update={"run": run})


def with_values_of(config: RunConfig, recorded: RunConfig) -> RunConfig:
    """The configuration with absent keys taken from the configuration of an earlier start."""
    values = {
        section: {key: getattr(getattr(recorded, section), key) for key in keys}
        for section, keys in absent_keys(config).items()
    }
    return with_values(config, values) if values else config


def with_derived(config: RunConfig, size: DatasetSize) -> RunConfig:
    """The configuration with the absent keys of network and training derived from the data set's size."""
    absent = absent_keys(config)
    absent.pop("data", None)
    if not absent:
        return config
    model = network_for(config.model, size, absent.get("model", ()))
    derived: dict[str, Any] = {"model": model}
    width = model.get("channels", config.model.channels) if config.model.kind == "unet" else None
    images = training_images(size) if "images" in absent.get("train", ()) else config.train.images
    values = {
        "images": max(images, config.train.warmup_images),
        "learning_rate": learning_rate_for(width),
        "ema_decays": (0.9999 if images // config.train.global_batch >= LONG_RUN_STEPS else 0.999,),
        "checkpoint_images": max(64_000, _rounded(images / LONGEST_CHECKPOINT_SHARE)),
    }
    derived["train"] = {key: values[key] for key in absent.get("train", ())}
    return with_values(config, derived)


def network_for(model: ModelSection, size: DatasetSize, keys: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """Values of `keys` of the model section for images of this size, consistent with keys that were given."""
    if model.kind != "unet":
        return {"patch": patch_for(size.side)} if "patch" in keys else {}
    plan: dict[str, Any] = {key: getattr(model, key) for key in UNET_KEYS}
    derived = unet_for(size)
    plan |= {
        key: derived[key] for key in keys if key in ("channels", "channel_multipliers", "residual_blocks")
    }
    if "attention_resolutions" in keys:
        plan["attention_resolutions"] = attention_for(size.side, plan["channel_multipliers"])
    if "head_channels" in keys:
        channels = plan["channels"]
        plan["head_channels"] = next((heads for heads in (64, 32) if channels % heads == 0), channels)
    return {key: plan[key] for key in keys}


def unet_for(size: DatasetSize) -> dict[str, Any]:
    """Base width, widths and residual blocks of the U-Net for images of this size."""
    widest = 64 if size.images < SMALL_DATASET else 128
    if size.side <= 8:
        channels, multipliers, blocks = 32, (1, 2), 1
    elif size.side <= 16:
        channels, multipliers, blocks = 64, (1, 2, 2), 2
    elif size.side <= 32:
        channels, multipliers, blocks = widest, (1, 2, 2, 2), 2
    elif size.side <= 64:
        channels, multipliers, blocks = widest, (1, 2, 3, 4), 2
    else:
        channels, multipliers, blocks = widest, (1, 1, 2, 3, 4, 4), 2
    return {
        "channels": channels,
        "channel_multipliers": multipliers[: len(sides_of(size.side, len(multipliers)))],
        "residual_blocks": blocks,
    }


def sides_of(side: int, count: int) -> list[int]:
    """At most `count` image sides, each half of the previous one, down to 4 pixels."""
    sides = [side]
    while len(sides) < count and sides[-1] % 2 == 0 and sides[-1] >= 8:
        sides.append(sides[-1] // 2)
    return sides


def attention_for(side: int, multipliers: tuple[int, ...]) -> tuple[int, ...]:
    """Image sides with attention: those from 8 to 16 pixels; 4 pixels for tiny images."""
    sides = [side // 2**level for level in range(len(multipliers))]
    if side <= 8:
        return tuple(s for s in sides if s == 4)
    return tuple(s for s in sides if 8 <= s <= min(ATTENTION_SIDE, side // 2))


def patch_for(side: int) -> int:
    """Side of a transformer's patch in pixels: at most 1,024 patches, or 1 if nothing else divides."""
    patches = [patch for patch in (2, 4, 8, 16, 32) if side % patch == 0]
    return next(
        (patch for patch in patches if (side // patch) ** 2 <= MAX_TOKENS), patches[-1] if patches else 1
    )


def learning_rate_for(width: int | None) -> float:
    """Peak learning rate of AdamW for a U-Net of this base width; None stands for any other network."""
    if width is None:
        return 2e-4
    return 1e-3 if width <= 32 else 5e-4 if width <= 64 else 2e-4


def training_images(size: DatasetSize) -> int:
    """Default of train.images: grows with the side and with the square root of the data set's size."""
    return max(SHORTEST, _rounded(SHORTEST * max(1.0, size.side / 8) * max(1.0, sqrt(size.images / 1_297))))


def dataset_name(data: DataSection) -> str:
    """Data set name from the last part of its URL; characters not allowed in a name become dashes."""
    parts = re.split(r"[/:]+", (data.source.url or "").split("?")[0].rstrip("/"))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1]).lstrip("._-")[:100].rstrip("-")
    return name or "images"


def validation_images_for(images: int, default: int = 500) -> int:
    """Validation images of a source with `images` images and no split of its own."""
    return default if images >= FEW_IMAGES else min(max(4, images // 10), max(1, images - 1))


def _rounded(images: float) -> int:
    return max(1, round(images / LOG_IMAGES)) * LOG_IMAGES
