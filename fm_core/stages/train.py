"""The train stage: a DeepSpeed job that trains on shards and writes checkpoints."""

import logging
from pathlib import Path

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import checkpoint_directories, step_of
from fm_core.checkpoint.ownership import begin_history, check_owner
from fm_core.config import RunConfig
from fm_core.data.loader_factories import check_streams
from fm_core.data.manifest import Manifest, load_manifest
from fm_core.data.sample_pairs import PairSet
from fm_core.errors import UserError
from fm_core.launch.dispatch import device_count, max_processes_per_host, world
from fm_core.launch.online_eval import check_online_eval, online_evaluation
from fm_core.launch.supervisor import StageJob, supervise
from fm_core.method.cnf_objective import MaximumLikelihood
from fm_core.method.couplings import Coupling
from fm_core.method.flow_map import FlowMap
from fm_core.method.objectives import Objective
from fm_core.models.build import build_method
from fm_core.run.directory import RunDirectory
from fm_core.run.history import read_history, rearm_start_over
from fm_core.run.progress import Observer, Progress, byte_size, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.run.status import read_status
from fm_core.stages.resolve import resolve
from fm_core.storage.atomic_files import read_json, read_lines
from fm_core.storage.store import Store
from fm_core.training.cost_model import checkpoint_bytes_of
from fm_core.training.engine import micro_batch_of
from fm_core.training.loggers import check_loggers
from fm_core.training.teacher_checks import check_published, check_teacher
from fm_core.training.training_set import pairs_of, training_set

LOG = logging.getLogger(__name__)


