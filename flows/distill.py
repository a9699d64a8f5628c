"""Flow of a distillation: samples of a trained model, and a student that is trained on them."""

from pathlib import Path
from typing import Any

from prefect import Flow, flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging import get_logger

from flows.cancellation import end_remaining_jobs
from flows.cancellation_watch import CancellationWatch
from flows.pair_checks import check_sampling, seed_of_pairs
from flows.parameters import config_of
from flows.pipeline import final_state_of, run_name, run_stages
from flows.stage_tasks import final_flow_state, run_stage
from flows.subflows import Apart, check_slots, run_subflow
from flows.train import possible_stages
from fm_core.commands import preflight, resolve
from fm_core.config import RunConfig, merge, read_yaml
from fm_core.errors import StageEndedError, UserError, outcome_of
from fm_core.run.directory import RunDirectory, load_run_config
from fm_core.run.results import StageResult
from fm_core.storage.local_paths import expand_home
from fm_core.storage.store import Store

TEACHER = "teacher"
"""What distinguishes the sampling of the teacher from that of the student."""


def student_of(parameters: dict[str, Any]) -> RunConfig:
    """The student's configuration: of the file and the keys, started from the teacher by default.

    A student of pairs starts from random weights if those of the teacher do not fit it.

    Raises:
        UserError: neither is given, one is invalid, the teacher is no trained run or the student itself, or
            the weights that the student is to start from do not fit it.
    """
    from fm_core.stages.train import check_initial_weights

    student, teacher = config_of(parameters), _recorded(parameters["teacher"])
    if RunDirectory(student).path.resolve() == RunDirectory(teacher).path.resolve():
        raise UserError(f"run.name {student.run.name}: is the teacher; choose another name for the student")
    given = student.train.given("init_from")
    if not given:
        train = student.train.model_copy(update={"init_from": str(expand_home(parameters["teacher"]))})
        started = student.model_copy(update={"train": train})
    else:
        started = student
    try:
        check_initial_weights(started)
        student = started
    except UserError as error:
        if given or not student.data.pairs.samples:
            raise
        get_logger(__name__).warning("%s; the student starts from random weights", error)
    if student.run.generator is None and student.data.pairs.samples:
        # The noise of the pairs is the teacher's.
        run = student.run.model_copy(update={"generator": teacher.run.generator})
        student = student.model_copy(update={"run": run})
    return student


def sampling_of(teacher: str, student: RunConfig, pairs: dict[str, Any] | None) -> RunConfig | None:
    """The teacher's configuration for sampling the student's pairs; None for a student without pairs.

    `pairs` are keys of the sample section, in place of the teacher's own.

    Raises:
        UserError: a key is invalid, the student could not be trained on the samples, or they have the seed
            that the student is sampled with or that the teacher was trained with.
    """
    place = student.data.pairs.samples
    if place is None:
        if pairs:
            raise UserError(f"pairs: the student's configuration has no data.pairs.samples; remove {pairs}")
        return None
    if "root" in (pairs or {}):
        raise UserError("pairs: root is data.pairs.samples of the student's configuration; remove it")
    own = seed_of_pairs(_recorded(teacher, {"weights": "ema", "step": "latest"}))
    seed = max(student.sample.seed, own or 0) + 1
    config = _recorded(teacher, merge({"root": place, "store": "float32", "seed": seed}, pairs or {}))
    if config.sample.seed == student.sample.seed:
        raise UserError(
            f"pairs: seed {config.sample.seed} is the student's sample.seed, so it would be scored on the "
            "noise that it is trained on; choose another"
        )
    if config.sample.seed == own:
        raise UserError(
            f"pairs: seed {own} is that of the pairs that the teacher was trained on, so its samples would "
            "begin at noise that it has seen; choose another"
        )
    check_sampling(config, student)
    return config


def with_samples(student: RunConfig, sampled: StageResult) -> RunConfig:
    """The student's configuration with the sample set of a result in place of the folder above it.

    The folder may hold earlier sets. A stage apart does not report the place of its samples; then the folder
    must hold one set.
    """
    place = sampled.paths.get("samples", student.data.pairs.samples)
    pairs = student.data.pairs.model_copy(update={"samples": place})
    return student.model_copy(update={"data": student.data.model_copy(update={"pairs": pairs})})


def _recorded(teacher: str, sample: dict[str, Any] | None = None) -> RunConfig:
    file = expand_home(teacher) / "config.yaml"
    if not file.exists():
        raise UserError(f"teacher {teacher}: has no config.yaml; name the directory of a trained run")
    return load_run_config(file, {"sample": sample} if sample else None)


def end_teacher_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """End a cancelled run's sampling of its teacher; an `on_cancellation` hook."""
    from fm_core.launch.run_jobs import end_job

    parameters = flow_run.parameters or {}
    student = config_of(flow.validate_parameters(parameters))
    place = student.data.pairs.samples
    if place is None:
        return
    teacher = expand_home(parameters["teacher"])
    for control in teacher.glob("samples/*/*"):
        # Other jobs sample the teacher into another folder.
        root = _sample_root(control, teacher / "logs")
        if root is not None and Store.at(root).url == Store.at(place).url:
            end_job(control)


def _sample_root(control: Path, logs: Path) -> str | None:
    """The key sample.root of the job of a control directory; None if there is none."""
    from fm_core.launch.launcher import job_config_file

    try:
        return read_yaml(job_config_file(control, logs, "sample")).get("sample", {}).get("root")
    except UserError:
        return None  # no job was submitted


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
            weights unless its configuration has `train.init_from`, or they do not fit a student of pairs
        config_file: the student's configuration file, e.g. `infra/configs/digits-reflow.yaml`: a path on the
            worker's machine, relative to the project's root. The teacher is sampled only if it has
            `data.pairs.samples`
        config: a tree of configuration keys of the student: alone, or to replace values of the file
        pairs: keys of `sample` for the teacher's samples, e.g. `{"images": 10000, "solver": "midpoint",
            "steps": 50}`; by default the teacher's own, stored as float32, with a seed that neither the
            student's samples nor the pairs of the teacher's own training have
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
        trained = with_samples(student, results[0]) if results else student
        preflight(trained, here)
        return [*results, *run_stages(trained, stages, apart, watch)]

    return final_state_of(student, run)


def _sample(config: RunConfig, apart: bool, watch: CancellationWatch) -> StageResult:
    if apart:
        return run_subflow("sample", resolve(config), of=TEACHER)
    return run_stage("sample", config, watch, of=TEACHER)
