"""Students of a comparison: models for few evaluations, trained from the models of one of its experiments."""

from typing import Any

from fm_core.config import FewStepsSection, NfeCurveSection, RunConfig, StudentSection, parse_config
from fm_core.errors import UserError
from fm_core.evaluation.nfe_curve import check_curve
from fm_core.method.registry import objective_named, path_named
from fm_core.method.solver import EVALUATIONS_PER_STEP, FLOW_MAP
from fm_core.models.build import build_method
from fm_core.run.directory import RunDirectory
from fm_core.storage.atomic_files import read_json, write_json

PAIRS_SOLVER, PAIRS_STEPS = "midpoint", 20
"""Solver of the samples that a student of pairs is trained on; 40 evaluations."""
SEED_OF_PAIRS = 1_000_003
"""Added to the seed of the teacher's samples, on whose noise the student is scored."""
TEACHER_FILE = "teacher.json"
_SAMPLING_KEYS = {"images", "batch", "seed", "classes", "class_mode", "precision", "compile", "cuda_graphs"}
_TEACHER_KEYS = {*_SAMPLING_KEYS, "weights", "step", "guidance", "guidance_interval", "guide", "trust_code"}


def student_config(teacher: RunConfig, student: StudentSection, pairs: str | None = None) -> RunConfig:
    """The configuration of a student's run.

    A student is sampled with two evaluations and without guidance, which its pairs contain.

    Args:
        teacher: the configuration of the teacher's run.
        student: the student.
        pairs: the sample set of a student of pairs; by default the folder that will hold it.

    Raises:
        UserError: a setting is invalid.
    """
    where = f"reproduce.few_steps.students.{student.name}"
    method = teacher.method.model_dump(mode="json")
    if student.objective:
        method |= {"objective": student.objective, "objective_options": student.objective_options}
    if student.pairs:
        method["coupling"] = "reflow"
    tree = teacher.model_dump(mode="json")
    batch = teacher.train.global_batch
    tree["run"]["name"] = f"{teacher.run.name}-{student.name}"
    tree["method"] = method
    tree["train"] |= {
        "init_from": str(RunDirectory(teacher).path),
        "init_source": None,
        "init_attention_order": "legacy",
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
    solver = FLOW_MAP if student.objective else "euler"
    tree["sample"] = _sampling(teacher, _SAMPLING_KEYS) | {"solver": solver, "steps": 2, "trajectories": 0}
    tree["evaluate"]["samples"] = "sampler"  # two evaluations each: not worth a sample set
    if student.pairs:
        tree["data"]["pairs"]["samples"] = pairs or _pairs_folder(teacher, student)
        tree["data"]["horizontal_flip"] = False  # a flipped sample is not the end of its noise's trajectory
    return parse_config(tree, where=where)


def pairs_config(teacher: RunConfig, student: StudentSection) -> RunConfig:
    """The teacher's configuration for the samples that a student of pairs is trained on, with its guidance.

    Raises:
        UserError: a setting is invalid.
    """
    tree = teacher.model_dump(mode="json")
    tree["sample"] = _sampling(teacher, _TEACHER_KEYS) | {
        "root": _pairs_folder(teacher, student),
        "images": student.pairs,
        "store": "float32",
        "seed": (teacher.sample.seed + SEED_OF_PAIRS) % 2**31,
        "solver": PAIRS_SOLVER,
        "steps": PAIRS_STEPS,
        "trajectories": 0,
    }
    return parse_config(tree, where=f"reproduce.few_steps.students.{student.name}.pairs")


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


def check_student(teacher: RunConfig, student: StudentSection, settings: FewStepsSection) -> None:
    """Check a student before its teacher is trained.

    Raises:
        UserError: the objective is unknown, is not one of flow maps or does not fit the path or the teacher,
            or there are too few pairs; one line that names the student.
    """
    where = f"reproduce.few_steps.students.{student.name}"
    try:
        path = path_named(teacher.method.path, teacher.method.path_options)
        taught = objective_named(teacher.method.objective, path, teacher.method.objective_options)
        if student.objective:
            objective = objective_named(student.objective, path, student.objective_options)
            if not objective.two_times:
                raise UserError(
                    f"objective {student.objective} is not one of flow maps; set meanflow or split-meanflow, "
                    "or pairs without an objective"
                )
            if not taught.predicts_velocity:
                raise UserError(
                    f"a flow map starts from a network that predicts the velocity, and the teacher is of "
                    f"{teacher.method.objective}; name one of flow-matching"
                )
        config = student_config(teacher, student)
        method = build_method(config.method)
        check_curve(student_curve(config, settings), method.objective, config.method.coupling)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if student.pairs and student.pairs < 2 * teacher.train.global_batch:
        raise UserError(
            f"{where}: {student.pairs} pairs are fewer than two batches of {teacher.train.global_batch} "
            "(a tenth of them is held out); set more"
        )


def bind_to_teacher(config: RunConfig, student: StudentSection, weights_sha256: str) -> None:
    """Record what the run of a student is made from, or check that it is the same as before.

    Args:
        config: the configuration of the student's run.
        student: the student.
        weights_sha256: hash of the teacher's weights.

    Raises:
        UserError: the run was made with other settings or from other weights.
    """
    directory = RunDirectory(config).path
    asked: dict[str, Any] = {
        "weights_sha256": weights_sha256,
        "student": student.model_dump(mode="json", exclude={"title"}),
    }
    made = read_json(directory / TEACHER_FILE)
    if made is None:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / TEACHER_FILE, asked)
        return
    changed = [key for key, value in asked["student"].items() if made["student"].get(key) != value]
    if made["weights_sha256"] != weights_sha256:
        changed.append("the weights of its teacher")
    if changed:
        raise UserError(
            f"{directory} was made with other settings ({', '.join(changed)}); give "
            f"reproduce.few_steps.students.{student.name} another name, or remove that directory"
        )


def _sampling(teacher: RunConfig, keys: set[str]) -> dict[str, Any]:
    """Keys of the teacher's sample section; the others, such as its solver's, get their defaults."""
    return teacher.sample.model_dump(mode="json", include=keys)


def _pairs_folder(teacher: RunConfig, student: StudentSection) -> str:
    return str(RunDirectory(teacher).path.with_name(f"{teacher.run.name}-{student.name}") / "pairs")
