"""Score tables. A table of scores with different protocols always states the differences."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fm_core.report.html import PageSection, Table
from fm_core.report.memorization_table import memorization_verdict
from fm_core.report.score_plots import comparison_figures, nfe_figures, score_figures
from fm_core.report.score_text import (
    INCEPTION,
    accuracy_text,
    distance_title,
    error_notes,
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


LIMIT = "frechet_limit"
"""Column of the distance's limit, shown if distances were computed with different numbers of images."""
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
    letters = [chr(ord("A") + number % 26) for number in range(len(protocols))]
    several = len(protocols) > 1
    sizes = {record.get("images") for entry in entries if (record := entry.scores.get("frechet_distance"))}
    columns = [
        column
        for column in COLUMNS
        if any(score_record(entry.scores, column.key) for entry in entries)
        and (column.key != LIMIT or len(sizes) > 1)
    ]
    notes = error_notes(
        (column.head(entries), record)
        for column in columns
        for entry in entries
        if column.key != LIMIT and (record := score_record(entry.scores, column.key))
    )
    notes += [DIFFERENT_SIZES] if len(sizes) > 1 else []
    head = ["", *(["protocol"] if several else []), *(column.head(entries) for column in columns)]
    rows = [
        [
            entry.name,
            *([letters[protocols.index(entry.protocol)]] if several else []),
            *(column.cell(entry.scores) for column in columns),
        ]
        for entry in entries
    ]
    return Comparison(Table(head, rows), _differences(protocols, letters), notes)


def _differences(protocols: Sequence[Mapping[str, Any]], letters: Sequence[str]) -> list[str]:
    keys = sorted(set().union(*(protocol.keys() for protocol in protocols)))
    lines = list[str]()
    for key in keys:
        values = [protocol.get(key, "not recorded") for protocol in protocols]
        if any(value != values[0] for value in values):
            by_letter = zip(letters, values, strict=True)
            lines.append(f"{key}: {'; '.join(f'{letter}: {value}' for letter, value in by_letter)}")
    return lines


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat = dict[str, Any]()
    for key, nested in value.items():
        flat |= _flat(nested, f"{prefix}.{key}" if prefix else str(key))
    return flat


@dataclass(frozen=True)
class Column:
    """A score and the format of its column."""

    key: str
    title: str
    digits: int

    def head(self, entries: Sequence[ScoreEntry]) -> str:
        """Title of the column; a Fréchet distance is called FID if all entries use Inception features."""
        records = [record for entry in entries if (record := score_record(entry.scores, self.key))]
        kinds = {str(record.get("features")) for record in records}
        if self.key == "frechet_distance":
            return distance_title(str(kinds.pop())) if len(kinds) == 1 else self.title
        if self.key == "bits_per_dim_k_sample":
            return f"bits/dim, K = {' or '.join(str(k) for k in sorted({r['k'] for r in records}))}"
        return self.title

    def cell(self, scores: Mapping[str, Any]) -> str:
        """Value, standard error and number of images; empty if the score is absent."""
        record = score_record(scores, self.key)
        if record is None:
            return "not known" if self.key == LIMIT and "frechet_distance" in scores else ""
        if self.key == "classifier":
            return f"{record['held_out_accuracy']:.1%}"
        images = f" ({record['images']:,})" if "images" in record else ""
        return f"{with_error(record, self.digits)}{images}"


COLUMNS = (
    Column("frechet_distance", "Fréchet distance", 3),
    Column(LIMIT, "its limit for infinitely many images", 3),
    Column("classifier", "accuracy of the classifier", 3),
    Column("spatial_frechet_distance", "sFID", 3),
    Column("kernel_distance", "kernel distance", 5),
    Column("inception_score", "Inception Score", 2),
    Column("inception_score_of_splits", "Inception Score of splits", 2),
    Column("classifier_score", "classifier score", 2),
    Column("precision", "precision", 3),
    Column("recall", "recall", 3),
    Column("bits_per_dim", "bits/dim, K = 1", 3),
    Column("bits_per_dim_k_sample", "bits/dim, K > 1", 3),
    Column("nfe", "NFE", 0),
)


def scores_section(scores: Mapping[str, Any]) -> PageSection:
    """Section with one set of scores, drawn and listed with errors and numbers of images, and protocol."""
    rows = list[list[str]]()
    for key, what in (
        ("frechet_distance", "samples"),
        ("frechet_distance_of_as_many", "samples"),
        ("frechet_distance_of_held_out", "real validation images"),
    ):
        if key in scores:
            rows += _distance_rows(scores[key], what)
    for column in COLUMNS[3:10]:
        if record := score_record(scores, column.key):
            against = f" against {record['reference_images']:,}" if "reference_images" in record else ""
            of = f"{record['images']:,} samples{against}, {record['features']} features"
            rows.append([column.title, with_error(record, column.digits), of])
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
        if verdict := memorization_verdict(scores):
            note = f"{verdict} {note}"
        if accuracy := accuracy_text(scores):
            note = f"{note} Of these features: {accuracy}."
    titles = {column.key: column.head([ScoreEntry("", scores)]) for column in COLUMNS}
    records = [
        (titles[key], record) for key in titles if key != LIMIT and (record := score_record(scores, key))
    ]
    note = " ".join([note, *error_notes(records)]).strip()
    curves = nfe_figures(scores["nfe_curve"]) if "nfe_curve" in scores else []
    parts = [*score_figures(scores), Table(["", "value", "of"], rows), *curves]
    return PageSection("Scores", parts, note, text=json.dumps(scores["protocol"], indent=1))


def comparison_section(title: str, entries: Sequence[ScoreEntry]) -> PageSection:
    """Section with several sets of scores, drawn and listed, and the differences of their protocols."""
    comparison = compare_scores(entries)
    differences = [WARNING, *comparison.differences] if comparison.differences else []
    titles = {
        column.key: column.head(entries) for column in COLUMNS if column.key not in (LIMIT, "classifier")
    }
    figures = comparison_figures([(entry.name, entry.scores) for entry in entries], titles)
    return PageSection(title, [comparison.table, *figures], " ".join([*comparison.notes, *differences]))


def _distance_rows(record: Mapping[str, Any], what: str) -> list[list[str]]:
    few = ", fewer than features" if record.get("fewer_images_than_features") else ""
    of = f"{record['images']:,} {what}{few}"
    rows = [[distance_title(record["features"]), with_error(record, 3), of]]
    if limit := score_record({"frechet_distance": record}, LIMIT):
        rows.append(["", with_error(limit, 3), f"extrapolated to infinitely many {what}"])
    else:
        rows.append(["", "not known", f"at infinitely many {what}: at most two images per feature"])
    return rows


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
