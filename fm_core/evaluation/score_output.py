"""Output of a set of scores: a JSON file, and lines for a paper in plain text and as a BibTeX note."""

import json
import unicodedata
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import INCEPTION
from fm_core.storage.atomic_files import SCHEMA
from fm_core.storage.store import Store

PACKAGE = "flow-matching-pipeline"
_VALUES = (
    ("frechet_distance", "Fréchet distance", 2),
    ("spatial_frechet_distance", "sFID", 2),
    ("kernel_distance", "kernel distance", 5),
    ("inception_score", "Inception Score of all images", 2),
    ("classifier_score", "classifier score of all images", 2),
    ("inception_score_of_splits", "Inception Score", 2),
    ("precision", "precision", 3),
    ("recall", "recall", 3),
)
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "é": "{\\'e}",
    "×": "$\\times$",
}


def scores_text(scores: Mapping[str, Any]) -> str:
    """Return the scores as JSON text, with the schema version."""
    return json.dumps({"schema": SCHEMA, **scores}, indent=1, allow_nan=False)


def check_output(output: str) -> None:
    """Raise UserError if evaluate.output is a folder; called before the scores are computed."""
    folder, _, name = output.rpartition("/")
    store = Store.at(folder or ".")
    if not name or (store.local is not None and (store.local / name).is_dir()):
        raise UserError(f"evaluate.output {output}: is a folder; name a file, such as scores.json")


def write_scores(output: str, scores: Mapping[str, Any]) -> None:
    """Write evaluate.output, a path or URL. Raises UserError if it cannot be written."""
    folder, _, name = output.rpartition("/")
    Store.at(folder or ("/" if output.startswith("/") else ".")).write_bytes(
        name, f"{scores_text(scores)}\n".encode()
    )


def values_text(scores: Mapping[str, Any]) -> str:
    """Return the scores with their errors, e.g. "FID 2.31 ± 0.04, recall 0.571 ± 0.005"."""
    parts = [_values(scores)]
    parts += [f"{text} ({name} features)" for name, own in _further(scores).items() if (text := _values(own))]
    return "; ".join(parts)


def _further(scores: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Scores of further extractors by the names of their features."""
    return scores.get("extractors", {})


def _values(scores: Mapping[str, Any]) -> str:
    """Return the scores of one extractor with their errors."""
    parts = list[str]()
    for key, title, digits in _VALUES:
        if key not in scores or "alias_of" in scores[key]:
            continue
        record = scores[key]
        if record["features"] == INCEPTION:
            title = "FID" if key == "frechet_distance" else title
        else:
            title = title.replace("Inception Score", "classifier score")
        if "splits" in record:
            title = f"{title} of {record['splits']} splits"
        error = record.get("stderr", record.get("std_over_splits"))
        shown = f"{_number(record['value'], digits)}"
        parts.append(f"{title} {shown}" + (f" ± {_number(error, digits)}" if error else ""))
    return ", ".join(parts)


def _number(value: float, digits: int) -> str:
    """Format a value with this many decimal places, or with two significant digits if that is longer."""
    return f"{value:.{digits}f}" if abs(value) >= 0.1 or digits > 2 else f"{value:.2g}"


def protocol_statement(scores: Mapping[str, Any]) -> str:
    """Describe the scoring in one line: protocol, deviations, extractor, images, reference, sampler."""
    protocol: Mapping[str, Any] = scores["protocol"]
    parts = [_name(protocol)]
    weights = f"weights SHA-256 {protocol['features_sha256'][:16]}"
    resize = f", {protocol['resize']}" if "resize" in protocol else ""
    parts.append(f"features {protocol['features']} ({weights}{resize})")
    parts += [_further_features(name, own, protocol.get("name")) for name, own in _further(scores).items()]
    if images := _images(scores):
        parts.append(f"{images:,} samples against {protocol['reference']}")
    if "precision" in scores:
        pair = scores["precision"]
        parts.append(
            f"precision and recall with k = {pair.get('neighbours', 3)}, {pair['images']:,} samples against "
            f"{pair.get('reference_images', 0):,} images"
        )
    if "solver" in protocol:
        accuracy = f"{protocol['steps']} steps" if "steps" in protocol else f"rtol {protocol.get('rtol')}"
        nfe = f", NFE {scores['nfe']['mean']:.0f}" if "nfe" in scores else ""
        parts.append(f"{protocol['solver']}, {accuracy}, seed {protocol.get('seed')}{nfe}")
    if "data" in protocol:
        parts.append(f"data {protocol['data']} {str(protocol.get('data_version'))[:12]}")
    return "; ".join([*parts, f"{PACKAGE} {_version()}"])


def _further_features(name: str, scores: Mapping[str, Any], named: str | None) -> str:
    """Describe a further extractor, of which a named protocol defines nothing."""
    own = scores["protocol"]
    resize = f", {own['resize']}" if "resize" in own else ""
    outside = f", not part of {named}" if named else ""
    weights = f"weights SHA-256 {own['features_sha256'][:16]}{resize}, against {own['reference']}"
    return f"also features {name} ({weights}){outside}"


def bibtex_note(scores: Mapping[str, Any]) -> str:
    """Return scores and protocol as a BibTeX field in one line of ASCII: note = {...}."""
    text = f"{values_text(scores)}; protocol: {protocol_statement(scores)}"
    return f"note = {{{''.join(_LATEX.get(each) or _ascii(each) for each in text)}}}"


def statements(scores: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines that `fm evaluate` prints, by label."""
    return {"protocol": protocol_statement(scores), "BibTeX": bibtex_note(scores)}


def _ascii(character: str) -> str:
    """Return a letter without its accent, or a question mark if it has no ASCII form."""
    if character.isascii():
        return character
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


def _name(protocol: Mapping[str, Any]) -> str:
    name, deviations = protocol.get("name"), protocol.get("deviations") or []
    if name is None:
        return "none of the named ones"
    return str(name) + (f" with deviations ({'; '.join(deviations)})" if deviations else "")


def _images(scores: Mapping[str, Any]) -> int | None:
    for key, *_ in _VALUES:
        if key in scores:
            return int(scores[key]["images"])
    return None


def _version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "(not installed)"
