"""Scores as text: a value with its standard error, and what the error covers.

Every page, table and log line that displays a score uses these functions. Errors that are unreliable, or
that do not cover the reference or the training, are therefore marked as such everywhere.
"""

from collections.abc import Iterable, Mapping
from typing import Any

INCEPTION = "inception-v3-2015-12-05"
"""Name of the features on which a Fréchet distance is called FID."""
UNRELIABLE = "(± unreliable)"
EARLIER = "computed by an earlier version (block jackknife, or binomial)"
Record = Mapping[str, Any]


def score_record(scores: Record, key: str) -> Record | None:
    """Look up the record of a score, or None; files of earlier versions store some under other keys.

    `frechet_limit` is the distance extrapolated to infinitely many images; `bits_per_dim_k_sample` is the
    bits/dim of K draws; `classifier_score` is what files of earlier versions call the Inception Score of
    other features.
    """
    if key == "frechet_limit":
        distance = scores.get("frechet_distance", {})
        reason = {key: distance[key] for key in ("unreliable",) if key in distance}
        return {**distance["infinity"], **reason} if "infinity" in distance else None
    if key == "bits_per_dim_k_sample":
        return scores.get("bits_per_dim", {}).get("k_sample")
    score = scores.get("inception_score")
    if key == "classifier_score" and key not in scores and score and score.get("features") != INCEPTION:
        return score
    if key == "inception_score" and score and score.get("features") != INCEPTION:
        return None
    return scores.get(key)


def further_scores(scores: Record) -> Mapping[str, Record]:
    """Scores of further extractors by the names of their features; empty if there are none."""
    return scores.get("extractors", {})


def distance_title(features: str) -> str:
    """Return "FID" for the features that define FID, and "Fréchet distance" with their name for others."""
    return "FID" if features == INCEPTION else f"Fréchet distance ({features} features)"


def with_error(record: Record, digits: int) -> str:
    """Format value and standard error, marked if it is unreliable; only the value if there is no error."""
    value = f"{record.get('value', record.get('mean')):.{digits}f}"
    if "stderr" not in record:
        return value
    mark = f" {UNRELIABLE}" if record.get("unreliable") else ""
    return f"{value} ± {record['stderr']:.{digits}f}{mark}"


def error_notes(records: Iterable[tuple[str, Record]]) -> list[str]:
    """Describe what the errors of scores cover and why some are unreliable, from (title, record) pairs.

    Records without an error are omitted.
    """
    covered, unreliable = dict[str, list[str]](), dict[str, list[str]]()
    for title, record in records:
        if "stderr" not in record:
            continue
        _add(covered, record.get("covers", EARLIER), title)
        if reason := record.get("unreliable"):
            _add(unreliable, reason, title)
    if not covered:
        return []
    parts = [f"{what} ({', '.join(titles)})" for what, titles in covered.items() if what != EARLIER]
    notes = list[str]()
    if parts:
        notes.append(
            f"± is the deviation over independent {'; '.join(parts)}. It does not cover training seeds."
        )
    if earlier := covered.get(EARLIER):
        notes.append(f"± of {', '.join(earlier)}: {EARLIER}.")
    if unreliable:
        reasons = [f"{', '.join(titles)} ({reason})" for reason, titles in unreliable.items()]
        notes.append(f"± unreliable: {'; '.join(reasons)}.")
    return notes


def accuracy_text(scores: Record) -> str:
    """Validation accuracy of the classifier whose features the distances use, as text; empty without one."""
    classifier = scores.get("classifier")
    if not classifier:
        return ""
    accuracy, images = f"accuracy of the classifier {classifier['held_out_accuracy']:.1%}", ""
    if count := classifier.get("held_out_images"):
        images = f" on {count:,} validation images"
    return accuracy + images


def summary(scores: Record) -> str:
    """Return the scores in one line."""
    parts = list[str]()
    frechet, further = scores.get("frechet_distance"), further_scores(scores)
    parts += _distance_parts(scores, ratio=bool(further))
    for own in further.values():
        parts += _distance_parts(own, ratio=True)
    if accuracy := accuracy_text(scores):
        parts.append(accuracy)
    for key, name in (
        ("kernel_distance", "kernel distance"),
        ("inception_score", "Inception Score"),
        ("classifier_score", "classifier score"),
    ):
        if (record := score_record(scores, key)) and not frechet:
            parts.append(f"{name} {record['value']:.4g} ± {record['stderr']:.2g}")
    if nearer := scores.get("memorization", {}).get("pixels", {}).get("nearer"):
        parts.append(f"{with_error(nearer, 2)} nearer to training images than validation images are")
    if recognized := scores.get("recognised"):
        parts.append(f"{recognized['value']:.1%} recognized (real: {recognized['held_out']:.1%})")
    if accuracy := scores.get("class_accuracy"):
        parts.append(f"{accuracy['value']:.1%} of the class sampled (real: {accuracy['held_out']:.1%})")
    if copies := scores.get("duplicates"):
        parts.append(f"{copies['images']} of {copies['of']} images are copies of others")
    if nfe := scores.get("nfe"):
        parts.append(f"NFE {nfe['mean']:.0f}")
    if bits := scores.get("bits_per_dim"):
        parts.append(f"{with_error(bits, 3)} bits/dim (K = 1)")
        if k_sample := bits.get("k_sample"):
            parts.append(f"{with_error(k_sample, 3)} bits/dim (K = {k_sample['k']})")
    return "; ".join(parts)


def _distance_parts(scores: Record, ratio: bool) -> list[str]:
    """Distance of the samples and of real images with one extractor, and their ratio on request."""
    if "frechet_distance" not in scores:
        return []
    frechet, held_out = scores["frechet_distance"], scores["frechet_distance_of_held_out"]
    # The distance decreases with the number of images, so only distances of equal numbers are comparable.
    same_size = scores.get("frechet_distance_of_as_many", frechet)
    parts = [
        f"Fréchet distance ({frechet['features']} features, {same_size['images']} images) "
        f"{same_size['value']:.2f} ± {same_size['stderr']:.2f}, "
        f"real held-out images {held_out['value']:.2f}"
    ]
    if ratio and (fdr := scores.get("frechet_distance_ratio")):
        parts[0] += f", FDr {fdr['value']:.2f} ± {fdr['stderr']:.2f}"
    if reason := same_size.get("unreliable"):
        parts.append(f"its ± is unreliable: {reason}")
    return parts


def _add(groups: dict[str, list[str]], key: str, title: str) -> None:
    titles = groups.setdefault(key, [])
    if title not in titles:
        titles.append(title)
