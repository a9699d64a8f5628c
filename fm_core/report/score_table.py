"""Score tables. A table of scores with different protocols always states the differences."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fm_core.report.html import PageSection, Table
from fm_core.report.memorization_table import memorization_verdict
from fm_core.report.score_columns import FEATURE_COLUMNS, LIMIT, columns_of
from fm_core.report.score_plots import comparison_figures, nfe_figures, score_figures
from fm_core.report.score_text import (
    INCEPTION,
    accuracy_text,
    distance_title,
    error_notes,
    further_scores,
    score_record,
    with_error,
)

SUBJECT_KEYS = ("weights_sha256", "samples_digest")
"""Keys of a protocol that identify what is scored; if only these differ, the protocols count as equal."""


@dataclass(frozen=True)
class ScoreEntry:
    """Scores of one set of samples."""

    name: str
    scores: Mapping[str, Any]

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that affects the numbers, under dotted names, except the subject of the comparison."""
        return {
            key: value for key, value in _flat(self.scores["protocol"]).items() if key not in SUBJECT_KEYS
        }


@dataclass(frozen=True)
class Comparison:
    """Several sets of scores in one table, and the differences between their protocols."""

    table: Table
    differences: Sequence[str]
    """One line for each key in which the protocols differ; empty if the numbers are comparable."""
    notes: Sequence[str] = ()
    """Notes on what the errors cover and which numbers must not be compared."""

    def text(self) -> str:
        """Return the table as Markdown, followed by the differences."""
        rows = [self.table.head, ["---"] * len(self.table.head), *self.table.rows]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines += ["", *self.notes] if self.notes else []
        if self.differences:
            lines += ["", WARNING, *(f"- {line}" for line in self.differences)]
        return "\n".join(lines)


DIFFERENT_SIZES = (
    "Fréchet distances of different numbers of images are not comparable, as fewer give a larger one; their "
    "limits are."
)
WARNING = "These scores have different protocols and are comparable only as far as these differences allow:"


def compare_scores(entries: Sequence[ScoreEntry]) -> Comparison:
    """Build a table with one row for each set of scores, and the differences between protocols.

    If there is more than one protocol, a column labels each with a letter.
    """
    protocols = list[dict[str, Any]]()
    for entry in entries:
        protocols += [entry.protocol] if entry.protocol not in protocols else []
    letters = [_letters(number) for number in range(len(protocols))]
    several = len(protocols) > 1
    sizes = {record.get("images") for entry in entries if (record := entry.scores.get("frechet_distance"))}
    every = [entry.scores for entry in entries]
    columns = [
        column
        for column in columns_of(every)
        if any(column.record(scores) for scores in every) and (column.key != LIMIT or len(sizes) > 1)
    ]
    notes = error_notes(
        (column.head(every), record)
        for column in columns
        for scores in every
        if column.key != LIMIT and (record := column.record(scores))
    )
    notes += [DIFFERENT_SIZES] if len(sizes) > 1 else []
    head = ["", *(["protocol"] if several else []), *(column.head(every) for column in columns)]
    rows = [
        [
            entry.name,
            *([letters[protocols.index(entry.protocol)]] if several else []),
            *(column.cell(entry.scores) for column in columns),
        ]
        for entry in entries
    ]
    differences = _differences(protocols, letters) + _extractor_differences(entries)
    return Comparison(Table(head, rows), differences, notes)


def _differences(protocols: Sequence[Mapping[str, Any]], letters: Sequence[str]) -> list[str]:
    keys = sorted(set().union(*(protocol.keys() for protocol in protocols)))
    lines = list[str]()
    for key in keys:
        values = [protocol.get(key, "not recorded") for protocol in protocols]
        if any(value != values[0] for value in values):
            by_letter = zip(letters, values, strict=True)
            lines.append(f"{key}: {'; '.join(f'{letter}: {value}' for letter, value in by_letter)}")
    return lines


def _extractor_differences(entries: Sequence[ScoreEntry]) -> list[str]:
    """Differences between the protocols of further extractors of one name, where several entries use it."""
    lines = list[str]()
    for name in dict.fromkeys(name for entry in entries for name in further_scores(entry.scores)):
        own = [
            (e.name, _flat(s[name]["protocol"])) for e in entries if name in (s := further_scores(e.scores))
        ]
        for key in sorted(set().union(*(protocol for _, protocol in own))):
            values = [(entry, protocol.get(key, "not recorded")) for entry, protocol in own]
            if any(value != values[0][1] for _, value in values):
                by_entry = "; ".join(f"{entry}: {value}" for entry, value in values)
                lines.append(f"{key} of {name}: {by_entry}")
    return lines


