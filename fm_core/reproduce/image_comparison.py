"""The paper's comparison on images: each objective is a plain run, and every other command works on it."""

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fm_core.config import RunConfig
from fm_core.errors import StopRequested
from fm_core.report.html import PageSection
from fm_core.reproduce.aggregate import by_objective, claims, curves, summary
from fm_core.reproduce.comparison_page import comparison_page, comparison_sections
from fm_core.reproduce.experiments import Experiment, experiments_of, ours
from fm_core.reproduce.image_experiment import PARTS, run_experiment, sample_images_of
from fm_core.reproduce.parallel import ExperimentOutcome, device_shares, run_in_parallel
from fm_core.run.artifact_cache import exclusive_lock
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress
from fm_core.run.results import StageResult
from fm_core.stages.preflight import rules
from fm_core.stages.shard import shard
from fm_core.storage.atomic_files import read_json, write_json, write_text


def reproduce_images(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    """Train, sample and score every cell with every seed; what is there already is verified and kept."""
    cells = experiments_of(config)
    for _, rule in rules(config, ("reproduce",)):
        rule()
    directory = run.path / "reproduce"
    device_shares(config)
    with exclusive_lock(directory) as beat:
        bar = _Bar(len(cells), observe, beat)
        shard(config)
        make = _one_by_one if config.reproduce.parallel == 1 else _side_by_side
        ended = make(config, cells, run, bar)
        records = [one.record for one in ended if one.record is not None]
        failures = {
            cell.name: one.error for cell, one in zip(cells, ended, strict=True) if one.record is None
        }
        for cell, one in zip(cells, ended, strict=True):
            if one.trace:
                write_text(run.log("reproduce", cell.name), one.trace)
        results = {
            "kind": "images",
            "data": config.data.name,
            "summary": {name: summary(seeds) for name, seeds in by_objective(records).items()},
            "claims": claims(records, ours(cells)),
            "curves": curves(records),
            "cells": records,
            "failed": failures,
            "config": config.model_dump(mode="json"),
        }
        changed = _write(directory, results, cells)
    paths = {"report": str(directory / "report.html"), "results": str(directory / "results.json")}
    if failures:
        listed = "; ".join(f"{name}: {error}" for name, error in failures.items())
        raise RuntimeError(
            f"{len(failures)} of {len(cells)} runs failed ({listed}); the others are in {paths['report']}; "
            "run it again to try the failed ones again"
        )
    bar.finish(paths["report"])
    return StageResult(
        stage="reproduce",
        state="done" if changed else "verified",
        seconds=0.0,
        summary=f"{len(cells)} runs compared; {paths['report']}",
        paths=paths,
        counts={
            f"frechet_distance_{record['run']}": record["scores"]["frechet_distance"]["value"]
            for record in records
        },
        hashes={record["run"]: record["scores"]["protocol"]["weights_sha256"] for record in records},
    )


def _one_by_one(
    config: RunConfig, cells: list[Experiment], run: RunDirectory, bar: "_Bar"
) -> list[ExperimentOutcome]:
    """Make every cell in this process."""
    ended: list[ExperimentOutcome] = []
    for number, cell in enumerate(cells):
        try:
            ended.append(ExperimentOutcome(run_experiment(cell, config.reproduce.images, bar.cell(number))))
        except StopRequested:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            ended.append(ExperimentOutcome(None, said, traceback.format_exc()))
        bar.cell(number)(PARTS, cell.title)
    return ended


def _side_by_side(
    config: RunConfig, cells: list[Experiment], run: RunDirectory, bar: "_Bar"
) -> list[ExperimentOutcome]:
    return run_in_parallel(config, cells, run.path / "logs" / "cells", bar.cell)


def _write(directory: Path, results: Mapping[str, Any], cells: list[Experiment]) -> bool:
    """Write results.json and the page unless they are there already; whether they were written."""
    file, page = directory / "results.json", directory / "report.html"
    before = read_json(file)
    if (
        before
        and page.exists()
        and {**before, "schema": 0} == {**json.loads(json.dumps(results)), "schema": 0}
    ):
        return False
    write_text(page, comparison_page(results, _drawn(results, cells)))
    write_json(file, results)
    return True


def _drawn(results: Mapping[str, Any], cells: list[Experiment]) -> dict[str, dict[str, Tensor]]:
    """What the cells that were made have to show, by run."""
    made = {record["run"] for record in results["cells"]}
    return {cell.name: sample_images_of(cell) for cell in cells if cell.name in made}


def images_shown(config: RunConfig, results: Mapping[str, Any]) -> list[PageSection]:
    """The tables and figures of a comparison in results.json; raises UserError as `experiments_of`."""
    return comparison_sections(results, _drawn(results, experiments_of(config)))


class _Bar:
    """Progress over all cells, each of PARTS parts."""

    def __init__(self, cells: int, observe: Observer, beat: Callable[[], None]) -> None:
        self._observe, self._beat = observe, beat
        self._done = [0] * cells

    def cell(self, number: int) -> Callable[[int, str], None]:
        """What hears how far one cell is."""

        def show(parts: int, message: str) -> None:
            self._beat()
            self._done[number] = max(self._done[number], parts)
            self._say(min(sum(self._done), self._total - 1), message)

        return show

    def finish(self, message: str) -> None:
        """All is done."""
        self._say(self._total, message)

    @property
    def _total(self) -> int:
        return len(self._done) * PARTS

    def _say(self, done: int, message: str) -> None:
        self._observe(Progress("reproduce", done, self._total, "parts", message))
