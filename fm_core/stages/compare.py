"""Scores of several runs in one table."""

from collections.abc import Sequence
from pathlib import Path

from fm_core.errors import UserError
from fm_core.report.scores import Comparison, Entry, compared
from fm_core.run.files import read_json


def compare(runs: Sequence[str]) -> Comparison:
    """One row for each run directory (its newest scores) or file of scores.

    Where their protocols differ, the comparison says in what. Raises UserError for a run without scores.
    """
    return compared([_entry(Path(run)) for run in runs])


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
