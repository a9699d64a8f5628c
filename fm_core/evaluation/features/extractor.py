"""Where features come from: a name, a hash, and a function from pixels to features."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest

Read = Callable[[Tensor], tuple[Tensor, Tensor | None]]
OnStep = Callable[[int, int, float], None]

INCEPTION = "inception-v3-2015-12-05"
"""What the features of that file of weights are called; a Fréchet distance on them is FID."""
CLASSIFIER = "classifier"
"""What those of a classifier of the data set's own labels are called."""


@dataclass(frozen=True)
class Extractor:
    """A source of features."""

    name: str
    """What the features are called wherever a number made of them is shown."""
    sha256: str
    """SHA-256 of its weights."""
    read: Read
    """uint8 [N, C, S, S] on any device -> float32 features [N, D] and class probabilities [N, classes]
    (None where it gives none), on the CPU; each image for itself."""
    protocol: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else moves the features, and is known of it."""
    held_out_accuracy: float | None = None
    """Of a classifier of the data set: share of the held-out images that it labels rightly, 0 to 1."""
    held_out_images: int | None = None
    """How many they were."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and probabilities of images uint8 [N, C, S, S]."""
        return self.read(images)


def open_extractor(
    settings: EvaluateSection, root: str, manifest: Manifest, device: torch.device, on_step: OnStep
) -> Extractor:
    """The extractor that evaluate.features names; a classifier is trained here if there is none yet.

    Raises UserError for weights that are missing, differ from their hash or do not fit, and for packages
    that are not installed.
    """
    if settings.features == "classifier":
        from fm_core.evaluation.features.classifier_features import data_set_extractor

        return data_set_extractor(root, manifest, device, on_step)
    if settings.features == "inception":
        from fm_core.evaluation.features.inception import inception_extractor

        return inception_extractor(settings, root, manifest, device)
    from fm_core.evaluation.features.custom_features import imported_extractor

    return imported_extractor(settings, root, manifest, device)


def as_rgb(images: Tensor, levels: int) -> Tensor:
    """Images uint8 [N, 1 or 3, S, S] of `levels` grey levels as uint8 [N, 3, S, S] of 256."""
    if levels != 256:
        images = (images.float() * (255 / (levels - 1))).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def read_in_batches(module: Callable[[Tensor], Any], levels: int, device: torch.device, batch: int) -> Read:
    """A network for uint8 [N, 3, S, S] of 256 grey levels as a source of features.

    It may give features alone, or features and logits.
    """

    @torch.no_grad()
    def read(images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, probabilities = list[Tensor](), list[Tensor]()
        for part in images.split(batch):
            given = module(as_rgb(part.to(device), levels))
            first, *rest = given if isinstance(given, tuple | list) else (given,)
            features.append(first.float().flatten(1).cpu())
            probabilities += [rest[0].float().softmax(1).cpu()] if rest else []
        return torch.cat(features), torch.cat(probabilities) if probabilities else None

    return read
