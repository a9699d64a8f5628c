"""Memorization in the scores file: nearest-neighbor distances, near-copies, and two Fréchet distances."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fm_core.data.reader import ImageReader, fair_order
from fm_core.data.sources.splits import permutation
from fm_core.evaluation.evaluation_run import EvaluationRun
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.metrics.frechet import estimate_frechet_distance
from fm_core.evaluation.metrics.memorization import Share, memorization, nearest_distances
from fm_core.evaluation.scores import SAMPLES_ONLY, Parts, Record, error_record

IMAGES = 1_000
"""Maximum number of samples, and of validation images, whose nearest training image is searched for."""
TRAINING_IMAGES = 50_000
"""Maximum number of training images that are searched; if there are more, a fair sample of them."""
BLOCK_IMAGES = 4_096
COVERS = "samples and validation images"


def memorization_records(evaluation: EvaluationRun, samples: Parts, validation: Parts) -> Record:
    """Memorization scores by key; empty if they are not requested or the images are not stored.

    `samples` and `validation` are parts with `features`.
    """
    settings, manifest = evaluation.settings, evaluation.manifest
    if (
        "memorization" not in settings.metrics
        or settings.samples == "sampler"
        or "train" not in manifest.splits
    ):
        return {}
    pixels, real = _first_samples(evaluation), evaluation.read_validation(range(_count(validation)))[0]
    device = evaluation.device
    distances = [nearest_distances(p.to(device), _training_blocks(evaluation)) for p in (pixels, real)]
    record: Record = {"pixels": _record(distances, min(TRAINING_IMAGES, manifest.splits["train"].images))}
    features, of_real = (torch.cat([part["features"] for part in parts]) for parts in (samples, validation))
    rows = evaluation.reference.rows if settings.reference == "train" else None
    if rows is not None:
        nearest = [
            nearest_distances(images[:IMAGES], rows.split(BLOCK_IMAGES)) for images in (features, of_real)
        ]
        record["features"] = {**_record(nearest, len(rows)), "extractor": evaluation.extractor.name}
    scores: Record = {"memorization": record}
    if rows is not None and min(len(rows), len(of_real)) >= 4:
        scores |= _distances_to_equal_sets(features, of_real, rows, evaluation)
    return scores


def _count(parts: Parts) -> int:
    return min(IMAGES, sum(len(part["features"]) for part in parts))


def _first_samples(evaluation: EvaluationRun) -> Tensor:
    """Pixels of the first samples, uint8 [n, C, S, S]."""
    sizes = accumulate(len(images) for images in evaluation.source.ranges)
    needed = 1 + sum(size < IMAGES for size in sizes)
    parts = range(min(needed, len(evaluation.source.ranges)))
    return torch.cat([evaluation.source.read(number)[0] for number in parts])[:IMAGES]


def _training_blocks(evaluation: EvaluationRun) -> Iterator[Tensor]:
    manifest = evaluation.manifest
    ids = np.sort(fair_order(manifest, "train")[:TRAINING_IMAGES])
    with ImageReader(evaluation.config.data.root, manifest, "train") as reader:
        for first in range(0, len(ids), BLOCK_IMAGES):
            yield reader.read(ids[first : first + BLOCK_IMAGES])[0]


def _record(distances: Sequence[Tensor], training_images: int) -> Record:
    """Build the record of the nearest-neighbor distances of samples and of validation images."""
    samples, held_out = distances
    result = memorization(samples, held_out)
    (value, stderr), (real, real_stderr) = result.samples, result.held_out
    return {
        "samples": {"value": value, **error_record(stderr, "samples", None)},
        "held_out": {"value": real, **error_record(real_stderr, "validation images", None)},
        "nearer": _share_record(result.nearer),
        "near_copies": _share_record(result.near_copies),
        "images": len(samples),
        "held_out_images": len(held_out),
        "training_images": training_images,
        "distance": "root mean square difference",
    }


def _share_record(share: Share) -> Record:
    error = error_record(share.stderr, COVERS, share.unreliable)
    return {"value": share.value, **error, "expected": share.expected}


def _distances_to_equal_sets(
    features: Tensor, held_out: Tensor, training: Tensor, evaluation: EvaluationRun
) -> Record:
    """Fréchet distances from the samples to equally many validation and training images.

    The equal counts give both distances the same bias.
    """
    count = min(len(held_out), len(training))
    mixed = training[torch.from_numpy(permutation(len(training), seed=1))]
    scores: Record = {}
    for key, name, rows in (
        ("frechet_distance_to_held_out", "val", held_out),
        ("frechet_distance_to_as_many_training", "train", mixed),
    ):
        gaussian = Gaussian.of(FeatureMoments.of(rows[:count].to(evaluation.device)))
        estimate = estimate_frechet_distance(features.to(evaluation.device), gaussian, limit=False)
        scores[key] = {
            "value": estimate.value,
            **error_record(estimate.stderr, SAMPLES_ONLY, estimate.unreliable),
            "features": evaluation.extractor.name,
            "images": len(features),
            "reference": f"{name}, {count} images",
        }
    return scores
