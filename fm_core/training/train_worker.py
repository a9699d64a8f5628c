"""Training worker: the work of one rank."""

import logging
from typing import Any

import torch
import torch.distributed as dist

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.checkpoint_loader import adopt_staged
from fm_core.checkpoint.format import step_of
from fm_core.checkpoint.train_state import TrainState
from fm_core.config import RunConfig
from fm_core.data.cache import NodeCache
from fm_core.data.manifest import Manifest
from fm_core.data.sampler import ORDER_VERSION
from fm_core.errors import FlowMatchingError, StopRequested, UnreachableError
from fm_core.launch.rank_group import store_of_one
from fm_core.launch.upload_handover import start_upload_worker, stop_upload_worker
from fm_core.launch.worker_main import Rank
from fm_core.models.build import build_method, build_network
from fm_core.models.flops import flops_per_image
from fm_core.run.directory import RunDirectory, identity, step_name
from fm_core.run.history import history_path, record_completed
from fm_core.storage.atomic_files import write_json
from fm_core.storage.keyed_random import generator_record
from fm_core.training import nonfinite_recovery
from fm_core.training.ema import ModelEMA, ema_decays
from fm_core.training.engine import initialize_process_group, make_engine, micro_batch_of
from fm_core.training.hang_watchdog import HangWatchdog
from fm_core.training.loggers import MetricLoggers
from fm_core.training.loop import run
from fm_core.training.pretrained import pretrained_weights
from fm_core.training.saving import load_checkpoint
from fm_core.training.start_over import prepare_history
from fm_core.training.train_log import TrainLog
from fm_core.training.trainer import Trainer
from fm_core.training.training_set import generator_of_run, training_set

LOG = logging.getLogger(__name__)

UPLOAD_SECONDS = 600.0
"""Seconds that the end of training waits for uploads to a failing store."""
STOPPED_UPLOAD_SECONDS = 4.0
"""Seconds that a stopped run waits for its uploads; then another process continues them."""


def train(config: RunConfig, rank: Rank) -> None:
    """Train from the newest checkpoint, if there is one, until train.images images were seen."""
    with store_of_one():
        _train(config, rank, initialize_process_group())


def _train(config: RunConfig, rank: Rank, device: torch.device) -> None:
    trainer, state = build_or_resume(config, rank, device)
    try:
        _train_from(config, rank, trainer, state)
    finally:
        # Under launch.kind debug this process continues, and may train in the same directory again.
        trainer.saver.close()
        for catalog in (trainer.checkpoints, trainer.snapshots):
            if catalog:
                catalog.close()


def _train_from(config: RunConfig, rank: Rank, trainer: Trainer, state: TrainState) -> None:
    if trainer.log:
        try:
            trainer.log.forget_after(state.step)
        except OSError as error:
            raise UnreachableError(f"{trainer.log.metrics} cannot be written: {error}") from None
        trainer.log.status(state, now=True)
    if rank.watched:
        trainer.watchdog = HangWatchdog("train", rank, config.train.hang_seconds)
    try:
        state = run(trainer, state)
    except StopRequested as stop:
        if trainer.watchdog:
            trainer.watchdog.stop()
        raise _after_stop(config, trainer, stop) from None
    # The other ranks are done; they wait for rank 0 without a collective operation, which would time out.
    if trainer.watchdog:
        trainer.watchdog.stop()
    if trainer.checkpoints and trainer.log:
        _finish(config, rank, trainer, trainer.checkpoints, trainer.log, state)


def build_or_resume(config: RunConfig, rank: Rank, device: torch.device) -> tuple[Trainer, TrainState]:
    """The trainer of this rank and the state to train from, that of the newest checkpoint or a new one."""
    unfinished = stop_upload_worker(RunDirectory(config).path) if rank.first else None
    try:
        history = prepare_history(config, rank.fence) if rank.first else None
        trainer = _build_trainer(config, rank, device)
        if history and history.completed_step is not None:
            trainer.completed = step_name(history.completed_step)
            if history.completed_at:
                trainer.completed += f" in {history.completed_at}"
        if rank.first:
            adopt_staged(config, trainer.recipe)
        checkpoint = load_checkpoint(trainer)
        trainer.saver.reserve(trainer.sharded)
        if trainer.snapshots:  # now that the checkpoint root is known to be this run's
            trainer.snapshots.catch_up()
        if checkpoint and history and history.completed_step is None:
            record_completed(RunDirectory(config).path, history.id, checkpoint.step, "")
    except Exception:
        if unfinished is not None:  # this start failed, so it must not upload what the last stop left
            start_upload_worker(config, unfinished)
        raise
    state = nonfinite_recovery.restore_rollback(checkpoint or TrainState(), trainer.rollback_record)
    return trainer, state.model_copy(update={"processes": rank.count})


def _after_stop(config: RunConfig, trainer: Trainer, stop: StopRequested) -> StopRequested:
    """The request to stop, with a message about checkpoints that are not uploaded yet."""
    catalogs = [catalog for catalog in (trainer.checkpoints, trainer.snapshots) if catalog]
    problems = [problem for catalog in catalogs if (problem := catalog.wait(STOPPED_UPLOAD_SECONDS))]
    if not (problems and trainer.log):
        if trainer.log:
            stop_upload_worker(RunDirectory(config).path)
        return stop
    step = step_of(str(trainer.log.facts["last_checkpoint"]))
    message = start_upload_worker(config, step)
    message = (
        message or f"the next start uploads the checkpoints staged in {catalogs[0].folder}: {problems[0]}"
    )
    LOG.warning("%s", message)
    return StopRequested(f"{stop}; {message}")


