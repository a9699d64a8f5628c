"""Feature extractors: a name, a weights hash, and a function from pixels to features."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Extract = Callable[[Tensor], tuple[Tensor, Tensor | None]]
ExtractSpatial = Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor]]
OnStep = Callable[[int, int, float], None]

INCEPTION = "inception-v3-2015-12-05"
"""Name of the features from the published Inception weights; a Fréchet distance on them is FID."""
CLASSIFIER = "classifier"
"""Name of the features from a classifier trained on the data set's labels."""


@dataclass(frozen=True)
class Extractor:
    """A feature extractor."""

    name: str
    """Name of the features, displayed with every metric that uses them."""
    sha256: str
    """SHA-256 of the weights."""
    extract: Extract
    """Map uint8 [N, C, S, S] on any device to float32 features [N, D] and class probabilities [N, classes]
    (None if the extractor has no classes) on the CPU. The images of a batch do not affect each other."""
    protocol: dict[str, Any] = field(default_factory=dict[str, Any])
    """Everything else that is known to affect the features; part of the recorded protocol."""
    extract_spatial: ExtractSpatial | None = None
    """Like `extract`, with the features float32 [N, S] of an inner layer for sFID; None if not requested."""
    validation_accuracy: float | None = None
    """Accuracy on validation images, 0 to 1, for a classifier of the data set."""
    validation_images: int | None = None
    """Number of validation images on which `validation_accuracy` was measured."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Extract features and class probabilities of images uint8 [N, C, S, S]."""
        return self.extract(images)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs by name for images uint8 [N, C, S, S]: features, and probabilities and spatial if any."""
        if self.extract_spatial is None:
            features, probabilities = self.extract(images)
            spatial = None
        else:
            features, probabilities, spatial = self.extract_spatial(images)
        optional = {"probabilities": probabilities, "spatial": spatial}
        return {"features": features, **{name: x for name, x in optional.items() if x is not None}}


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

    def extract(images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, *rest = _outputs(module, images, levels, device, batch)
        return features, rest[0] if rest else None

    return extract


def extract_spatial_in_batches(
    module: Callable[[Tensor], Any], levels: int, device: torch.device, batch: int
) -> ExtractSpatial:
    """Like `extract_in_batches`, for a network that returns (features, logits, spatial features)."""

    def extract(images: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        features, probabilities, spatial = _outputs(module, images, levels, device, batch)
        return features, probabilities, spatial

    return extract


@torch.no_grad()
def _outputs(
    module: Callable[[Tensor], Any], images: Tensor, levels: int, device: torch.device, batch: int
) -> list[Tensor]:
    """Outputs of a network, float32 on the CPU; the second one, logits, is converted to probabilities."""
    parts = list[list[Tensor]]()
    for part in images.split(batch):
        output = module(as_rgb(part.to(device), levels))
        first, *rest = output if isinstance(output, tuple | list) else (output,)
        logits, others = rest[:1], rest[1:]
        tensors = [first.flatten(1), *(each.float().softmax(1) for each in logits)]
        parts.append([each.float().cpu() for each in (*tensors, *(each.flatten(1) for each in others))])
    return [torch.cat(each) for each in zip(*parts, strict=True)]
