"""Records of the scores file: every metric with its standard error and the inputs of its computation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fm_core.config import EvaluateSection
from fm_core.data.sources.splits import permutation
from fm_core.evaluation.dataset_likelihood import Likelihood
from fm_core.evaluation.features.extractor import INCEPTION, Extractor
from fm_core.evaluation.metrics.frechet import FrechetEstimate, estimate_frechet_distance
from fm_core.evaluation.metrics.inception_score import inception_score
from fm_core.evaluation.metrics.kid import kernel_distance
from fm_core.evaluation.metrics.precision_recall import NEIGHBORS, duplicates, precision_and_recall
from fm_core.evaluation.metrics.sampling_error import InfluenceTerms
from fm_core.evaluation.recognition import recognition_record
from fm_core.evaluation.reference import Reference, subset_indices

VALUE = ("value", "stderr")
SAMPLES_ONLY, BOTH_SETS = "samples, for a given reference", "samples and reference images"
"""What a standard error covers, i.e. what varies between independent sets of images; never the training."""
SOLVER_KEYS = (
    "solver",
    "rtol",
    "atol",
    "steps",
    "error_norm",
    "grid",
    "stochastic",
    "guidance",
    "guidance_interval",
)
"""Keys of the protocol that are recorded with the sampling cost."""
Record = dict[str, Any]
Parts = Sequence[Mapping[str, Tensor]]


def concatenate(parts: Parts, name: str) -> Tensor | None:
    """Concatenate a tensor over all parts, in the order of the images; None if the parts do not have it."""
    return torch.cat([part[name] for part in parts]) if name in parts[0] else None


def image_scores(
    samples: Parts,
    validation: Parts,
    reference: Reference,
    extractor: Extractor,
    settings: EvaluateSection,
    device: torch.device,
    classes_in_turn: bool = False,
    on_terms: Callable[[InfluenceTerms], None] | None = None,
) -> Record:
    """Compute all scores from parts with `features`, `probabilities` and `digests`.

    Samples that may be ordered by class are shuffled first (`classes_in_turn`). Scores that were not
    requested, or that the extractor does not support, are absent. Without validation images, their scores
    are absent too. `on_terms` receives the terms of the error of the samples' Fréchet distance, by index of
    the sample.
    """
    features = torch.cat([part["features"] for part in samples])
    real = torch.cat([part["features"] for part in validation]) if validation else None
    count = len(features)
    mixed = torch.from_numpy(permutation(count, seed=0)) if classes_in_turn else torch.arange(count)
    features = features[mixed]
    scores: Record = {}
    if "frechet_distance" in settings.metrics:
        real = None if real is None else real.to(device)
        records, terms = _frechet_records(features.to(device), real, reference, extractor, device)
        scores |= records
        if on_terms:
            on_terms(replace(terms, images=mixed[terms.images]))
    if reference.rows is not None:
        scores |= _pairwise_records(features, reference.rows, extractor, settings, device)
    probabilities = concatenate(samples, "probabilities")
    real_probabilities = concatenate(validation, "probabilities") if validation else None
    if probabilities is not None:
        if "inception_score" in settings.metrics:
            scores |= _class_score_records(probabilities[mixed], extractor)
        if extractor.validation_accuracy is not None and real_probabilities is not None:
            scores["recognised"] = recognition_record(probabilities, real_probabilities)
            scores["classifier"] = {
                "held_out_accuracy": extractor.validation_accuracy,
                "held_out_images": extractor.validation_images,
            }
    digests = concatenate(samples, "digests")
    if digests is not None and (copies := duplicates(digests)):
        scores["duplicates"] = {"images": copies, "of": len(digests)}
    return scores


def _frechet_records(
    features: Tensor, real: Tensor | None, reference: Reference, extractor: Extractor, device: torch.device
) -> tuple[Record, InfluenceTerms]:
    """Records of the distances, and the terms of the error of that of the samples."""
    gaussian = reference.gaussian.to(device)

    def record(rows: Tensor, covers: str, estimate: FrechetEstimate | None = None) -> Record:
        estimate = estimate or estimate_frechet_distance(rows, gaussian)
        return {
            "value": estimate.value,
            **error_record(estimate.stderr, covers, estimate.unreliable),
            "features": extractor.name,
            "images": len(rows),
            "reference": reference.name,
            **({"infinity": dict(zip(VALUE, estimate.infinity, strict=True))} if estimate.infinity else {}),
            **({"fewer_images_than_features": True} if estimate.singular else {}),
        }

    own = estimate_frechet_distance(features, gaussian)
    if real is None:
        return {"frechet_distance": record(features, SAMPLES_ONLY, own)}, own.terms
    # The distance decreases with the number of images, so only distances of equal numbers are comparable.
    validation = real[: len(features)]
    scores = {
        "frechet_distance": record(features, SAMPLES_ONLY, own),
        "frechet_distance_of_held_out": record(validation, "validation images, for a given reference"),
    }
    if len(features) > len(real):
        as_many = features[subset_indices(len(features), len(real))]
        scores["frechet_distance_of_as_many"] = record(as_many, SAMPLES_ONLY)
    return scores | _ratio_record(scores), own.terms


def _ratio_record(scores: Record) -> Record:
    """Distance of the samples divided by the distance of as many validation images (FDr).

    Both sets of images are independent samples.
    """
    real = scores["frechet_distance_of_held_out"]
    own = scores.get("frechet_distance_of_as_many", scores["frechet_distance"])
    if min(real["value"], own["value"]) <= 0:
        return {}
    value = own["value"] / real["value"]
    stderr = value * math.hypot(own["stderr"] / own["value"], real["stderr"] / real["value"])
    reason = own.get("unreliable") or real.get("unreliable")
    error = error_record(stderr, "samples and validation images, for a given reference", reason)
    return {
        "frechet_distance_ratio": {
            "value": value,
            **error,
            "features": own["features"],
            "images": own["images"],
        }
    }


def _pairwise_records(
    features: Tensor, rows: Tensor, extractor: Extractor, settings: EvaluateSection, device: torch.device
) -> Record:
    selected = features[subset_indices(len(features), settings.pair_images)].to(device)
    real = rows.to(device)
    source = {"features": extractor.name, "images": len(selected), "reference_images": len(real)}
    scores: Record = {}
    if "kernel_distance" in settings.metrics:
        kid = kernel_distance(selected, real)
        error = error_record(kid.stderr, BOTH_SETS, kid.unreliable)
        scores["kernel_distance"] = {"value": kid.value, **error, **source}
    if "precision_recall" in settings.metrics:
        result = precision_and_recall(selected, real)
        source |= {"neighbours": NEIGHBORS}
        for name, value, stderr in (
            ("precision", result.precision, result.precision_stderr),
            ("recall", result.recall, result.recall_stderr),
        ):
            scores[name] = {"value": value, **error_record(stderr, BOTH_SETS, result.unreliable), **source}
    return scores


def _class_score_records(probabilities: Tensor, extractor: Extractor) -> Record:
    """Record of the Inception Score; for networks other than Inception, a classifier score with an alias."""
    score = inception_score(probabilities)
    record = {
        "value": score.value,
        **error_record(score.stderr, "samples", score.unreliable),
        "features": extractor.name,
        "images": len(probabilities),
    }
    if extractor.name == INCEPTION:
        return {"inception_score": record}
    return {"classifier_score": record, "inception_score": {**record, "alias_of": "classifier_score"}}


def error_record(stderr: float, covers: str, unreliable: str | None) -> Record:
    """Record of a standard error for the scores file: what it covers, and if unreliable, the reason."""
    return {"stderr": stderr, "covers": covers, **({"unreliable": unreliable} if unreliable else {})}


def cost_record(samples: Parts, protocol: Mapping[str, Any]) -> Record:
    """Record of the sampling cost: network evaluations per image, solver steps per batch."""
    costs = torch.stack([part["cost"] for part in samples]).double()
    images = torch.tensor([float(len(part["features"])) for part in samples], dtype=torch.float64)
    nfe, accepted, rejected, forwards = ((costs[:, i] * images).sum() / images.sum() for i in range(4))
    solver = {key: protocol[key] for key in SOLVER_KEYS if key in protocol}
    steps = {"accepted": accepted.item(), "rejected": rejected.item()} if bool((costs >= 0).all()) else {}
    return {
        **solver,
        "mean": nfe.item(),
        "batch_size": protocol["batch_size"],
        "forwards_per_evaluation": int(forwards),
        **steps,
    }


def likelihood_record(result: Likelihood, tolerances: Mapping[str, float]) -> Record:
    """Record of bits/dim in the scores file; `tolerances` are rtol and atol.

    Bits/dim are computed with the float32 network, regardless of the precision of sampling.
    """
    record: Record = {
        "value": result.single_sample.value,
        "stderr": result.single_sample.stderr,
        "covers": "validation images, draws and probes",
        "images": result.single_sample.images,
        "k": 1,
        "probe_std": result.single_sample.probe_std,
        "nfe": result.nfe,
        "dtype": "float32",
        **tolerances,
    }
    if result.k_sample is not None:
        k_sample = {"value": result.k_sample.value, "stderr": result.k_sample.stderr, "k": result.k}
        record["k_sample"] = {**k_sample, "probes": "shared"}
    if check := result.check:
        differences = {"images": check.images, "mean": check.mean, "largest": check.largest}
        record["solver_check"] = {**differences, "tolerances": "a tenth"}
    return record
