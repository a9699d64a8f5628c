"""The scores of a set of images, each with its error and what it was made of."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fm_core.config import EvaluateSection
from fm_core.evaluation.dataset_likelihood import Likelihood
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.frechet import distance
from fm_core.evaluation.metrics.inception_score import inception_score
from fm_core.evaluation.metrics.kid import kernel_distance
from fm_core.evaluation.metrics.precision_recall import NEIGHBOURS, duplicates, precision_and_recall
from fm_core.evaluation.reference import Reference, evenly_spaced

CONFIDENCE = 0.9
"""An image counts as recognised when the classifier gives one class more than this."""

VALUE = ("value", "stderr")
Record = dict[str, Any]
Parts = Sequence[Mapping[str, Tensor]]


def joined(parts: Parts, name: str) -> Tensor | None:
    """One tensor of all parts, in the order of the images; None where they have no such."""
    return torch.cat([part[name] for part in parts]) if name in parts[0] else None


def image_scores(
    samples: Parts,
    held_out: Parts,
    reference: Reference,
    extractor: Extractor,
    settings: EvaluateSection,
    device: torch.device,
) -> Record:
    """All scores of images, from parts with `features`, `probabilities` and `digests`.

    Scores that were not asked for, or that the extractor cannot give, are absent.
    """
    features, real = (torch.cat([part["features"] for part in parts]) for parts in (samples, held_out))
    scores: Record = {}
    if "frechet_distance" in settings.metrics:
        scores |= _frechet(features.to(device), real.to(device), reference, extractor, device)
    if reference.rows is not None:
        scores |= _pairs(features, reference.rows, extractor, settings, device)
    probabilities, real_probabilities = joined(samples, "probabilities"), joined(held_out, "probabilities")
    if probabilities is not None and real_probabilities is not None:
        if "inception_score" in settings.metrics:
            score = inception_score(probabilities)
            of = {"features": extractor.name, "images": len(features)}
            scores["inception_score"] = {"value": score.value, "stderr": score.stderr, **of}
        if extractor.held_out_accuracy is not None:
            scores["recognised"] = recognition_record(probabilities, real_probabilities)
            scores["classifier"] = {
                "held_out_accuracy": extractor.held_out_accuracy,
                "held_out_images": extractor.held_out_images,
            }
    seen = joined(samples, "digests")
    if seen is not None and (copies := duplicates(seen)):
        scores["duplicates"] = {"images": copies, "of": len(seen)}
    return scores


def _frechet(
    features: Tensor, real: Tensor, reference: Reference, extractor: Extractor, device: torch.device
) -> Record:
    gaussian = reference.gaussian.to(device)

    def record(rows: Tensor) -> Record:
        found = distance(rows, gaussian)
        return {
            "value": found.value,
            "stderr": found.stderr,
            "features": extractor.name,
            "images": len(rows),
            "reference": reference.name,
            **({"infinity": dict(zip(VALUE, found.infinity, strict=True))} if found.infinity else {}),
            **({"fewer_images_than_features": True} if found.few else {}),
        }

    # The distance falls with the number of images: only equal numbers compare.
    held_out = real[: len(features)]
    scores = {"frechet_distance": record(features), "frechet_distance_of_held_out": record(held_out)}
    if len(features) > len(real):
        scores["frechet_distance_of_as_many"] = record(features[: len(real)])
    return scores


def _pairs(
    features: Tensor, rows: Tensor, extractor: Extractor, settings: EvaluateSection, device: torch.device
) -> Record:
    chosen = features[evenly_spaced(len(features), settings.pair_images)].to(device)
    real = rows.to(device)
    of = {"features": extractor.name, "images": len(chosen), "reference_images": len(real)}
    scores: Record = {}
    if "kernel_distance" in settings.metrics:
        found = kernel_distance(chosen, real)
        scores["kernel_distance"] = {"value": found.value, "stderr": found.stderr, **of}
    if "precision_recall" in settings.metrics:
        near = precision_and_recall(chosen, real)
        of |= {"neighbours": NEIGHBOURS}
        scores["precision"] = {"value": near.precision, "stderr": near.precision_stderr, **of}
        scores["recall"] = {"value": near.recall, "stderr": near.recall_stderr, **of}
    return scores


def recognition_record(samples: Tensor, held_out: Tensor) -> Record:
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


def cost_record(samples: Parts, protocol: Mapping[str, Any]) -> Record:
    """What the samples cost: forwards of the network for each image, steps of the solver for each batch."""
    costs = torch.stack([part["cost"] for part in samples]).double()
    images = torch.tensor([float(len(part["features"])) for part in samples], dtype=torch.float64)
    nfe, accepted, rejected, forwards = ((costs[:, i] * images).sum() / images.sum() for i in range(4))
    asked = {key: protocol[key] for key in ("solver", "rtol", "atol", "steps", "guidance") if key in protocol}
    steps = {"accepted": accepted.item(), "rejected": rejected.item()} if bool((costs >= 0).all()) else {}
    return {
        **asked,
        "mean": nfe.item(),
        "batch_size": protocol["batch_size"],
        "forwards_per_evaluation": int(forwards),
        **steps,
    }


def likelihood_record(result: Likelihood, tolerances: Mapping[str, float]) -> Record:
    """Bits/dim as the scores file has them; `tolerances` are rtol and atol.

    They are of the float32 network, whatever precision the samples were made with.
    """
    record: Record = {
        "value": result.headline.value,
        "stderr": result.headline.stderr,
        "images": result.headline.images,
        "k": 1,
        "probe_std": result.headline.probe_std,
        "nfe": result.nfe,
        "dtype": "float32",
        **tolerances,
    }
    if result.k_sample is not None:
        k_sample = {"value": result.k_sample.value, "stderr": result.k_sample.stderr, "k": result.k}
        record["k_sample"] = {**k_sample, "probes": "shared"}
    if check := result.check:
        told = {"images": check.images, "mean": check.mean, "largest": check.largest}
        record["solver_check"] = {**told, "tolerances": "a tenth"}
    return record


def _recognised(probabilities: Tensor) -> float:
    return (probabilities.amax(1) > CONFIDENCE).double().mean().item()
