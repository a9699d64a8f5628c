"""Memorization table: distances of samples to the training images, compared with validation images."""

from collections.abc import Mapping
from typing import Any

from fm_core.report.score_text import with_error

NOTE = (
    "A model that generalizes draws samples as far from the training images as validation images are. A "
    "near-copy is nearer to its nearest training image than 99% of the validation images are to theirs."
)
HEAD = ["", "samples", "validation images", "of"]
OVERFITS = 3.0
"""Difference between samples and validation images, in standard errors, at which a model overfits."""


def memorization_rows(scores: Mapping[str, Any]) -> list[list[str]]:
    """Table rows with the columns of HEAD; empty if memorization was not scored."""
    rows = list[list[str]]()
    for space, record in scores.get("memorization", {}).items():
        features = f" ({record['extractor']})" if "extractor" in record else ""
        of = f"nearest of {record['training_images']:,} training images, in {space}{features}"
        digits = 3
        rows.append(
            [record["distance"], *(with_error(record[k], digits) for k in ("samples", "held_out")), of]
        )
        for key, title in (("nearer", "nearer than the other"), ("near_copies", "near-copies")):
            expected = f"{record[key]['expected']:.3f} expected"
            rows.append([title, with_error(record[key], digits), expected, f"{record['images']:,} samples"])
    near, far = (scores.get(f"frechet_distance_to_{key}") for key in ("as_many_training", "held_out"))
    if near and far:
        title = f"Fréchet distance ({near['features']} features)"
        rows.append([title, with_error(near, 3), "", f"to {near['reference']}"])
        rows.append([title, with_error(far, 3), "", f"to {far['reference']}"])
    return rows


def memorization_verdict(scores: Mapping[str, Any]) -> str:
    """Sentence to show if samples are significantly nearer to the training images than validation images."""
    shares = list[str]()
    for space, record in scores.get("memorization", {}).items():
        share = record["nearer"]
        if share["value"] - share["expected"] > OVERFITS * share["stderr"]:
            shares.append(f"{share['value']:.0%} in {space}")
    if not shares:
        return ""
    return (
        "This model overfits: its samples are nearer to the training images than validation images are (with "
        f"probability {', '.join(shares)}; 50% without overfitting)."
    )
