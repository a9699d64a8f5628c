"""Scores as text: a value with its standard error, and what the error covers.

Every page, table and log line that shows a score uses these functions, so that an error that is unreliable,
or that does not cover the reference or the training, is shown as such everywhere.
"""

from collections.abc import Iterable, Mapping
from typing import Any

INCEPTION = "inception-v3-2015-12-05"
"""Name of the features with which a Fréchet distance is FID."""
UNRELIABLE = "(± unreliable)"
EARLIER = "computed by an earlier version (block jackknife, or binomial)"
Record = Mapping[str, Any]


def score_record(scores: Record, key: str) -> Record | None:
    """The record of a score, or None; files of earlier versions have some under other keys.

    `frechet_limit` is the distance extrapolated to infinitely many images, `bits_per_dim_k_sample` the
    bits/dim of K draws, `classifier_score` what these files call an Inception Score of other features.
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


def distance_title(features: str) -> str:
    """FID for the features that define FID; the Fréchet distance of the named features otherwise."""
    return "FID" if features == INCEPTION else f"Fréchet distance ({features} features)"


def with_error(record: Record, digits: int) -> str:
    """Value and standard error, which is marked if it is unreliable; the value alone if there is no error."""
    value = f"{record.get('value', record.get('mean')):.{digits}f}"
    if "stderr" not in record:
        return value
    mark = f" {UNRELIABLE}" if record.get("unreliable") else ""
    return f"{value} ± {record['stderr']:.{digits}f}{mark}"


def error_notes(records: Iterable[tuple[str, Record]]) -> list[str]:
    """Sentences that say what the errors of scores cover and why some are unreliable; arguments are titles.

    Records without an error are left out.
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
    """The held-out accuracy of the classifier whose features are behind the distances; empty without one."""
    classifier = scores.get("classifier")
    if not classifier:
        return ""
    accuracy, images = f"accuracy of the classifier {classifier['held_out_accuracy']:.1%}", ""
    if count := classifier.get("held_out_images"):
        images = f" on {count:,} validation images"
    return accuracy + images


def _add(groups: dict[str, list[str]], key: str, title: str) -> None:
    titles = groups.setdefault(key, [])
    if title not in titles:
        titles.append(title)
