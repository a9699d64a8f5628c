"""The sweep stage: every point is sampled and scored, or trained first, and the best one scored again.

Each point is a normal run, sample set and scores file that every other command works on. The samples of all
points start from the same noise, so that their differences are paired.
"""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import DetachedError, JobFailedError, LeaseLostError, StopRequested, UserError
from fm_core.run.artifact_cache import exclusive_lock
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_functions import StageFunctions
from fm_core.run.stage_runner import run_stage_function
from fm_core.storage.atomic_files import read_json, write_bytes, write_json, write_text
from fm_core.storage.hashing import fingerprint
from fm_core.sweep.point_ranking import ScoredPoint
from fm_core.sweep.sweep_checks import check_point, checked_points
from fm_core.sweep.sweep_page import sweep_figure, sweep_page
from fm_core.sweep.sweep_points import SweepPoint
from fm_core.sweep.sweep_results import results_of, with_check

PARTS = {"train": 600, "sample": 300, "evaluate": 100}
"""Parts of a point's work, for the progress bar."""
POINT_PARTS = sum(PARTS.values())
FILES = {"report": "sweep.html", "results": "results.json", "figure": "sweep.png"}
OnParts = Callable[[int, str], None]
"""Called with the amount of finished work and a message. Raises StopRequested."""


class RunElsewhere(Protocol):
    """Runs the stages of points outside of this process, several at a time."""

    def __call__(self, points: Sequence[SweepPoint], report: OnParts, /) -> Mapping[str, str]:
        """Run them until all have ended; return the messages of those that failed, by title.

        `report` takes the number of points that have ended.
        """
        ...


def sweep(
    config: RunConfig,
    observe: Observer = no_progress,
    *,
    stages: StageFunctions,
    elsewhere: RunElsewhere | None = None,
) -> StageResult:
    """Make the points of the sweep that are missing, verify the others, and write the table and the page.

    Args:
        config: the configuration of the sweep, without absent keys.
        observe: receives the progress.
        stages: the stages of a point.
        elsewhere: runs the points; by default they run one after another in this process.

    Raises:
        UserError: a point is invalid, and nothing was started; or points failed for reasons to be fixed.
        StopRequested: the stage was asked to stop.
        JobFailedError: at the end, if points failed; the others are kept, and the next call retries these.
    """

    def work(run: RunDirectory, show: Observer) -> StageResult:
        points = checked_points(config, stages)
        directory = run.path / "sweep" / sweep_key(config, points)
        run.begin()
        with exclusive_lock(directory, run=run.path) as check_stop:
            write_text(run.path / "logs" / "sweep.yaml", dump_yaml(config))
            progress = _SweepProgress(len(points) + 1, show, check_stop)
            return _Sweep(config, run, directory, stages, elsewhere, progress).result(points)

    return run_stage_function("sweep", config, observe, work)


def sweep_key(config: RunConfig, points: Sequence[SweepPoint]) -> str:
    """Directory name of a sweep: the names of its axes, and a hash of everything that its points fix."""
    names = "-".join(key.rpartition(".")[2] for key in config.sweep.axes)[:60]
    settings = config.sweep.model_dump(mode="json")
    place = {"root", "name"}
    trees = [point.config.model_dump(mode="json", exclude={"launch": True, "run": place}) for point in points]
    return f"{names}-{fingerprint([settings, trees])[:6]}"


def _write_plan(directory: Path, points: Sequence[SweepPoint]) -> None:
    """Write points.json, which also names the runs, so that a cancellation finds their jobs."""
    listed = [
        {"point": point.title, "values": dict(point.values), "run": point.config.run.name} for point in points
    ]
    plan = {"points": listed, "runs": sorted({p.config.run.name for p in points if p.trained})}
    before = read_json(directory / "points.json") or {}
    if {**before, "schema": 0} != {**plan, "schema": 0}:
        write_json(directory / "points.json", plan)


class _SweepProgress:
    """Progress over all points and the check, each of which has POINT_PARTS parts."""

    def __init__(self, points: int, observe: Observer, check_stop: Callable[[], None]) -> None:
        self._observe, self.check_stop = observe, check_stop
        self._done, self._total = 0, points * POINT_PARTS

    def report(self, done: int, message: str) -> None:
        """Report finished parts; they never decrease. Raises StopRequested."""
        self.check_stop()
        self._done = max(self._done, min(done, self._total - 1))
        self._observe(Progress("sweep", self._done, self._total, "parts", message))

    def finish(self, message: str) -> None:
        """Report that everything is done."""
        self._observe(Progress("sweep", self._total, self._total, "parts", message))