def train(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Train from the newest complete checkpoint to train.images, or attach to a running job that does.

    Raises:
        UserError: the data set is missing, or settings do not agree.
        StopRequested: the job was asked to stop.
        RuntimeError: the job failed.
    """
    config = resolve(config)
    return run_stage_function("train", config, observe, lambda run, show: _train(config, run, show))


def check_training(config: RunConfig) -> None:
    """Check the configuration before a process starts. Raises UserError."""
    CheckpointCatalog.of(config)
    processes, gpus = world(config.launch)[0], device_count()
    if config.launch.kind == "local" and gpus and processes > gpus:
        raise UserError(
            f"launch.processes: {processes} processes need one GPU each, and this host has {gpus}"
        )
    method = build_method(config.method)
    method.coupling.check(micro_batch_of(config.train, processes))
    _check_class_noise(config, method.coupling)
    if isinstance(method.objective, MaximumLikelihood) and config.train.zero_stage == 3:
        # The adjoint method needs gradients of parameters that ZeRO 3 has already released.
        raise UserError("train.zero_stage 3: maximum-likelihood trains through the solver; use stage 1 or 2")
    _check_flow_map(config, method.objective)
    check_loggers(config.train)


def _check_class_noise(config: RunConfig, coupling: Coupling) -> None:
    """Refuse a coupling that shifts the noise of each class of a conditional model. Raises UserError.

    A run that began with one before it was refused goes on.
    """
    if not (config.model.class_conditional and coupling.ignores_labels):
        return
    problem = (
        f"method.coupling {coupling.name} ignores labels: the noise that each class is trained with is not "
        "N(0, I), from which it is sampled"
    )
    recorded = RunDirectory(config).bound_config()
    if recorded and (recorded.method.coupling, recorded.model.class_conditional) == (
        config.method.coupling,
        True,
    ):
        LOG.warning("%s; a new run needs class-optimal-transport", problem)
        return
    raise UserError(
        f"{problem}; with model.class_conditional: true use class-optimal-transport, "
        "conditional-optimal-transport or independent"
    )


def _check_flow_map(config: RunConfig, objective: Objective) -> None:
    """Check that an objective with two times can be trained with this configuration. Raises UserError."""
    if not objective.two_times:
        return
    if config.train.zero_stage == 3:
        raise UserError(
            f"train.zero_stage 3: {objective.name} also evaluates the network outside of the engine, where "
            "the weights are not gathered; use stage 1 or 2"
        )
    guidance = objective.guidance if isinstance(objective, FlowMap) else 1.0
    if guidance != 1 and not (config.model.class_conditional and config.train.label_dropout):
        raise UserError(
            f"method.objective_options guidance {guidance:g}: it needs model.class_conditional: "
            "true and train.label_dropout, e.g. 0.1, for the velocity without label"
        )


def check_initial_weights(config: RunConfig) -> None:
    """Check that train.init_from exists and fits the network and the method, as far as this is recorded.

    Nothing is checked if there is a checkpoint to resume from. Raises UserError.
    """
    source = config.train.init_from
    if not source or CheckpointCatalog.of(config).steps():
        return
    objective = build_method(config.method).objective
    check_published(config, objective)
    if "://" in source:
        return
    if not Path(source).exists():
        raise UserError(
            f"train.init_from: {source} does not exist; name a run directory or a .safetensors file"
        )
    check_teacher(config, objective)


def check_pairs(config: RunConfig) -> None:
    """Check the sample set of data.pairs except for hashes, if the data set is there. Raises UserError."""
    if not config.data.pairs.samples or complete(config):
        return
    try:
        manifest = load_manifest(config.data.root, config.data.name)
    except UserError:
        return  # it may be written first; without it the stage itself says so
    if pairs := pairs_of(config, manifest):
        pairs.check_files(hashes=False)


def _verify_pairs(config: RunConfig, pairs: PairSet | None, observe: Observer) -> None:
    """Verify the files of the pairs, and before the first step their hashes. Raises UserError."""
    if pairs is None:
        return
    first_start = not CheckpointCatalog.of(config).steps()
    if first_start:
        observe(Progress("train", 0, config.train.images, "images", "checking the hashes of the pairs"))
    pairs.check_files(hashes=first_start)
    if not pairs.dtype.is_floating_point:
        LOG.warning(
            "data.pairs.samples: %s holds intensity levels, not the ends of the trajectories; samples made "
            "with sample.store: float32 hold both",
            pairs.store.url,
        )


def check_labels(config: RunConfig, classes: int | None) -> None:
    """Check that a class-conditional model has `classes`; None or 0 without labels. Raises UserError."""
    if config.model.class_conditional and not classes:
        raise UserError(
            f"model.class_conditional: the data set {config.data.name} has no labels; set it to "
            "false, or shard a source with classes"
        )


def check_space(config: RunConfig, manifest: Manifest) -> None:
    """Check that the disk has space for the remaining checkpoints. Raises UserError."""
    checkpoints = CheckpointCatalog.of(config)
    folder = checkpoints.folder
    size = checkpoint_bytes_of(config, manifest.image_shape, manifest.class_count or 0)
    # A new one is complete before an old one is removed; during uploads there are two.
    needed = 2 if checkpoints.uploads else config.train.keep_checkpoints + 1
    to_come = max(1, needed - len(checkpoint_directories(folder)))
    free = Store.at(str(folder)).free_bytes()
    if free is not None and free < size * to_come:
        raise UserError(
            f"train.keep_checkpoints: {byte_size(free)} free under {folder}, but {to_come} more checkpoints "
            f"of {byte_size(size)} are needed"
        )


def _train(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    check_training(config)
    check_initial_weights(config)
    check_online_eval(config)
    manifest = load_manifest(config.data.root, config.data.name)
    check_labels(config, manifest.class_count)
    state = "verified"
    if complete(config):
        run.begin()
        if not config.train.start_over:
            rearm_start_over(run.path)
    else:
        check_space(config, manifest)
        state = "done"
        batch, ranks = config.train.global_batch, world(config.launch)[0]
        images = training_set(config, manifest, build_method(config.method))
        _verify_pairs(config, images.pairs, observe)
        per_host = max_processes_per_host(config.launch)
        check_streams(images.section, images.manifest, config.run.seed, batch, ranks, per_host)
        check_owner(config)
        run.begin()
        begin_history(config)
        total = config.train.images
        observe(Progress("train", 0, total, "images", "starting the processes"))
        job = StageJob(
            control=run.path,
            logs=run.path / "logs",
            stage="train",
            worker="fm_core.training.train_worker:train",
            config=config,
            complete=lambda: complete(config),
            meanwhile=lambda: online_evaluation(config),
            durable_progress=lambda: newest_step(run),
            collective=True,
            before_submit=run.check_identity,
        )
        supervise(job, observe)
    done = read_json(run.train_done) or {}
    lines = read_lines(run.metrics)
    loss = lines[-1]["loss"] if lines else None
    return StageResult(
        stage="train",
        state=state,
        seconds=0.0,
        summary=f"{done['images_seen']:,} images in {done['step']:,} steps"
        + (f", loss {loss:.4f}" if loss else ""),
        paths={
            "run": str(run.path),
            "checkpoint": f"{run.checkpoints.rstrip('/')}/{done['checkpoint']}",
            "metrics": str(run.metrics),
            "log": str(run.log("train", 0)),
        },
        counts={
            "images_seen": done["images_seen"],
            "steps": done["step"],
            **({"loss": loss} if loss else {}),
        },
    )


def newest_step(run: RunDirectory) -> int:
    """Step of the newest checkpoint that the last job reported as complete; 0 if there is none."""
    name = (read_status(run.path) or {}).get("last_checkpoint")
    return step_of(name) if name else 0


def complete(config: RunConfig) -> bool:
    """Whether DONE.json records enough images seen and the last checkpoint is valid."""
    run = RunDirectory(config)
    history = read_history(run.path)
    if config.train.start_over and not (history and history.start_over_obeyed):
        return False
    done = read_json(run.train_done)
    if done is None or done["images_seen"] < config.train.images:
        return False
    return CheckpointCatalog.of(config).problem_of(done["checkpoint"]) is None
