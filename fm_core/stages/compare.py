"""Scores of several runs in one table."""

from collections.abc import Sequence
from pathlib import Path

from fm_core.errors import UserError
from fm_core.report.score_table import Comparison, Entry, compared
from fm_core.storage.atomic_files import read_json


def compare(runs: Sequence[str]) -> Comparison:
    """One row for each run directory (its newest scores) or file of scores.

    Where their protocols differ, the comparison says in what. Raises UserError for a run without scores, and
    for class-conditional runs whose classes are in different orders.
    """
    entries = [_entry(Path(run)) for run in runs]
    _check_label_orders(entries)
    return compared(entries)


def _check_label_orders(entries: Sequence[Entry]) -> None:
    orders: dict[str, str] = {}
    for entry in entries:
        # Scores that do not tell are older than this rule, or not of a model.
        if entry.protocol.get("class_conditional") and "label_order" in entry.protocol:
            orders.setdefault(entry.protocol["label_order"], entry.name)
    if len(orders) > 1:
        told = ", ".join(f"{order} ({name})" for order, name in orders.items())
        raise UserError(
            f"class-conditional runs do not compare across orders of the classes: {told}; data.label_map "
            "makes a data set in another order"
        )


def _entry(run: Path) -> Entry:
    if run.is_file():
        file, name = run, f"{run.parent.parent.parent.name} {run.parent.name}"
    else:
        found = sorted(run.glob("evaluation/*/*.json"), key=lambda path: path.stat().st_mtime_ns)
        if not found:
            raise UserError(f"{run} holds no scores (evaluation/*/*.json); run fm evaluate on it first")
        file, name = found[-1], f"{run.name} {found[-1].parent.name}"
    scores = read_json(file)
    if scores is None or "protocol" not in scores:
        raise UserError(f"{file} holds no scores; name a run directory or a file of its evaluation")
    return Entry(name, scores)
