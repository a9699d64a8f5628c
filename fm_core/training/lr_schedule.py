"""The learning rate and the averages' decays as functions of progress."""

import math
from collections.abc import Callable
from functools import partial

from fm_core.config import TrainSection
from fm_core.training.power import power_decay, power_exponent

POWER = "ema-power-"
Decay = Callable[[int], float]
"""Decay of the update that follows so many applied steps."""


def learning_rate(train: TrainSection, images_seen: int) -> float:
    """Learning rate of the step that starts at `images_seen`.

    Linear warm-up from zero over train.warmup_images, then constant, or linear or half-cosine decay
    to zero at train.images.
    """
    if images_seen < train.warmup_images:
        return train.learning_rate * images_seen / train.warmup_images
    if train.schedule == "constant":
        return train.learning_rate
    span = max(1, train.images - train.warmup_images)
    left = max(0.0, 1.0 - (images_seen - train.warmup_images) / span)
    return train.learning_rate * (left if train.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def ema_decay(decay: float, applied_steps: int, warmup: bool) -> float:
    """Decay used after `applied_steps` optimizer steps; warm-up keeps the initial weights out."""
    return min(decay, (1 + applied_steps) / (10 + applied_steps)) if warmup else decay


def ema_decays(train: TrainSection) -> dict[str, Decay]:
    """Every average of a run: ema-<decay>, and ema-power-<width> for power-function averages."""
    decays: dict[str, Decay] = {
        f"ema-{decay:g}": partial(ema_decay, decay, warmup=train.ema_warmup) for decay in train.ema_decays
    }
    for width in train.ema_power_widths:
        decays[power_name(width)] = partial(power_decay, power_exponent(width))
    return decays


def power_name(width: float) -> str:
    """Name of a power-function average, and of its file."""
    return f"{POWER}{width:g}"


def crossed(every: int, images_seen: int, global_batch: int) -> bool:
    """Whether the last step passed a multiple of `every` images."""
    return images_seen // every > (images_seen - global_batch) // every
