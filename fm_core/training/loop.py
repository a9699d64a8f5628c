"""The training loop."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fm_core.config import TrainSection
from fm_core.data.batches import Batches
from fm_core.errors import Stopped
from fm_core.method.objectives import Objective
from fm_core.run.rank import Rank
from fm_core.training import checkpoint
from fm_core.training.batch import BatchSource, ambient_seed
from fm_core.training.checkpoint import TrainState
from fm_core.training.ema import Averages
from fm_core.training.engine import micro_batch_of, set_learning_rate
from fm_core.training.log import Interval, TrainLog, finite
from fm_core.training.schedule import learning_rate


@dataclass
class Trainer:
    """What the loop works with."""

    train: TrainSection
    engine: Any
    objective: Objective
    averages: Averages
    source: BatchSource
    rank: Rank
    device: torch.device
    root: Path
    recipe: dict[str, Any]
    """What the weights belong to; goes into every file of weights."""
    conditional: bool
    """Whether the network sees the labels."""
    log: TrainLog | None
    """On rank 0 alone."""
    clock: float = field(default_factory=time.monotonic)
    """When the present step began."""


def run(trainer: Trainer, state: TrainState) -> TrainState:
    """Train from `state` until train.images were seen; a stop request saves and raises Stopped."""
    train, rank = trainer.train, trainer.rank
    micro = micro_batch_of(train, rank.count)
    with trainer.source.batches(
        state.position, train.global_batch, rank.number, rank.count, micro
    ) as batches:
        return _steps(trainer, state, batches, accumulated=train.global_batch // rank.count // micro)


def _steps(trainer: Trainer, state: TrainState, batches: Batches, accumulated: int) -> TrainState:
    train = trainer.train
    control = dist.new_group(backend="gloo")
    interval = Interval(trainer.device, trainer.objective.interval)
    interval.restore(state.interval_sums, trainer.rank.number)
    while state.images_seen < train.images:
        rate = learning_rate(train, state.images_seen)
        set_learning_rate(trainer.engine, rate)
        for _ in range(accumulated):
            _micro_step(trainer, batches, interval)
        state = _after_step(trainer, state, interval)
        if (
            crossed(train.log_images, state.images_seen, train.global_batch)
            or state.images_seen >= train.images
        ):
            _write_line(trainer, state, interval, rate)
            interval = Interval(trainer.device, trainer.objective.interval)
        stop = _agree_to_stop(trainer.rank, control)
        ended = state.images_seen >= train.images
        if stop or ended or crossed(train.checkpoint_images, state.images_seen, train.global_batch):
            _save(trainer, state.model_copy(update={"interval_sums": interval.gathered(control)}))
        if trainer.log:
            trainer.log.status(state)
        if stop and not ended:
            raise Stopped(
                f"stopped at step {state.step} ({state.images_seen:,} images seen); run it again to continue"
            )
    return state


def crossed(every: int, images_seen: int, global_batch: int) -> bool:
    """Whether the last step passed a multiple of `every` images."""
    return images_seen // every > (images_seen - global_batch) // every


def _micro_step(trainer: Trainer, batches: Batches, interval: Interval) -> None:
    waiting = time.monotonic()
    batch = next(batches)
    sample, label = trainer.source.draw(batch, trainer.device)
    interval.waited += time.monotonic() - waiting
    # Dropout, too, is a function of the position, or a resumed run would differ.
    torch.manual_seed(ambient_seed(trainer.source.seed, batch.first))
    losses = trainer.objective.loss(trainer.engine, sample, label if trainer.conditional else None)
    trainer.engine.backward(losses.mean())
    trainer.engine.step()
    interval.add(losses, sample.t)


def _after_step(trainer: Trainer, state: TrainState, interval: Interval) -> TrainState:
    applied = bool(trainer.engine.was_step_applied())
    if applied:
        trainer.averages.update(state.applied_steps)
    interval.images += trainer.train.global_batch
    now = time.monotonic()
    seconds, trainer.clock = now - trainer.clock, now
    return state.model_copy(
        update={
            "step": state.step + 1,
            "applied_steps": state.applied_steps + applied,
            "images_seen": state.images_seen + trainer.train.global_batch,
            "position": state.position + trainer.train.global_batch,
            "seconds": state.seconds + seconds,
        }
    )


def _write_line(trainer: Trainer, state: TrainState, interval: Interval, rate: float) -> None:
    loss, quarters = interval.summary()
    norm = trainer.engine.get_global_grad_norm()
    if trainer.log is None:
        return
    trainer.log.line(
        {
            "step": state.step,
            "images_seen": state.images_seen,
            "loss": loss,
            "loss_by_quarter_of_t": quarters,
            "lr": rate,
            "grad_norm": None if norm is None else finite(float(norm)),
            "images_per_s": interval.images / (time.monotonic() - interval.began),
            "seconds": state.seconds,
            "data_seconds": interval.waited,
            "skipped_steps": state.step - state.applied_steps,
        }
    )


def _agree_to_stop(rank: Rank, control: Any) -> bool:
    """Whether any rank was asked to stop; every rank gets the same answer at the same step."""
    asked = torch.tensor(int(rank.stop_requested()))
    dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=control)
    return bool(asked.item())


def _save(trainer: Trainer, state: TrainState) -> None:
    directory = checkpoint.save(trainer.engine, trainer.averages, state, trainer.root, trainer.recipe)
    if trainer.log:
        checkpoint.retain(trainer.root, trainer.train.keep_checkpoints, newest=state.step)
        trainer.log.facts["last_checkpoint"] = directory.name
        trainer.log.status(state, now=True)
