"""Scores of the further extractors of an evaluation (evaluate.extractors), by the names of their features."""

from collections.abc import Sequence
from typing import Any

import torch

from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.features.extractor_set import ExtractorSet, outputs_of
from fm_core.evaluation.reference import Reference
from fm_core.evaluation.scores import Parts, Record, image_scores

KEY = "extractors"
"""Key of these scores in the scores file: a record for each name of features, of the same keys as the scores
of evaluate.features."""


def further_records(
    extractors: ExtractorSet,
    samples: Parts,
    validation: Parts,
    references: Sequence[Reference],
    device: torch.device,
    classes_in_turn: bool,
) -> Record:
    """Compute the scores of each further extractor as in an evaluation with that extractor alone.

    A named protocol covers none of them. Copies and memorization are scored with the first extractor only.
    Empty if there is no further extractor.

    Args:
        extractors: all extractors of the evaluation.
        samples: parts with the outputs of all extractors.
        validation: the same of the validation images; may be empty.
        references: reference of each extractor, in their order.
        device: device of the metrics.
        classes_in_turn: whether samples may be ordered by class.
    """
    records: Record = {}
    for number, settings, extractor in extractors.further:
        own, real = outputs_of(number, samples), outputs_of(number, validation)
        reference = references[number]
        scores = image_scores(own, real, reference, extractor, settings, device, classes_in_turn)
        records[extractor.name] = {
            "protocol": _protocol(extractor, reference, settings.pair_images),
            **scores,
        }
    return {KEY: records} if records else {}


def _protocol(extractor: Extractor, reference: Reference, pair_images: int) -> dict[str, Any]:
    """Everything that affects these scores beside the images; without a name, as it is no named protocol."""
    return {
        "reference": reference.name,
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        **extractor.protocol,
        "pair_images": pair_images,
    }
