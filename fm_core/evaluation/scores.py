"""Records of the scores file: every metric with its standard error and what it was computed from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fm_core.config import EvaluateSection
from fm_core.data.sources.splits import permutation
from fm_core.evaluation.dataset_likelihood import Likelihood
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.frechet import estimate_frechet_distance
from fm_core.evaluation.metrics.inception_score import inception_score
from fm_core.evaluation.metrics.kid import kernel_distance
from fm_core.evaluation.metrics.precision_recall import NEIGHBORS, duplicates, precision_and_recall
from fm_core.evaluation.reference import Reference, subset_indices

CONFIDENCE = 0.9
"""An image counts as recognized if the classifier gives one class a higher probability than this."""

VALUE = ("value", "stderr")
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
"""Of the protocol: what the cost of sampling is recorded with."""
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
) -> Record:
    """Compute all scores from parts with `features`, `probabilities` and `digests`.

    Samples whose classes may follow each other are mixed first (`classes_in_turn`): otherwise a block of the
    jackknife, image i mod 20, could be of one class. Scores that were not requested, or that the extractor
    does not support, are absent.
    """
    features, real = (torch.cat([part["features"] for part in parts]) for parts in (samples, validation))
    mixed = torch.from_numpy(permutation(len(features), seed=0)) if classes_in_turn else slice(None)
    features = features[mixed]
    scores: Record = {}
    if "frechet_distance" in settings.metrics:
        scores |= _frechet_records(features.to(device), real.to(device), reference, extractor, device)
    if reference.rows is not None:
        scores |= _pairwise_records(features, reference.rows, extractor, settings, device)
    probabilities, real_probabilities = (
        concatenate(samples, "probabilities"),
        concatenate(validation, "probabilities"),
    )
    if probabilities is not None and real_probabilities is not None:
        if "inception_score" in settings.metrics:
            score = inception_score(probabilities[mixed])
            source = {"features": extractor.name, "images": len(features)}
            scores["inception_score"] = {"value": score.value, "stderr": score.stderr, **source}
        if extractor.validation_accuracy is not None:
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
    features: Tensor, real: Tensor, reference: Reference, extractor: Extractor, device: torch.device
) -> Record:
    gaussian = reference.gaussian.to(device)

    def record(rows: Tensor) -> Record:
        estimate = estimate_frechet_distance(rows, gaussian)
        return {
            "value": estimate.value,
            "stderr": estimate.stderr,
            "features": extractor.name,
            "images": len(rows),
            "reference": reference.name,
            **({"infinity": dict(zip(VALUE, estimate.infinity, strict=True))} if estimate.infinity else {}),
            **({"fewer_images_than_features": True} if estimate.singular else {}),
        }

    # The distance decreases with the number of images: only equal numbers are comparable.
    validation = real[: len(features)]
    scores = {"frechet_distance": record(features), "frechet_distance_of_held_out": record(validation)}
    if len(features) > len(real):
        scores["frechet_distance_of_as_many"] = record(features[subset_indices(len(features), len(real))])
    return scores


def _pairwise_records(
    features: Tensor, rows: Tensor, extractor: Extractor, settings: EvaluateSection, device: torch.device
) -> Record:
    selected = features[subset_indices(len(features), settings.pair_images)].to(device)
    real = rows.to(device)
    source = {"features": extractor.name, "images": len(selected), "reference_images": len(real)}
    scores: Record = {}
    if "kernel_distance" in settings.metrics:
        kid = kernel_distance(selected, real)
        scores["kernel_distance"] = {"value": kid.value, "stderr": kid.stderr, **source}
    if "precision_recall" in settings.metrics:
        result = precision_and_recall(selected, real)
        source |= {"neighbours": NEIGHBORS}
        scores["precision"] = {"value": result.precision, "stderr": result.precision_stderr, **source}
        scores["recall"] = {"value": result.recall, "stderr": result.recall_stderr, **source}
    return scores


def recognition_record(samples: Tensor, validation: Tensor) -> Record:
    """Fraction of samples, and of real validation images, that the classifier is confident about.

    Both arguments are class probabilities [N, classes]. `class_shares` is the distribution of the samples
    over their most probable class.
    """
    counts = torch.bincount(samples.argmax(1), minlength=samples.shape[1])
    return {
        "value": _confident_fraction(samples),
        "images": len(samples),
        "held_out": _confident_fraction(validation),
        "held_out_images": len(validation),
        "confidence": CONFIDENCE,
        "class_shares": [round(share, 6) for share in (counts.double() / len(samples)).tolist()],
    }


def cost_record(samples: Parts, protocol: Mapping[str, Any]) -> Record:
    """Sampling cost: network evaluations per image, solver steps per batch."""
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

    Bits/dim are those of the float32 network, whatever precision the samples were generated with.
    """
    record: Record = {
        "value": result.single_sample.value,
        "stderr": result.single_sample.stderr,
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


def _confident_fraction(probabilities: Tensor) -> float:
    return (probabilities.amax(1) > CONFIDENCE).double().mean().item()
