"""Flow of a distillation: samples of a trained model, and a student that is trained on them."""

from pathlib import Path
from typing import Any

from prefect import Flow, flow
from prefect.client.schemas.objects import FlowRun, State

from flows.cancellation import end_remaining_jobs
from flows.cancellation_watch import CancellationWatch
from flows.parameters import config_of
from flows.pipeline import final_state_of, run_name, run_stages
from flows.stage_tasks import final_flow_state, run_stage
from flows.subflows import Apart, check_slots, run_subflow
from flows.train import possible_stages
from fm_core.commands import preflight, resolve
from fm_core.config import RunConfig, merge
from fm_core.errors import StageEndedError, UserError, outcome_of
from fm_core.run.directory import RunDirectory, load_run_config
from fm_core.run.results import StageResult
from fm_core.storage.store import Store

TEACHER = "teacher"
"""What distinguishes the sampling of the teacher from that of the student."""


def student_of(parameters: dict[str, Any]) -> RunConfig:
    """The student's configuration: of the file and the keys, started from the teacher unless they say else.

    Raises:
        UserError: neither is given, one is invalid, or the teacher is no trained run or the student itself.
    """
    student, teacher = config_of(parameters), _recorded(parameters["teacher"])
    if RunDirectory(student).path.resolve() == RunDirectory(teacher).path.resolve():
        raise UserError(f"run.name {student.run.name}: is the teacher; choose another name for the student")
    if not student.train.given("init_from"):
        train = student.train.model_copy(update={"init_from": parameters["teacher"]})
        student = student.model_copy(update={"train": train})
    if student.run.generator is None and student.data.pairs.samples:
        # The noise of the pairs is the teacher's.
        run = student.run.model_copy(update={"generator": teacher.run.generator})
        student = student.model_copy(update={"run": run})
    return student


def sampling_of(teacher: str, student: RunConfig, pairs: dict[str, Any] | None) -> RunConfig | None:
    """The teacher's configuration for sampling the student's pairs; None for a student without pairs.

    `pairs` are keys of the sample section, in place of the teacher's own.

    Raises:
        UserError: a key is invalid, or the pairs have the seed that the student is sampled with.
    """
    place = student.data.pairs.samples
    if place is None:
        if pairs:
            raise UserError(f"pairs: the student's configuration has no data.pairs.samples; remove {pairs}")
        return None
    if "root" in (pairs or {}):
        raise UserError("pairs: root is data.pairs.samples of the student's configuration; remove it")
    defaults = {"root": place, "store": "float32", "seed": student.sample.seed + 1}
    config = _recorded(teacher, merge(defaults, pairs or {}))
    if config.sample.seed == student.sample.seed:
        raise UserError(
            f"pairs: seed {config.sample.seed} is the student's sample.seed, so it would be scored on the "
            "noise that it is trained on; choose another"
        )
    return config


def _recorded(teacher: str, sample: dict[str, Any] | None = None) -> RunConfig:
    file = Path(teacher).expanduser() / "config.yaml"
    if not file.exists():
        raise UserError(f"teacher {teacher}: has no config.yaml; name the directory of a trained run")
    return load_run_config(file, {"sample": sample} if sample else None)


def end_teacher_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """End a cancelled run's sampling of its teacher; an `on_cancellation` hook."""
    from fm_core.launch.run_jobs import end_job

    parameters = flow_run.parameters or {}
    student = config_of(flow.validate_parameters(parameters))
    if student.data.pairs.samples is None:
        return
    for control in Path(parameters["teacher"]).expanduser().glob("samples/*/*"):
        # Other samples of the teacher are not in this folder.
        if Store.at(student.data.pairs.samples, control.parent.name, control.name).sizes():
            end_job(control)


@flow(
    name="distill-model",
    flow_run_name=run_name,
    retries=0,
    on_cancellation=[end_remaining_jobs, end_teacher_jobs],
)
def distill_model(
    teacher: str,
    config_file: str | None = None,
    config: dict[str, Any] | None = None,
    pairs: dict[str, Any] | None = None,
    apart: tuple[Apart, ...] = (),
) -> State[Any]:
    """Sample a trained model, train a student on the samples and their noise (reflow), score and report it.

    * **input**: the run directory of the teacher, and the student's configuration
    * **output**: the teacher's samples in `data.pairs.samples`; the student's run directory
      `<run.root>/<run.name>` with checkpoints, samples, scores and `report.html`
    * **rerun**: a run with the same `run.name` continues where the last one ended and verifies what is
      complete

    Args:
        teacher: run directory of the model to distill, e.g. `runs/digits`; the student starts from its
            weights unless its configuration has `train.init_from`
        config_file: the student's configuration file, e.g. `infra/configs/digits-reflow.yaml`: a path on the
            worker's machine, relative to the project's root. The teacher is sampled only if it has
            `data.pairs.samples`
        config: a tree of configuration keys of the student: alone, or to replace values of the file
        pairs: keys of `sample` for the teacher's samples, e.g. `{"images": 10000, "solver": "midpoint",
            "steps": 50}`; by default the teacher's own, stored as float32, with the student's seed plus one
        apart: stages to run as flow runs of their own deployments, in those deployments' work pools
    """
    parameters = {"teacher": teacher, "config_file": config_file, "config": config}
    try:
        student = student_of(parameters)
        sampled = sampling_of(teacher, student, pairs)
    except UserError as error:
        return final_flow_state(StageEndedError(outcome_of(error), str(error)))

    def run(watch: CancellationWatch) -> list[StageResult]:
        stages = possible_stages(student)
        here = [stage for stage in stages if stage not in apart]
        if sampled:
            preflight(student, here, without=["pairs"])
            preflight(sampled, [] if "sample" in apart else ["sample"])
        check_slots(apart)
        results = [_sample(sampled, "sample" in apart, watch)] if sampled else []
        preflight(student, here)
        return [*results, *run_stages(student, stages, apart, watch)]

    return final_state_of(student, run)


def _sample(config: RunConfig, apart: bool, watch: CancellationWatch) -> StageResult:
    if apart:
        return run_subflow("sample", resolve(config), of=TEACHER)
    return run_stage("sample", config, watch, of=TEACHER)
