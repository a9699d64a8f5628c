"""Scores of a set of samples, each with what it was made of."""

from typing import Any

import torch
from torch import Tensor

from fm_core.evaluation.extractor import Extractor
from fm_core.evaluation.frechet import Moments, frechet_distance, jackknife_error
from fm_core.evaluation.likelihood import Likelihood

CONFIDENCE = 0.9
"""An image counts as recognised when the classifier gives one class more than this."""


def frechet_record(features: Tensor, reference: Moments, extractor: Extractor) -> dict[str, Any]:
    """The distance of features [N, D] to the training images, with its standard error."""
    return {
        "value": frechet_distance(Moments.of(features), reference),
        "stderr": jackknife_error(features, reference),
        "features": extractor.name,
        "images": len(features),
        "reference": f"train, {reference.count} images",
    }


def recognition_record(samples: Tensor, held_out: Tensor) -> dict[str, Any]:
    """How sure the classifier is of samples and of real held-out images.

    Both arguments are class probabilities [N, classes]. `class_shares` are the shares of the samples
    by their most probable class.
    """
    counts = torch.bincount(samples.argmax(1), minlength=samples.shape[1])
    return {
        "value": _recognised(samples),
        "images": len(samples),
        "held_out": _recognised(held_out),
        "held_out_images": len(held_out),
        "confidence": CONFIDENCE,
        "class_shares": [round(share, 6) for share in (counts.double() / len(samples)).tolist()],
    }


def likelihood_record(result: Likelihood) -> dict[str, Any]:
    """Bits/dim as the scores file has them."""
    record: dict[str, Any] = {
        "value": result.headline.value,
        "stderr": result.headline.stderr,
        "images": result.headline.images,
        "k": 1,
        "probe_std": result.headline.probe_std,
        "nfe": result.nfe,
    }
    if result.k_sample is not None:
        k_sample = {"value": result.k_sample.value, "stderr": result.k_sample.stderr, "k": result.k}
        record["k_sample"] = {**k_sample, "probes": "shared"}
    return record


def _recognised(probabilities: Tensor) -> float:
    return (probabilities.amax(1) > CONFIDENCE).double().mean().item()
