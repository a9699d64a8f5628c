"""The comparison at few evaluations of one experiment: its solvers, and the students of its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fm_core.config import FewStepsSection, NfeCurveSection, RunConfig, StudentSection, parse_config
from fm_core.method.flow_map import FlowMap
from fm_core.method.objectives import Objective
from fm_core.method.registry import built_in
from fm_core.method.solver import EVALUATIONS_PER_STEP, FLOW_MAP
from fm_core.reproduce.experiments import Experiment
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress
from fm_core.run.stage_functions import StageFunctions
from fm_core.storage.atomic_files import read_json

PAIRS_SOLVER, PAIRS_STEPS = "midpoint", 20
"""Solver of the samples that a student of pairs is trained on; 40 evaluations."""
Record = dict[str, Any]


def few_step_scores(
    experiment: Experiment,
    settings: FewStepsSection,
    scores: Mapping[str, Any],
    observe: Observer,
    stages: StageFunctions,
) -> Record:
    """Scores of the experiment's own model and of its students, for results.json; empty if not requested.

    `points` are the records of `curve_record` for every solver; `exact` those of its samples, from their
    `scores`; `students` the points of every student by its name. Finished stages are only verified.

    Raises UserError, StopRequested and RuntimeError like the stages.
    """
    name = experiment.section.name
    if name not in settings.cells:
        return {}
    config = experiment.config
    own = _points(_curve_config(config, solver_curve(config, settings)), stages)
    taught = settings.students if name == settings.teacher else ()
    students = dict[str, Record]()
    for number, student in enumerate(taught, start=1):
        observe(Progress("reproduce", number, len(taught) + 1, "models", student.title or student.name))
        students[student.name] = _student_scores(config, student, settings, stages)
    return {
        "points": own,
        "exact": {
            "nfe": scores["nfe"]["mean"],
            "frechet_distance": scores["frechet_distance"]["value"],
            "frechet_distance_stderr": scores["frechet_distance"]["stderr"],
            **_optional(scores, "kernel_distance", "kernel_distance"),
            **_optional(scores, "recognized", "recognised"),
        },
        "students": students,
    }


def student_config(teacher: RunConfig, student: StudentSection, pairs: str | None = None) -> RunConfig:
    """The configuration of a student's run.

    Args:
        teacher: the configuration of the teacher's run.
        student: the student.
        pairs: the sample set of a student of pairs; by default the folder that will hold it.

    Raises:
        UserError: a setting is invalid.
    """
    tree = teacher.model_dump(mode="json")
    batch = teacher.train.global_batch
    tree["run"]["name"] = f"{teacher.run.name}-{student.name}"
    tree["method"] |= {
        "objective": student.objective,
        "objective_options": student.objective_options,
        "coupling": "reflow" if student.pairs else teacher.method.coupling,
    }
    tree["train"] |= {
        "init_from": str(RunDirectory(teacher).path),
        "images": student.steps * batch,
        "learning_rate": student.learning_rate,
        "warmup_images": max(1, student.steps // 10) * batch,
        "ema_decays": [student.ema_decay],
        "checkpoint_images": student.steps * batch,
        "keep_every_images": None,
    }
    for key in ("checkpoint_root", "checkpoint_staging"):
        if url := tree["train"][key]:
            tree["train"][key] = f"{url.rstrip('/')}-{student.name}"
    solver = FLOW_MAP if two_times(student) else "euler"
    tree["sample"] |= {"solver": solver, "steps": 2, "rtol": None, "atol": None, "trajectories": 0}
    tree["evaluate"]["samples"] = "sampler"  # two evaluations each: not worth a sample set
    if student.pairs:
        tree["data"]["pairs"]["samples"] = pairs or _pairs_folder(teacher, student)
        tree["data"]["horizontal_flip"] = False  # a flipped sample is not the end of its noise's trajectory
    return parse_config(tree, where=f"reproduce.few_steps.students.{student.name}")


def two_times(student: StudentSection) -> bool:
    """Whether the student is a flow map."""
    objective = built_in(Objective).get(student.objective)
    return objective is not None and issubclass(objective, FlowMap)


def solver_curve(config: RunConfig, settings: FewStepsSection) -> NfeCurveSection:
    """The section evaluate.nfe_curve of the solvers that are compared."""
    return NfeCurveSection(
        images=config.sample.images,
        solvers=settings.solvers,
        nfe=settings.nfe,
        tolerances=(),
        exact_nfe=settings.exact_nfe,
    )


def student_curve(config: RunConfig, settings: FewStepsSection) -> NfeCurveSection:
    """The section evaluate.nfe_curve of a student, whose configuration is `config`.

    Its error against an ODE solution has no use, so that the reference is a single step.
    """
    return NfeCurveSection(
        images=config.sample.images,
        solvers=(config.sample.solver,),
        nfe=settings.student_nfe,
        tolerances=(),
        exact_nfe=EVALUATIONS_PER_STEP["rk4"],
    )


def pairs_config(teacher: RunConfig, student: StudentSection) -> RunConfig:
    """The teacher's configuration for the samples that a student of pairs is trained on."""
    tree = teacher.model_dump(mode="json")
    # The student is scored on the noise of the teacher's seed.
    tree["sample"] |= {
        "root": _pairs_folder(teacher, student),
        "images": student.pairs,
        "store": "float32",
        "seed": (teacher.sample.seed + 1_000_003) % 2**31,
        "solver": PAIRS_SOLVER,
        "steps": PAIRS_STEPS,
        "rtol": None,
        "atol": None,
        "trajectories": 0,
    }
    return parse_config(tree, where=f"reproduce.few_steps.students.{student.name}.pairs")


def _student_scores(
    teacher: RunConfig, student: StudentSection, settings: FewStepsSection, stages: StageFunctions
) -> Record:
    """Sample the pairs of a student if it needs any, train it and score it, or verify all of that."""
    pairs = None
    if student.pairs:
        pairs = stages.sample(pairs_config(teacher, student)).paths["samples"]
    config = student_config(teacher, student, pairs)
    trained = stages.train(config)
    points = _points(_curve_config(config, student_curve(config, settings)), stages)
    return {
        "title": student.title or student.name,
        "run": config.run.name,
        "steps": int(trained.counts["steps"]),
        "points": [{name: point[name] for name in point if not name.startswith("error")} for point in points],
    }


def _curve_config(config: RunConfig, curve: NfeCurveSection) -> RunConfig:
    """The configuration that scores a run at few evaluations: the curve, and a distance of its samples."""
    tree = config.model_dump(mode="json")
    tree["evaluate"] |= {
        "metrics": ["frechet_distance", "kernel_distance"],
        "nfe_curve": curve.model_dump(mode="json"),
        "extractors": [],
    }
    tree["evaluate"]["likelihood"]["images"] = 0
    return parse_config(tree, where=f"{config.run.name} at few evaluations")


def _points(config: RunConfig, stages: StageFunctions) -> list[Record]:
    scores = read_json(Path(stages.evaluate(config).paths["scores"])) or {}
    return scores["nfe_curve"]["points"]


def _pairs_folder(teacher: RunConfig, student: StudentSection) -> str:
    return str(RunDirectory(teacher).path.with_name(f"{teacher.run.name}-{student.name}") / "pairs")


def _optional(scores: Mapping[str, Any], name: str, key: str) -> Record:
    return {name: scores[key]["value"]} if key in scores else {}
