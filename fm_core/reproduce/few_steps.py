"""The comparison at few evaluations of one experiment: its solvers, and the students of its model."""

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fm_core.config import FewStepsSection, NfeCurveSection, RunConfig, StudentSection, parse_config
from fm_core.errors import DetachedError, LeaseLostError, StopRequested, UserError
from fm_core.evaluation.nfe_curve import check_curve, solver_settings
from fm_core.models.build import build_method
from fm_core.reproduce.experiments import Experiment
from fm_core.reproduce.students import (
    bind_to_teacher,
    check_student,
    pairs_config,
    student_config,
    student_curve,
)
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress
from fm_core.run.stage_functions import StageFunctions
from fm_core.storage.atomic_files import read_json, write_text

Record = dict[str, Any]
Result = TypeVar("Result")


def few_step_scores(
    experiment: Experiment,
    settings: FewStepsSection,
    scores: Mapping[str, Any],
    observe: Observer,
    stages: StageFunctions,
) -> Record:
    """Scores of the experiment's own model and of its students, for results.json; empty if not requested.

    `points` are the records of `curve_record` for every solver; `exact` those of its samples, from their
    `scores`; `students` the points of every student by its name; `failed` the errors of what failed, by run.
    Finished stages are only verified. Raises StopRequested, DetachedError and LeaseLostError.
    """
    name, config = experiment.section.name, experiment.config
    if name not in settings.experiments:
        return {}
    students = settings.students if name == settings.teacher else ()
    work = _Work(config, observe, 1 + len(students))
    curve = _curve_config(config, solver_curve(config, settings))
    points = work.attempt(config.run.name, "solvers", lambda show: _points(curve, show, stages))
    taught = dict[str, Record]()
    for student in students:

        def teach(show: Observer, student: StudentSection = student) -> Record:
            return _student_scores(config, student, settings, scores, show, stages)

        run, title = f"{config.run.name}-{student.name}", student.title or student.name
        if record := work.attempt(run, title, teach):
            taught[student.name] = record
    return {
        "points": points or [],
        "exact": {
            "solver": scores["nfe"].get("solver", config.sample.solver),
            "nfe": scores["nfe"]["mean"],
            "frechet_distance": scores["frechet_distance"]["value"],
            "frechet_distance_stderr": scores["frechet_distance"]["stderr"],
            **_optional(scores, "kernel_distance", "kernel_distance"),
            **_optional(scores, "recognized", "recognised"),
        },
        "students": taught,
        "failed": work.failed,
    }


def solver_curve(config: RunConfig, settings: FewStepsSection) -> NfeCurveSection:
    """The section evaluate.nfe_curve of the solvers that are compared."""
    return NfeCurveSection(
        images=config.sample.images,
        solvers=settings.solvers,
        nfe=settings.nfe,
        tolerances=(),
        exact_nfe=settings.exact_nfe,
    )


def check_few_steps(experiment: Experiment, settings: FewStepsSection) -> None:
    """Check the solvers and students of an experiment before it is trained. Raises UserError."""
    name, config = experiment.section.name, experiment.config
    if name not in settings.experiments:
        return
    curve = solver_curve(config, settings)
    method = build_method(config.method)
    try:
        check_curve(curve, method.objective, config.method.coupling, config.sample.guidance)
    except UserError as error:
        text = str(error).removeprefix("evaluate.nfe_curve.").removeprefix("solvers: ")
        raise UserError(f"reproduce.few_steps.solvers, for {name}: {text}") from None
    if not solver_settings(curve):
        raise UserError(
            f"reproduce.few_steps.solvers: none of {', '.join(settings.solvers) or 'an empty list'} takes a "
            f"step in {max(settings.nfe)} evaluations; add euler"
        )
    for student in settings.students if name == settings.teacher else ():
        check_student(config, student, settings)


class _Work:
    """Parts of an experiment's comparison at few evaluations: one part's failure leaves the others."""

    def __init__(self, config: RunConfig, observe: Observer, parts: int) -> None:
        self._config, self._observe, self._parts = config, observe, parts
        self._finished = 0
        self.failed = dict[str, str]()

    def attempt(self, run: str, title: str, work: Callable[[Observer], Result]) -> Result | None:
        """The result of `work`, which gets an observer; None if it failed, with its error in `failed`."""
        finished = self._finished

        def show(progress: Progress) -> None:
            done = int(100 * (finished + progress.fraction))
            message = f"{title}: {progress.stage} {progress.message}".rstrip()
            self._observe(Progress("few evaluations", done, 100 * self._parts, "parts", message))

        self._finished += 1
        try:
            return work(show)
        except (DetachedError, LeaseLostError, StopRequested):
            raise
        except Exception as error:
            self.failed[run] = f"{type(error).__name__}: {error}".splitlines()[0]
            write_text(RunDirectory(self._config).log("reproduce", run), traceback.format_exc())
            return None


def _student_scores(
    teacher: RunConfig,
    student: StudentSection,
    settings: FewStepsSection,
    scores: Mapping[str, Any],
    observe: Observer,
    stages: StageFunctions,
) -> Record:
    """Sample the pairs of a student if it needs any, train it and score it, or verify all of that."""
    bind_to_teacher(student_config(teacher, student), student, scores["protocol"]["weights_sha256"])
    pairs = None
    if student.pairs:
        pairs = stages.sample(pairs_config(teacher, student), _third(0, observe)).paths["samples"]
    config = student_config(teacher, student, pairs)
    trained = stages.train(config, _third(1, observe))
    points = _points(_curve_config(config, student_curve(config, settings)), _third(2, observe), stages)
    return {
        "title": student.title or student.name,
        "run": config.run.name,
        "steps": int(trained.counts["steps"]),
        "points": [{name: point[name] for name in point if not name.startswith("error")} for point in points],
    }


def _third(number: int, observe: Observer) -> Observer:
    """An observer that reports the progress of one of three stages as a third of all."""

    def show(progress: Progress) -> None:
        done = int(100 * (number + progress.fraction))
        observe(Progress(progress.stage, done, 300, "parts", progress.message))

    return show


def _curve_config(config: RunConfig, curve: NfeCurveSection) -> RunConfig:
    """The configuration that scores a run at few evaluations: the curve, and a distance of its samples."""
    tree = config.model_dump(mode="json")
    metrics = ("frechet_distance", "kernel_distance")
    tree["evaluate"] |= {
        "metrics": [metric for metric in metrics if metric in config.evaluate.metrics],
        "nfe_curve": curve.model_dump(mode="json"),
        "extractors": [],
    }
    tree["evaluate"]["likelihood"]["images"] = 0
    return parse_config(tree, where=f"{config.run.name} at few evaluations")


def _points(config: RunConfig, observe: Observer, stages: StageFunctions) -> list[Record]:
    scores = read_json(Path(stages.evaluate(config, observe).paths["scores"])) or {}
    return scores["nfe_curve"]["points"]


def _optional(scores: Mapping[str, Any], name: str, key: str) -> Record:
    return {name: scores[key]["value"]} if key in scores else {}