@dataclass
class _Sweep:
    """A sweep that holds the lock of its directory."""

    config: RunConfig
    run: RunDirectory
    directory: Path
    stages: StageFunctions
    elsewhere: RunElsewhere | None
    progress: _SweepProgress
    failed: dict[str, Exception] = field(default_factory=dict[str, Exception])
    """Errors of points by their titles."""

    def result(self, points: Sequence[SweepPoint]) -> StageResult:
        """Make or verify all points, score the best one again, and write the results."""
        _write_plan(self.directory, points)
        if any(point.trained for point in points):
            self.stages.shard(self.config)
        scored = self._scored(points, 0)
        results = results_of(self.config, points, scored)
        best: int | None = results.get("best", {}).get("number")
        if best is not None and self.config.sweep.check_images != 0:
            chosen = next(each for each in scored if each.point is points[best])
            model = self.stages.check_samples(chosen.point.config)
            fresh = self._scored([check_point(self.config, chosen.point, points, model)], len(points))
            results = with_check(results, chosen, fresh[0]) if fresh else results
        results["failed"] = {title: _line(error) for title, error in self.failed.items()}
        self.progress.check_stop()
        changed = _write(self.directory, results)
        paths = {name: str(self.directory / file) for name, file in FILES.items()}
        self._raise_failures(len(points), paths["report"])
        self.progress.finish(paths["report"])
        return StageResult(
            stage="sweep",
            state="done" if changed else "verified",
            seconds=0.0,
            summary=results["summary"],
            paths=paths,
            counts={"points": len(points)},
            notes=results["notes"],
        )

    def _scored(self, points: Sequence[SweepPoint], before: int) -> list[ScoredPoint]:
        """The points that could be scored; the errors of the others are recorded.

        `before` is the number of points that have been scored before these.
        """
        first, refused = before * POINT_PARTS, dict[str, str]()
        if self.elsewhere:
            refused |= self.elsewhere(
                points, lambda done, message: self.progress.report(first + done * POINT_PARTS, message)
            )
        self.failed |= {title: JobFailedError(message) for title, message in refused.items()}
        scored: list[ScoredPoint] = []
        for number, point in enumerate(points, start=before):
            if point.title in refused:
                continue
            try:
                scored.append(self._score(point, number * POINT_PARTS))
            except (DetachedError, LeaseLostError, StopRequested):
                raise
            except Exception as error:
                self.failed[point.title] = error
                write_text(self.run.log("sweep", f"{number}"), traceback.format_exc())
            self.progress.report((number + 1) * POINT_PARTS, point.title)
        return scored

    def _score(self, point: SweepPoint, before: int) -> ScoredPoint:
        """Run the stages of a point, or verify it; `before` parts of the sweep's work are finished."""
        stages, report = self.stages, self.progress.report
        functions = {"train": stages.train, "sample": stages.sample, "evaluate": stages.evaluate}
        paths, config = dict[str, str](), point.config
        for stage in point.stages:

            def show(progress: Progress, stage: str = stage, before: int = before) -> None:
                message = f"{point.title}: {stage} {progress.message}".rstrip()
                report(before + int(PARTS[stage] * progress.fraction), message)

            report(before, f"{point.title}: {stage}")  # a request to stop ends the sweep here
            paths = functions[stage](config, show).paths
            before += PARTS[stage]
            if stage == "train":
                config = stages.with_checkpoints(config)
        file, metric = Path(paths["scores"]), self.config.sweep.metric
        scores = read_json(file) or {}
        if metric not in scores:
            raise UserError(f"sweep.metric {metric}: {file} has none; name another metric or other features")
        return ScoredPoint(point, scores, file)

    def _raise_failures(self, points: int, report: str) -> None:
        """Raise UserError or JobFailedError if a point failed."""
        if not self.failed:
            return
        errors = "; ".join(f"{title}: {_line(error)}" for title, error in self.failed.items())
        message = (
            f"{len(self.failed)} of {points} points failed ({errors}); the others are in {report}; "
            "run it again to try these again"
        )
        refused = all(isinstance(error, UserError) for error in self.failed.values())
        raise UserError(message) if refused else JobFailedError(message)


def _line(error: Exception) -> str:
    own = isinstance(error, UserError | JobFailedError)
    return (str(error) if own else f"{type(error).__name__}: {error}").partition("\n")[0]


def _write(directory: Path, results: Mapping[str, Any]) -> bool:
    """Write the results, the figure and the page unless they are up to date; whether they were written."""
    place = {name: directory / file for name, file in FILES.items()}
    before = read_json(place["results"])
    complete = all(file.exists() for file in place.values())
    if before and complete and {**before, "schema": 0} == {**json.loads(json.dumps(results)), "schema": 0}:
        return False
    write_bytes(place["figure"], sweep_figure(results).png())
    write_text(place["report"], sweep_page(results))
    write_json(place["results"], results)
    return True