def _finish(
    config: RunConfig,
    rank: Rank,
    trainer: Trainer,
    checkpoints: CheckpointCatalog,
    log: TrainLog,
    state: TrainState,
) -> None:
    """Write DONE.json once all checkpoints are uploaded and the last one is verified."""
    for catalog in (checkpoints, trainer.snapshots):
        if catalog and (problem := catalog.wait(UPLOAD_SECONDS)):
            raise UnreachableError(
                f"cannot upload the last checkpoint to {catalog.store.url} ({problem}); it waits in "
                f"{catalog.folder}: run it again when the store is back"
            )
    last = step_name(state.step)
    stop_upload_worker(RunDirectory(config).path)
    problem = checkpoints.problem_of(last)
    if problem:
        raise RuntimeError(f"the last checkpoint is damaged: {problem}")
    done = RunDirectory(config).train_done
    try:
        log.sync()
        rank.fence.check()
        write_json(done, {**state.model_dump(), "checkpoint": last})
    except OSError as error:
        raise UnreachableError(f"{done} cannot be written: {error}; run it again") from None
    log.status(state, phase="done", now=True)


def _build_trainer(config: RunConfig, rank: Rank, device: torch.device) -> Trainer:
    manifest = _shared_manifest(config, rank)
    method = build_method(config.method)
    method.coupling.check(micro_batch_of(config.train, rank.count))
    images = training_set(config, manifest, method)
    torch.manual_seed(config.run.seed)
    classes = manifest.class_count or 0
    network = build_network(
        config.model,
        manifest.image_shape,
        classes,
        config.train.gradient_checkpointing,
        method.objective.two_times,
    )
    if config.train.init_from and not _has_checkpoint(config, rank):
        order, source = config.train.init_attention_order, config.train.init_source
        network.load_state_dict(pretrained_weights(config.train.init_from, network, order, source))
    flops = flops_per_image(network, manifest.image_shape)
    engine = make_engine(network, config.train, device)
    directory = RunDirectory(config)
    checkpoints = CheckpointCatalog.of(config, rank.fence) if rank.first else None
    return Trainer(
        train=config.train,
        engine=engine,
        objective=method.objective,
        averages=ModelEMA(engine, ema_decays(config.train)),
        source=images.training_source(rank.count),
        rank=rank,
        device=device,
        recipe={**recipe(config, manifest), **images.record},
        conditional=config.model.class_conditional,
        flops=flops,
        checkpoints=checkpoints,
        snapshots=checkpoints.snapshots() if checkpoints and config.train.snapshot_images else None,
        validation=images.validation_loss(rank.count),
        log=_train_log(config, rank) if rank.first else None,
        on_first_step=directory.bind if rank.first else None,
        rollback_record=directory.path / "train" / "setback.json" if rank.first else None,
    )


def _shared_manifest(config: RunConfig, rank: Rank) -> Manifest:
    """The manifest of the data set, which rank 0 reads for all; every rank raises the error of a failure."""
    shared: list[Any] = [None]
    if rank.first:
        try:
            cache = NodeCache(config.data.cache)
            shared = [cache.manifest(config.data.root, config.data.name, rank.job)]
        except Exception as error:
            shared = [_shareable(error)]
    dist.broadcast_object_list(shared, src=0)
    if isinstance(shared[0], Exception):
        raise shared[0]
    return shared[0]


def _shareable(error: Exception) -> Exception:
    """The exception, or a RuntimeError with its message if its class may not survive pickling."""
    if isinstance(error, FlowMatchingError) or type(error).__module__ == "builtins":
        return error
    shared = RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())}")
    shared.__cause__ = error
    return shared


def _has_checkpoint(config: RunConfig, rank: Rank) -> bool:
    """Whether there is a checkpoint to resume from, so that train.init_from is no longer needed."""
    shared = [bool(CheckpointCatalog.of(config).steps()) if rank.first else None]
    dist.broadcast_object_list(shared, src=0)
    return bool(shared[0])


def _train_log(config: RunConfig, rank: Rank) -> TrainLog:
    run = RunDirectory(config)
    loggers, landmark = MetricLoggers(config), history_path(run.path)
    return TrainLog(rank.control, run.metrics, rank.job, config.train.images, loggers, landmark, rank.fence)


def recipe(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """Metadata of a weights file, so that it can be used on its own and compared with a run."""
    return {
        "run": {"name": config.run.name},
        "seed": config.run.seed,
        **generator_record(generator_of_run(config)),
        "model": config.model.model_dump(mode="json"),
        "method": config.method.model_dump(mode="json"),
        "levels": manifest.levels,
        "image_shape": list(manifest.image_shape),
        "classes": manifest.class_count or 0,
        "data": {"name": manifest.name, "version": manifest.version, "label_order": manifest.label_order},
        "train": identity(config)["train"],
        "order": {"version": ORDER_VERSION},
    }
