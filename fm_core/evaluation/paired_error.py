"""Standard error of the difference of a score between two sets of samples, paired by noise if possible.

Samples of the same seed and index start from the same noise, so that the errors of their scores are
correlated. The error of their difference follows from the terms of each image (`InfluenceTerms`), which are
stored beside the scores. It is small if both sets contain nearly the same images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fm_core.evaluation.metrics.sampling_error import InfluenceTerms
from fm_core.storage.atomic_files import write_bytes

TERMS_SUFFIX = ".influence.safetensors"
SCALE = ("features_sha256", "reference", "data_version", "levels", "resize", "pair_images")
"""Keys of a protocol in which two scores must agree to be on one scale."""
NOISE = ("seed", "generator", "images", "data_version")
"""Keys of a protocol that determine the noise of a set of samples."""


@dataclass(frozen=True)
class ScoreDifference:
    """Difference of a score between two sets of samples."""

    value: float
    """Score of the first set minus that of the second."""
    stderr: float
    """Standard error over independent draws of the noise, for these networks and this reference."""
    paired: bool
    """Whether the error takes the noise that both sets share into account."""
    unreliable: str | None = None
    """Why the error is unreliable; None if it is reliable."""


def write_terms(scores_file: Path, terms: InfluenceTerms) -> None:
    """Store the terms of a Fréchet distance beside its scores file."""
    write_bytes(scores_file.with_suffix(TERMS_SUFFIX), save(terms.tensors()))


def read_terms(scores_file: Path) -> InfluenceTerms | None:
    """Read the terms beside a scores file; None if they are damaged, or missing as in earlier versions."""
    try:
        return InfluenceTerms.of_tensors(load(scores_file.with_suffix(TERMS_SUFFIX).read_bytes()))
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def on_one_scale(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the scores of two protocols can be compared: same features, reference and number of images."""
    return all(first.get(key) == second.get(key) for key in (*SCALE, "images"))


def share_noise(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether image i of two sets of samples starts from the same noise, according to their protocols."""
    return all(first.get(key) == second.get(key) for key in NOISE)


def score_difference(
    metric: str, first: Mapping[str, Any], second: Mapping[str, Any], files: tuple[Path, Path]
) -> ScoreDifference:
    """Difference of a score, first minus second, with its standard error.

    It is paired for Fréchet distances of samples with the same noise. Otherwise the errors of both values are
    added as those of independent values.

    Args:
        metric: key of the score in the scores files, e.g. "frechet_distance".
        first: content of the first scores file.
        second: content of the second scores file.
        files: both scores files, beside which the terms are.
    """
    value = first[metric]["value"] - second[metric]["value"]
    reason = first[metric].get("unreliable") or second[metric].get("unreliable")
    if metric == "frechet_distance" and share_noise(first["protocol"], second["protocol"]):
        mine, others = map(read_terms, files)
        terms = mine.less(others) if mine and others else None
        if terms is not None:
            error = terms.error()
            return ScoreDifference(value, error.stderr, True, reason or error.unreliable)
    stderr = hypot(first[metric].get("stderr", 0.0), second[metric].get("stderr", 0.0))
    return ScoreDifference(value, stderr, False, reason)
