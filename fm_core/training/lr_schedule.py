"""Learning-rate schedule and logging intervals as functions of images seen."""

import math

from fm_core.config import TrainSection


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


def crossed(every: int, images_seen: int, global_batch: int) -> bool:
    """Whether the last step, of `global_batch` images, passed a multiple of `every` images."""
    return images_seen // every > (images_seen - global_batch) // every