def _letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ... for 0, 1, ..."""
    letter = chr(ord("A") + number % 26)
    return letter if number < 26 else _letters(number // 26 - 1) + letter


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat = dict[str, Any]()
    for key, nested in value.items():
        flat |= _flat(nested, f"{prefix}.{key}" if prefix else str(key))
    return flat


def scores_section(scores: Mapping[str, Any]) -> PageSection:
    """Section with one set of scores, drawn and listed with errors and numbers of images, and protocol."""
    further = further_scores(scores)
    rows = [row for own in (scores, *further.values()) for row in _feature_rows(own)]
    rows += _classifier_rows(scores)
    if copies := scores.get("duplicates"):
        rows.append(["copies of other samples", f"{copies['images']:,}", f"of {copies['of']:,} samples"])
    if nfe := scores.get("nfe"):
        steps = ", ".join(f"{nfe[key]:.1f} steps {key}" for key in ("accepted", "rejected") if key in nfe)
        details = [f"{nfe['solver']}, batches of {nfe['batch_size']}", steps] if steps else [nfe["solver"]]
        rows.append(["NFE", f"{nfe['mean']:.0f}", ", ".join(details)])
    rows += _likelihood_rows(scores)
    note = ""
    if distance := scores.get("frechet_distance"):
        note = f"Reference: {distance['reference']}."
        if distance["features"] != INCEPTION:
            note = f"Distances with {distance['features']} features are not FID. {note}"
        if further and (name := scores["protocol"].get("name")):
            note = f"The protocol {name} covers the scores of {distance['features']} features alone. {note}"
        if verdict := memorization_verdict(scores):
            note = f"{verdict} {note}"
        if accuracy := accuracy_text(scores):
            note = f"{note} Of these features: {accuracy}."
    records = [
        (column.head([scores]), record)
        for column in columns_of([scores])
        if column.key != LIMIT and (record := column.record(scores))
    ]
    note = " ".join([note, *error_notes(records)]).strip()
    curves = nfe_figures(scores["nfe_curve"]) if "nfe_curve" in scores else []
    parts = [*score_figures(scores), Table(["", "value", "of"], rows), *curves]
    protocols = {name: own["protocol"] for name, own in further.items()}
    protocol = json.dumps(scores["protocol"] | ({"extractors": protocols} if protocols else {}), indent=1)
    return PageSection("Scores", parts, note, text=protocol)


def comparison_section(title: str, entries: Sequence[ScoreEntry]) -> PageSection:
    """Section with several sets of scores, drawn and listed, and the differences of their protocols."""
    comparison = compare_scores(entries)
    differences = [WARNING, *comparison.differences] if comparison.differences else []
    figures = comparison_figures([(entry.name, entry.scores) for entry in entries])
    return PageSection(title, [comparison.table, *figures], " ".join([*comparison.notes, *differences]))


def _feature_rows(scores: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the scores of one extractor."""
    rows = list[list[str]]()
    for key, what in (
        ("frechet_distance", "samples"),
        ("frechet_distance_of_as_many", "samples"),
        ("frechet_distance_of_held_out", "real validation images"),
    ):
        if key in scores:
            rows += _distance_rows(scores[key], what)
    if ratio := scores.get("frechet_distance_ratio"):
        of = f"distance of {ratio['images']:,} samples divided by that of as many validation images"
        rows.append(["FDr", with_error(ratio, 3), f"{of}, {ratio['features']} features"])
    for column in FEATURE_COLUMNS:
        if record := column.record(scores):
            against = f" against {record['reference_images']:,}" if "reference_images" in record else ""
            of = f"{record['images']:,} samples{against}, {record['features']} features"
            rows.append([column.title, with_error(record, column.digits), of])
    return rows


def _distance_rows(record: Mapping[str, Any], what: str) -> list[list[str]]:
    few = ", fewer than features" if record.get("fewer_images_than_features") else ""
    of = f"{record['images']:,} {what}{few}"
    rows = [[distance_title(record["features"]), with_error(record, 3), of]]
    if limit := score_record({"frechet_distance": record}, LIMIT):
        rows.append(["", with_error(limit, 3), f"extrapolated to infinitely many {what}"])
    else:
        rows.append(["", "not known", f"at infinitely many {what}: at most two images per feature"])
    return rows


def _class_accuracy_rows(scores: Mapping[str, Any]) -> list[list[str]]:
    accuracy = scores.get("class_accuracy")
    if accuracy is None:
        return []
    return [
        [
            "of the class that was sampled",
            f"{accuracy['value']:.1%} ± {accuracy['stderr']:.1%}",
            f"{accuracy['images']:,} samples, as the classifier labels them",
        ],
        ["", f"{accuracy['held_out']:.1%}", "real validation images with their labels"],
    ]


def _classifier_rows(scores: Mapping[str, Any]) -> list[list[str]]:
    if "recognised" not in scores:
        return []
    recognized, classifier = scores["recognised"], scores["classifier"]
    shares = recognized["class_shares"]
    return [
        [
            "recognized with confidence above 0.9",
            f"{recognized['value']:.1%}",
            f"{recognized['images']:,} samples",
        ],
        ["", f"{recognized['held_out']:.1%}", f"{recognized['held_out_images']:,} real validation images"],
        *_class_accuracy_rows(scores),
        [
            "smallest and largest class share",
            f"{min(shares):.1%} to {max(shares):.1%}",
            "of the samples, as the classifier labels them",
        ],
        [
            "validation accuracy of the classifier",
            f"{classifier['held_out_accuracy']:.2%}",
            f"{classifier['held_out_images']:,} images",
        ],
    ]


def _likelihood_rows(scores: Mapping[str, Any]) -> list[list[str]]:
    if "bits_per_dim" not in scores:
        return []
    bits = scores["bits_per_dim"]
    detail = f"{bits['images']:,} validation images, K = {bits['k']}, probe deviation {bits['probe_std']:.3f}"
    rows = [["bits/dim", with_error(bits, 3), detail]]
    if k_sample := bits.get("k_sample"):
        rows.append(["", with_error(k_sample, 3), f"K = {k_sample['k']}, probes shared by the draws"])
    if check := bits.get("solver_check"):
        largest = f"at most {check['largest']:.1e} for {check['images']} images"
        detail = f"change at a tenth of the tolerances; {largest}"
        rows.append(["", f"{check['mean']:+.1e}", detail])
    return rows
