"""Recognition of samples by a classifier of the data set, which is trained on real images only."""

from typing import Any

import torch
from torch import Tensor

CONFIDENCE = 0.9
"""An image counts as recognized if the classifier assigns one class a higher probability than this."""


def recognized_share(confidence: Tensor) -> float:
    """Share of images, 0 to 1, with a most probable class of a probability [N] above CONFIDENCE."""
    return (confidence > CONFIDENCE).double().mean().item()


def recognition_record(samples: Tensor, validation: Tensor) -> dict[str, Any]:
    """Fraction of samples, and of real validation images, that the classifier recognizes with confidence.

    Both arguments are class probabilities [N, classes]. `class_shares` is the distribution of the samples
    over their most probable class.
    """
    counts = torch.bincount(samples.argmax(1), minlength=samples.shape[1])
    return {
        "value": recognized_share(samples.amax(1)),
        "images": len(samples),
        "held_out": recognized_share(validation.amax(1)),
        "held_out_images": len(validation),
        "confidence": CONFIDENCE,
        "class_shares": [round(share, 6) for share in (counts.double() / len(samples)).tolist()],
    }


def class_accuracy_record(
    probabilities: Tensor, labels: Tensor, validation_accuracy: float
) -> dict[str, Any]:
    """Fraction of the samples whose most probable class is the one that they were sampled for.

    Args:
        probabilities: of the samples, [N, classes].
        labels: the classes that they were sampled for, int64 [N].
        validation_accuracy: the same fraction of real validation images.
    """
    correct = (probabilities.argmax(1) == labels).double().mean().item()
    return {
        "value": correct,
        "stderr": (correct * (1 - correct) / len(labels)) ** 0.5,
        "covers": "samples",
        "images": len(labels),
        "held_out": validation_accuracy,
    }
