"""The compare command: scores of several runs in one table."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fm_core.errors import UserError
from fm_core.report.paired_bits import difference_lines, read_bits
from fm_core.report.score_table import Comparison, ScoreEntry, compare_scores
from fm_core.storage.atomic_files import read_json


def compare(runs: Sequence[str]) -> Comparison:
    """Table with a row per run directory (its newest scores) or scores file, and their protocol differences.

    Raises:
        UserError: a run has no scores, or class-conditional runs use different class orders.
    """
    scored = [_entry(Path(run)) for run in runs]
    entries = [entry for entry, _ in scored]
    _check_label_orders(entries)
    comparison = compare_scores(entries)
    bits = [read_bits(file) for _, file in scored]
    paired = difference_lines([e.name for e in entries], [e.scores["protocol"] for e in entries], bits)
    return replace(comparison, notes=[*comparison.notes, *paired])


def _check_label_orders(entries: Sequence[ScoreEntry]) -> None:
    orders: dict[str, str] = {}
    for entry in entries:
        # Scores without these keys are from earlier versions, or not of a model.
        if entry.protocol.get("class_conditional") and "label_order" in entry.protocol:
            orders.setdefault(entry.protocol["label_order"], entry.name)
    if len(orders) > 1:
        by_run = ", ".join(f"{order} ({name})" for order, name in orders.items())
        raise UserError(
            f"class-conditional runs with different class orders are not comparable: {by_run}; "
            "data.label_map writes a data set in another order"
        )


def _entry(run: Path) -> tuple[ScoreEntry, Path]:
    """The scores of a run or of a file, and the file."""
    if run.is_file():
        of_a_run = run.parent.parent.name == "evaluation"
        file, name = run, f"{run.parent.parent.parent.name} {run.parent.name}" if of_a_run else run.stem
    else:
        files = sorted(run.glob("evaluation/*/*.json"), key=lambda path: path.stat().st_mtime_ns)
        if not files:
            raise UserError(f"{run} has no scores (evaluation/*/*.json); run fm evaluate on it first")
        file, name = files[-1], f"{run.name} {files[-1].parent.name}"
    scores = read_json(file)
    if scores is None or "protocol" not in scores:
        raise UserError(f"{file} has no scores; name a run directory or a file of its evaluation")
    return ScoreEntry(name, scores), file
