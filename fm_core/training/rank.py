"""One rank of training: `python -m fm_core.training.rank CONFIG` under torchrun."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fm_core.config import RunConfig
from fm_core.data.manifest import Manifest, load_manifest
from fm_core.data.reader import ImageReader
from fm_core.data.streams import make_cache, make_order
from fm_core.method.quantiser import Quantiser
from fm_core.models.build import Method, build_method, build_network
from fm_core.run.directory import RunDirectory
from fm_core.run.files import write_json
from fm_core.run.rank import Rank, run_rank
from fm_core.training import checkpoint
from fm_core.training.batch import BatchSource
from fm_core.training.checkpoint import TrainState
from fm_core.training.ema import Averages
from fm_core.training.engine import initialize_process_group, make_engine, micro_batch_of
from fm_core.training.exports import Exports
from fm_core.training.initial import initial_weights
from fm_core.training.log import TrainLog
from fm_core.training.loop import Trainer, run


def train(config: RunConfig, rank: Rank) -> None:
    """Train to the end of train.images, from the newest checkpoint if there is one."""
    device = initialize_process_group()
    trainer = _trainer(config, rank, device)
    found = checkpoint.load(trainer.engine, trainer.averages, trainer.root, trainer.recipe)
    state = found or TrainState(processes=rank.count)
    directory = RunDirectory(config)
    if trainer.log:
        trainer.log.forget_after(state.step)
        trainer.log.status(state, now=True)
    state = run(trainer, state)
    if trainer.log:
        last = trainer.root / checkpoint.step_name(state.step)
        problem = checkpoint.verify(last)
        if problem:
            raise RuntimeError(f"the last checkpoint is not whole: {problem}")
        write_json(directory.train_done, {**state.model_dump(), "checkpoint": last.name})
        trainer.log.status(state, phase="done", now=True)
    dist.barrier()


def _trainer(config: RunConfig, rank: Rank, device: torch.device) -> Trainer:
    manifest = load_manifest(config.data.root, config.data.name)
    method = build_method(config.method)
    method.coupling.check(micro_batch_of(config.train, rank.count))
    torch.manual_seed(config.run.seed)
    classes = manifest.class_count or 0
    network = build_network(config.model, manifest.image_shape, classes, config.train.gradient_checkpointing)
    if config.train.init_from:
        order = config.train.init_attention_order
        network.load_state_dict(initial_weights(config.train.init_from, network, order))
    engine = make_engine(network, config.train, device)
    directory = RunDirectory(config)
    return Trainer(
        train=config.train,
        engine=engine,
        objective=method.objective,
        averages=Averages(engine, config.train.ema_decays, config.train.ema_warmup),
        source=_source(config, manifest, method, rank.count),
        rank=rank,
        device=device,
        root=Path(directory.checkpoints),
        recipe=recipe(config, manifest),
        conditional=config.model.class_conditional,
        log=_log(config, rank) if rank.first else None,
    )


def _log(config: RunConfig, rank: Rank) -> TrainLog:
    metrics = RunDirectory(config).metrics
    return TrainLog(rank.control, metrics, rank.job, config.train.images, Exports(config))


def recipe(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """What a file of weights must say of itself to be of use alone."""
    return {
        "seed": config.run.seed,
        "model": config.model.model_dump(mode="json"),
        "method": config.method.model_dump(mode="json"),
        "levels": manifest.levels,
        "image_shape": list(manifest.image_shape),
        "classes": manifest.class_count or 0,
        "data": {"name": manifest.name, "version": manifest.version, "label_order": manifest.label_order},
    }


def _source(config: RunConfig, manifest: Manifest, method: Method, ranks: int) -> BatchSource:
    data, seed = config.data, config.run.seed
    return BatchSource(
        reader=ImageReader(data.root, manifest, "train", make_cache(data, manifest)),
        order=make_order(data, manifest, "train", seed, config.train.global_batch, ranks),
        quantiser=Quantiser(manifest.levels),
        path=method.objective.path,
        coupling=method.coupling,
        times=method.times,
        seed=seed,
        flip=data.horizontal_flip,
    )


if __name__ == "__main__":
    run_rank("train", train)
