"""Name of a scores file, which identifies everything that is scored and how."""

from collections.abc import Sequence
from typing import Any

from fm_core.config import EvaluateSection
from fm_core.evaluation.features.classifier_features import RECIPE
from fm_core.evaluation.image_sources import file_signature
from fm_core.evaluation.reference import STATISTICS_VERSION
from fm_core.storage.hashing import fingerprint

EXCLUDED = frozenset({"processes", "reference_out", "online", "output", "classifier_min_accuracy"})
"""Keys of the evaluate section that do not affect the scores."""


def scores_key(
    settings: EvaluateSection, samples: str, identity: Any, data_version: str, order: Sequence[str]
) -> str:
    """Key of the samples, and hash of the scoring inputs except memorization.

    Args:
        settings: the evaluate section.
        samples: key or name of the samples.
        identity: a JSON value that identifies the images.
        data_version: version of the data set.
        order: differences in image order from earlier versions.
    """
    excluded = set(EXCLUDED)
    # Keys of later versions are left out where they are not used, so that existing scores are found.
    excluded |= {key for key in ("protocol", "extractors") if not getattr(settings, key)}
    inputs = settings.model_dump(mode="json", exclude=excluded)
    inputs["metrics"] = [name for name in inputs["metrics"] if name != "memorization"]
    recipe = RECIPE if settings.trains_classifier else None
    named = [
        name
        for section in settings.each_extractor()
        for name in (section.features, section.weights, section.reference)
    ]
    files = [file_signature(name) for name in named]
    parts = [inputs, identity, data_version, STATISTICS_VERSION, recipe, files, *order]
    return f"{samples}-{fingerprint(parts)[:6]}"
