"""Feature extractors: a name, a weights hash, and a function from pixels to features."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Extract = Callable[[Tensor], tuple[Tensor, Tensor | None]]
OnStep = Callable[[int, int, float], None]

INCEPTION = "inception-v3-2015-12-05"
"""Name of the features of the published Inception weights; a Fréchet distance on them is FID."""
CLASSIFIER = "classifier"
"""Name of the features of a classifier trained on the data set's labels."""


@dataclass(frozen=True)
class Extractor:
    """A feature extractor."""

    name: str
    """Name of the features, shown with every metric that uses them."""
    sha256: str
    """SHA-256 of the weights."""
    extract: Extract
    """uint8 [N, C, S, S] on any device -> float32 features [N, D] and class probabilities [N, classes]
    (None if the extractor has no classes), on the CPU; the images of a batch do not influence each other."""
    protocol: dict[str, Any] = field(default_factory=dict[str, Any])
    """Everything else known to affect the features; part of the recorded protocol."""
    validation_accuracy: float | None = None
    """For a classifier of the data set: its accuracy on validation images, 0 to 1."""
    validation_images: int | None = None
    """Number of validation images of `validation_accuracy`."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Extract features and class probabilities of images uint8 [N, C, S, S]."""
        return self.extract(images)


def as_rgb(images: Tensor, levels: int) -> Tensor:
    """Convert uint8 [N, 1 or 3, S, S] of `levels` intensity levels to RGB uint8 [N, 3, S, S] of 256."""
    if levels != 256:
        images = (images.float() * (255 / (levels - 1))).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def extract_in_batches(
    module: Callable[[Tensor], Any], levels: int, device: torch.device, batch: int
) -> Extract:
    """Wrap a network for uint8 [N, 3, S, S] of 256 intensity levels as an `Extract` function.

    The network returns features, or (features, logits).
    """

    @torch.no_grad()
    def extract(images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, probabilities = list[Tensor](), list[Tensor]()
        for part in images.split(batch):
            output = module(as_rgb(part.to(device), levels))
            first, *rest = output if isinstance(output, tuple | list) else (output,)
            features.append(first.float().flatten(1).cpu())
            probabilities += [rest[0].float().softmax(1).cpu()] if rest else []
        return torch.cat(features), torch.cat(probabilities) if probabilities else None

    return extract
