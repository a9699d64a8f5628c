"""The paper's comparison on images. Each experiment is a normal run that all other commands can use."""

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fm_core.config import RunConfig
from fm_core.errors import LeaseLostError, StopRequested
from fm_core.report.file_links import file_links
from fm_core.report.html import FINGERPRINT_MARK, PAGE_VERSION, PageSection
from fm_core.reproduce.aggregate import by_objective, claims, curves, summary
from fm_core.reproduce.comparison_checks import check_comparison
from fm_core.reproduce.comparison_page import comparison_page, comparison_sections
from fm_core.reproduce.experiments import Experiment, experiments_of, flow_matching_ot
from fm_core.reproduce.few_step_results import few_step_results
from fm_core.reproduce.image_experiment import (
    PROGRESS_PARTS,
    OnProgress,
    run_experiment,
    sample_images_of,
)
from fm_core.reproduce.parallel import ExperimentOutcome, device_shares, run_in_parallel
from fm_core.reproduce.seed_differences import paired_bits
from fm_core.run.artifact_cache import exclusive_lock
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress, byte_size
from fm_core.run.results import StageResult
from fm_core.run.stage_functions import StageFunctions
from fm_core.storage.atomic_files import read_json, write_json, write_text
from fm_core.storage.hashing import fingerprint


def reproduce_images(
    config: RunConfig, run: RunDirectory, observe: Observer, stages: StageFunctions
) -> StageResult:
    """Train, sample and score every experiment with every seed; existing results are verified and kept.

    Raises UserError, StopRequested and RuntimeError like `reproduce`.
    """
    experiments = experiments_of(config)
    check_comparison(config, stages.rules)
    directory = run.path / "reproduce"
    device_shares(config)
    run.begin()
    with exclusive_lock(directory) as check_stop:
        progress = _ComparisonProgress(len(experiments), observe, check_stop)
        stages.shard(config)
        if config.reproduce.parallel == 1:
            outcomes = _run_sequentially(config, experiments, progress.of_experiment, stages)
        else:
            logs = run.path / "logs" / "cells"
            outcomes = run_in_parallel(config, experiments, logs, progress.of_experiment, stages)
        for experiment, outcome in zip(experiments, outcomes, strict=True):
            if outcome.traceback:
                write_text(run.log("reproduce", experiment.name), outcome.traceback)
        results = _results(config, experiments, outcomes)
        check_stop()
        changed = _write(directory, results, experiments)
    paths = {"report": str(directory / "report.html"), "results": str(directory / "results.json")}
    if failed := results["failed"]:
        errors = "; ".join(f"{name}: {error}" for name, error in failed.items())
        students = sum(len(record.get("few_steps", {}).get("students", {})) for record in results["cells"])
        runs = max(len(experiments) + students, len(failed))
        raise RuntimeError(
            f"{len(failed)} of {runs} runs failed ({errors}); the others are in "
            f"{paths['report']}; run it again to retry the failed ones"
        )
    progress.finish(paths["report"])
    records: list[dict[str, Any]] = results["cells"]
    return StageResult(
        stage="reproduce",
        state="done" if changed else "verified",
        seconds=0.0,
        summary=f"{len(experiments)} runs compared; {paths['report']}",
        paths=paths,
        counts={
            f"frechet_distance_{record['run']}": record["scores"]["frechet_distance"]["value"]
            for record in records
        },
        hashes={record["run"]: record["scores"]["protocol"]["weights_sha256"] for record in records},
    )


def image_page_sections(config: RunConfig, results: Mapping[str, Any]) -> list[PageSection]:
    """The tables and figures of a comparison from results.json. Raises UserError like `experiments_of`."""
    return comparison_sections(results, _images_by_run(results, experiments_of(config)))


def _run_sequentially(
    config: RunConfig,
    experiments: list[Experiment],
    on_progress: Callable[[int], OnProgress],
    stages: StageFunctions,
) -> list[ExperimentOutcome]:
    """Run every experiment in this process."""
    outcomes: list[ExperimentOutcome] = []
    for number, experiment in enumerate(experiments):
        report = on_progress(number)
        try:
            record = run_experiment(experiment, config.reproduce, report, stages)
            outcomes.append(ExperimentOutcome(record))
        except (LeaseLostError, StopRequested):
            raise
        except Exception as error:
            outcomes.append(ExperimentOutcome.of_error(error, traceback.format_exc()))
        report(PROGRESS_PARTS, experiment.title)
    return outcomes


def _results(
    config: RunConfig, experiments: list[Experiment], outcomes: list[ExperimentOutcome]
) -> dict[str, Any]:
    """The content of results.json."""
    records = [outcome.record for outcome in outcomes if outcome.record is not None]
    candidate = flow_matching_ot(experiments)
    tree = config.model_dump(mode="json", exclude={"report": {"pictures"}})
    few_steps = few_step_results(by_objective(records), candidate, tree)
    return {
        "kind": "images",
        "data": config.data.name,
        "summary": {name: summary(seeds) for name, seeds in by_objective(records).items()},
        "claims": claims(records, candidate),
        "paired_bits": paired_bits(by_objective(records), candidate),
        "curves": curves(records),
        **({"few_steps": few_steps} if few_steps else {}),
        "cells": records,
        "failed": {
            experiment.name: outcome.error
            for experiment, outcome in zip(experiments, outcomes, strict=True)
            if outcome.record is None
        }
        | {
            run: error
            for record in records
            for run, error in record.get("few_steps", {}).get("failed", {}).items()
        },
        "config": tree,
    }


def _write(directory: Path, results: Mapping[str, Any], experiments: list[Experiment]) -> bool:
    """Write results.json and the page unless they are up to date; returns whether they were written."""
    file, page = directory / "results.json", directory / "report.html"
    mark = f"{FINGERPRINT_MARK}{fingerprint([PAGE_VERSION, results])} -->\n"
    before = read_json(file)
    same = before and {**before, "schema": 0} == {**json.loads(json.dumps(results)), "schema": 0}
    if same and page.exists() and page.read_text(encoding="utf-8").endswith(mark):
        return False
    write_json(file, results)
    links = PageSection("Files", [file_links(directory, page, byte_size)], folded=True)
    write_text(page, comparison_page(results, _images_by_run(results, experiments), links) + mark)
    return True


def _images_by_run(results: Mapping[str, Any], experiments: list[Experiment]) -> dict[str, dict[str, Tensor]]:
    """Images of the complete experiments, by run."""
    complete = {record["run"] for record in results["cells"]}
    return {
        experiment.name: sample_images_of(experiment)
        for experiment in experiments
        if experiment.name in complete
    }


class _ComparisonProgress:
    """Progress over all experiments, each of which has PROGRESS_PARTS parts."""

    def __init__(self, experiments: int, observe: Observer, check_stop: Callable[[], None]) -> None:
        self._observe, self._check_stop = observe, check_stop
        self._done = [0] * experiments
        self._total = experiments * PROGRESS_PARTS

    def of_experiment(self, number: int) -> OnProgress:
        """Return the callback that reports the progress of one experiment."""

        def report(parts: int, message: str) -> None:
            self._check_stop()
            self._done[number] = max(self._done[number], parts)
            self._report(min(sum(self._done), self._total - 1), message)

        return report

    def finish(self, message: str) -> None:
        """Report that everything is done."""
        self._report(self._total, message)

    def _report(self, done: int, message: str) -> None:
        self._observe(Progress("reproduce", done, self._total, "parts", message))
