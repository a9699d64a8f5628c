"""Construction of a configuration's feature extractor."""

import torch

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest
from fm_core.evaluation.features.extractor import Extractor, OnStep


def open_extractor(
    settings: EvaluateSection, root: str, manifest: Manifest, device: torch.device, on_step: OnStep
) -> Extractor:
    """Build the extractor of evaluate.features; train a classifier if the data set has none yet.

    Raises:
        UserError: weights are missing, have another hash or belong to another network, a package is missing,
            or the classifier is less accurate than evaluate.classifier_min_accuracy.
    """
    if settings.features == "classifier":
        from fm_core.evaluation.features.classifier_features import check_accuracy, classifier_extractor

        extractor = classifier_extractor(root, manifest, device, on_step)
        check_accuracy(extractor, settings.classifier_min_accuracy, manifest)
        return extractor
    if settings.features == "inception":
        from fm_core.evaluation.features.inception import inception_extractor

        return inception_extractor(settings, root, manifest, device)
    if settings.features == "dinov2":
        from fm_core.evaluation.features.dinov2 import dinov2_extractor

        return dinov2_extractor(settings, root, manifest, device)
    from fm_core.evaluation.features.custom_features import custom_extractor

    return custom_extractor(settings, root, manifest, device)
