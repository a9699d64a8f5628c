"""Scores that only a named protocol requests, and deviations of a set of scores from its protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fm_core.config import EvaluateSection
from fm_core.config.protocols import INCEPTION_SHA256, PROTOCOLS, EvaluationProtocol, SplitOrder
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.frechet import estimate_frechet_distance
from fm_core.evaluation.metrics.precision_recall import precision_and_recall
from fm_core.evaluation.reference import Reference, subset_indices
from fm_core.evaluation.scores import BOTH_SETS, SAMPLES_ONLY, Parts, Record, concatenate, error_record

SHUFFLE_SEED = 2020
"""Seed of numpy's RandomState with which torch-fidelity shuffles images before it splits them."""
ORDER_TEXTS: Mapping[SplitOrder, str] = {
    "file": "consecutive images in the order of the files",
    "shuffled": f"shuffled by RandomState({SHUFFLE_SEED})",
}


def split_inception_score(probabilities: Tensor, splits: int, order: SplitOrder) -> tuple[float, float]:
    """Mean and standard deviation of the Inception Scores of `splits` parts of the images.

    Args:
        probabilities: [N, classes], rows that sum to 1.
        splits: number of parts; part i ends before image (i + 1) N // splits.
        order: whether the images are shuffled before they are split.

    Raises:
        ValueError: there are fewer images than splits.
    """
    count = len(probabilities)
    if count < splits:
        raise ValueError(f"{splits} splits need as many images, not {count}")
    p = probabilities.double().cpu()
    if order == "shuffled":
        p = p[torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))]
    scores = list[float]()
    for split in range(splits):
        part = p[split * count // splits : (split + 1) * count // splits]
        mean = part.mean(0)
        divergence = torch.xlogy(part, part).sum(1) - torch.special.xlogy(part, mean).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def protocol_records(
    samples: Parts,
    reference: Reference,
    extractor: Extractor,
    settings: EvaluateSection,
    device: torch.device,
) -> Record:
    """Scores of evaluate.protocol by their keys in the scores file; empty without a protocol.

    `samples` are parts with `features`, and with `probabilities` and `spatial` if the extractor returns them.
    Scores of the protocol that cannot be computed from these parts are absent; `deviations` lists them.
    """
    if settings.protocol is None:
        return {}
    protocol, records = PROTOCOLS[settings.protocol], Record()
    probabilities, spatial = (concatenate(samples, name) for name in ("probabilities", "spatial"))
    source: Record = {"features": extractor.name}
    wanted = protocol.splits is not None and "inception_score" in settings.metrics
    if wanted and probabilities is not None and len(probabilities) >= (protocol.splits or 1):
        splits = protocol.splits or 1
        value, deviation = split_inception_score(probabilities, splits, protocol.split_order)
        records["inception_score_of_splits"] = {
            "value": value,
            "std_over_splits": deviation,
            "splits": splits,
            "order": ORDER_TEXTS[protocol.split_order],
            "images": len(probabilities),
            **source,
        }
    if spatial is not None and reference.spatial is not None and "frechet_distance" in settings.metrics:
        estimate = estimate_frechet_distance(spatial.to(device), reference.spatial.to(device), limit=False)
        records["spatial_frechet_distance"] = {
            "value": estimate.value,
            **error_record(estimate.stderr, SAMPLES_ONLY, estimate.unreliable),
            "features": f"{extractor.name} mixed_6/conv, 7 channels",
            "images": len(spatial),
            "reference": reference.name,
        }
    if protocol.pair_samples and reference.rows is not None and "precision_recall" in settings.metrics:
        features = concatenate(samples, "features")
        assert features is not None, "every part has features"
        selected = features[subset_indices(len(features), protocol.pair_samples)].to(device)
        k = protocol.neighbors or 3
        result = precision_and_recall(selected, reference.rows.to(device), k)
        source |= {"images": len(selected), "reference_images": len(reference.rows), "neighbours": k}
        for name, value, stderr in (
            ("precision", result.precision, result.precision_stderr),
            ("recall", result.recall, result.recall_stderr),
        ):
            records[name] = {"value": value, **error_record(stderr, BOTH_SETS, result.unreliable), **source}
    return records


@dataclass(frozen=True)
class ScoredSet:
    """Properties of the samples and of the reference that are compared with a protocol."""

    images: int
    levels: int
    """Intensity levels of the samples."""
    reference_kind: str
    """Kind of the reference: statistics, images, or the name of a split of the data set."""
    class_counts: Sequence[int] | None = None
    """Number of samples of each class; None if the classes are unknown."""
    lossy: Mapping[str, int] | None = None
    """Number of files of each format whose files may contain other pixels than were saved."""


def named_protocol(
    settings: EvaluateSection, extractor: Extractor, reference: Reference, scored: ScoredSet
) -> dict[str, Any]:
    """Entries of the recorded protocol for evaluate.protocol: its name and all deviations; empty if unset."""
    if settings.protocol is None:
        return {}
    differences = deviations(PROTOCOLS[settings.protocol], settings, extractor, reference, scored)
    return {"name": settings.protocol, "deviations": differences}


def deviations(
    protocol: EvaluationProtocol,
    settings: EvaluateSection,
    extractor: Extractor,
    reference: Reference,
    scored: ScoredSet,
) -> list[str]:
    """Deviations from the protocol, one line each."""
    differences = list[str]()
    if settings.features != "inception":
        differences.append(f"evaluate.features: {settings.features}, not inception")
    elif extractor.sha256 != INCEPTION_SHA256:
        differences.append(f"weights: SHA-256 {extractor.sha256}, not {INCEPTION_SHA256}")
    if missing := [name for name in protocol.metrics if name not in settings.metrics]:
        differences.append(f"evaluate.metrics: without {', '.join(missing)}")
    if more := [name for name in settings.metrics if name not in (*protocol.metrics, "memorization")]:
        differences.append(f"evaluate.metrics: {', '.join(more)}, which it does not define")
    if protocol.neighbors and settings.pair_images != protocol.pair_images:
        differences.append(f"evaluate.pair_images: {settings.pair_images:,}, not {protocol.pair_images:,}")
    if protocol.images and scored.images != protocol.images:
        differences.append(f"images: {scored.images:,}, not {protocol.images:,}")
    if scored.levels != 256:
        differences.append(f"intensity levels: {scored.levels}, stretched to 256")
    counts = scored.class_counts or ()
    balanced = len(counts) > 1 and min(counts) > 1 and max(counts) - min(counts) <= 1
    if protocol.random_classes and balanced:
        differences.append(f"classes: {balance_text(counts)}, not drawn at random")
    for kind, files in (scored.lossy or {}).items():
        differences.append(
            f"samples: {files:,} {kind} files, which may not hold the pixels that were sampled"
        )
    return differences + _of_reference(protocol, settings, reference, scored)


def _of_reference(
    protocol: EvaluationProtocol, settings: EvaluateSection, reference: Reference, scored: ScoredSet
) -> list[str]:
    differences, kind = list[str](), scored.reference_kind
    if protocol.reference == "adm-batch" and kind != "statistics":
        differences.append(f"reference: {reference.name}, not an .npz of guided-diffusion")
    if protocol.reference == "training-set" and kind not in ("statistics", "train"):
        differences.append(f"reference: {reference.name}, not statistics of the training set")
    if protocol.spatial and reference.spatial is None:
        differences.append("no sFID: the reference has no mu_s and sigma_s")
    pairs = protocol.neighbors and "precision_recall" in settings.metrics
    if pairs and (reference.rows is None or len(reference.rows) != protocol.pair_images):
        images = 0 if reference.rows is None else len(reference.rows)
        differences.append(f"precision and recall: {images:,} reference images, not {protocol.pair_images:,}")
    if protocol.splits and scored.images < protocol.splits:
        differences.append(f"no Inception Score of {protocol.splits} splits: {scored.images} images")
    return differences


def balance_text(counts: NDArray[np.int64] | Sequence[int]) -> str:
    """Number of images of each class as text, e.g. "50 of each of 1,000 classes"."""
    low, high = int(min(counts)), int(max(counts))
    of = f"of each of {len(counts):,} classes"
    return f"{low:,} {of}" if low == high else f"{low:,} to {high:,} {of}"
