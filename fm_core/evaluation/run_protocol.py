"""Protocol of a run's scores, as recorded in the scores file."""

import hashlib
from typing import Any

from torch import Tensor

from fm_core.evaluation.evaluation_run import LIKELIHOOD, EvaluationRun
from fm_core.evaluation.protocol_scores import ScoredSet, named_protocol
from fm_core.evaluation.scores import Parts, concatenate
from fm_core.run.directory import environment


def run_protocol(evaluation: EvaluationRun, samples: Parts) -> dict[str, Any]:
    """Everything that affects the scores of a run, starting with its named protocol if there is one."""
    versions, settings = environment()["versions"], evaluation.settings
    manifest, extractor, likelihood = evaluation.manifest, evaluation.extractor, settings.likelihood
    pixels = concatenate(samples, "digests")
    assert isinstance(pixels, Tensor), "every part has digests"
    return {
        **named_protocol(settings, extractor, evaluation.reference, _scored_set(evaluation)),
        **evaluation.source.protocol,
        **({"noise": "that of the training pairs"} if _noise_was_seen(evaluation) else {}),
        "samples_digest": hashlib.sha256(pixels.sort().values.numpy().tobytes()).hexdigest()[:16],
        "data": manifest.name,
        "data_version": manifest.version,
        "label_order": manifest.label_order,
        **({"class_conditional": evaluation.model.conditional} if evaluation.model else {}),
        "preprocessing": manifest.recipe,
        "reference": evaluation.reference.name,
        "held_out_split": "val",
        "levels": manifest.levels,
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        **extractor.protocol,
        "pair_images": settings.pair_images,
        **({"likelihood": likelihood.model_dump(mode="json")} if LIKELIHOOD in evaluation.tasks else {}),
        "versions": {name: versions[name] for name in ("torch", "torchdiffeq", "numpy") if name in versions},
    }


def _noise_was_seen(evaluation: EvaluationRun) -> bool:
    """Whether the samples begin at noise that the model was trained on, as a reflow model may be."""
    model = evaluation.model
    return model is not None and model.trained_on_noise_of(evaluation.config.sample.seed)


def _scored_set(evaluation: EvaluationRun) -> ScoredSet:
    images, splits = sum(map(len, evaluation.source.ranges)), evaluation.manifest.splits
    classes = len(evaluation.config.sample.classes) if evaluation.classes_in_turn else 0
    reference = evaluation.settings.reference
    lossy = evaluation.source.protocol.get("lossy_files")
    return ScoredSet(
        images=images,
        levels=evaluation.manifest.levels,
        reference_kind=reference if reference in splits else "statistics",
        class_counts=[len(range(number, images, classes)) for number in range(classes)] or None,
        lossy={"JPEG or WebP": lossy} if lossy else None,
    )
