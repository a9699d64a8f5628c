"""Columns of score tables: a score, its title, and the format of its values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fm_core.report.score_text import Record, distance_title, further_scores, score_record, with_error

LIMIT = "frechet_limit"
"""Column of the distance's limit, shown if distances were computed with different numbers of images."""


@dataclass(frozen=True)
class Column:
    """A score and the format of its column."""

    key: str
    title: str
    digits: int
    extractor: str | None = None
    """Name of the features of a further extractor; None for those of evaluate.features."""

    def record(self, scores: Record) -> Record | None:
        """Look up the record of this score, or None."""
        own = scores if self.extractor is None else further_scores(scores).get(self.extractor, {})
        return score_record(own, self.key)

    def head(self, every: Sequence[Record]) -> str:
        """Title of the column; a Fréchet distance is called FID if all scores use Inception features."""
        records = [record for scores in every if (record := self.record(scores))]
        kinds = {str(record.get("features")) for record in records}
        if self.key == "frechet_distance":
            return distance_title(str(kinds.pop())) if len(kinds) == 1 else self.title
        if self.key == "bits_per_dim_k_sample":
            return f"bits/dim, K = {' or '.join(str(k) for k in sorted({r['k'] for r in records}))}"
        return self.title if self.extractor is None else f"{self.title} ({self.extractor} features)"

    def cell(self, scores: Record) -> str:
        """Value, standard error and number of images; empty if the score is absent."""
        record = self.record(scores)
        if record is None:
            known = self.key == LIMIT and replace(self, key="frechet_distance").record(scores)
            return "not known" if known else ""
        if self.key == "classifier":
            return f"{record['held_out_accuracy']:.1%}"
        images = f" ({record['images']:,})" if "images" in record else ""
        return f"{with_error(record, self.digits)}{images}"


DISTANCE_COLUMNS = (
    Column("frechet_distance", "Fréchet distance", 3),
    Column(LIMIT, "its limit for infinitely many images", 3),
    Column("frechet_distance_ratio", "FDr", 3),
)
FEATURE_COLUMNS = (
    Column("spatial_frechet_distance", "sFID", 3),
    Column("kernel_distance", "kernel distance", 5),
    Column("inception_score", "Inception Score", 2),
    Column("inception_score_of_splits", "Inception Score of splits", 2),
    Column("classifier_score", "classifier score", 2),
    Column("precision", "precision", 3),
    Column("recall", "recall", 3),
)
"""Scores beside the distances that are computed from the outputs of an extractor."""
CLASSIFIER_COLUMN = Column("classifier", "accuracy of the classifier", 3)
MODEL_COLUMNS = (
    Column("class_accuracy", "class accuracy", 3),
    Column("bits_per_dim", "bits/dim, K = 1", 3),
    Column("bits_per_dim_k_sample", "bits/dim, K > 1", 3),
    Column("nfe", "NFE", 0),
)


def columns_of(every: Sequence[Record]) -> list[Column]:
    """Columns of a table of these scores: of evaluate.features, of further extractors, and of the model."""
    own = (*DISTANCE_COLUMNS, CLASSIFIER_COLUMN, *FEATURE_COLUMNS)
    names = dict.fromkeys(name for scores in every for name in further_scores(scores))
    further = [replace(column, extractor=name) for name in names for column in own]
    return [*own, *further, *MODEL_COLUMNS]
