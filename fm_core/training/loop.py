"""The training loop."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fm_core.checkpoint import save_load
from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.train_state import TrainState
from fm_core.config import TrainSection
from fm_core.data.batches import Batches
from fm_core.errors import NonFiniteGradientsError, StopRequested
from fm_core.launch.worker_main import Rank
from fm_core.method.objectives import Objective
from fm_core.training import nonfinite_recovery
from fm_core.training.batch_source import BatchSource, ambient_seed, seed_generators
from fm_core.training.ema import ModelEMA
from fm_core.training.engine import micro_batch_of, network_for, set_learning_rate, use_bf16
from fm_core.training.hang_watchdog import HangWatchdog
from fm_core.training.lr_schedule import crossed, learning_rate, power_name
from fm_core.training.metrics import MetricAccumulator, TrainLog
from fm_core.training.mfu import utilization
from fm_core.training.validation_loss import ValidationLoss


@dataclass
class Trainer:
    """What the loop works with."""

    train: TrainSection
    engine: Any
    objective: Objective
    averages: ModelEMA
    source: BatchSource
    rank: Rank
    device: torch.device
    recipe: dict[str, Any]
    """What the weights belong to; goes into every file of weights."""
    conditional: bool
    """Whether the network sees the labels."""
    flops: float
    """Operations of one forward pass for one image."""
    checkpoints: CheckpointCatalog | None
    """On rank 0 alone."""
    log: TrainLog | None
    """On rank 0 alone."""
    snapshots: CheckpointCatalog | None = None
    """On rank 0: of the power-function averages, kept for good."""
    setback: Path | None = None
    """On rank 0: where it is written down that training went back."""
    held_out: ValidationLoss | None = None
    """None where there are no held-out images."""
    watch: HangWatchdog | None = None
    """None where nobody looks after ranks that hang."""
    clock: float = field(default_factory=time.monotonic)
    """When the present step began."""
    control: Any = field(default_factory=lambda: dist.new_group(backend="gloo"))
    """Where the ranks agree on what is no tensor of the device."""


def run(trainer: Trainer, state: TrainState) -> TrainState:
    """Train from `state` until train.images were seen; a stop request saves and raises StopRequested.

    Raises UnrecoverableError where steps cannot be applied and going back to a checkpoint has not helped.
    """
    train, rank = trainer.train, trainer.rank
    micro = micro_batch_of(train, rank.count)
    accumulated = train.global_batch // rank.count // micro
    while True:
        position = state.position
        try:
            with trainer.source.batches(
                position, train.global_batch, rank.number, rank.count, micro
            ) as batches:
                return _steps(trainer, state, batches, accumulated)
        except NonFiniteGradientsError as trouble:
            state = _go_back(trainer, trouble.state)


def _steps(trainer: Trainer, state: TrainState, batches: Batches, accumulated: int) -> TrainState:
    train = trainer.train
    interval = MetricAccumulator(trainer.device, trainer.objective.interval)
    interval.restore(state.interval_sums, trainer.rank.number)
    while state.images_seen < train.images:
        rate = learning_rate(train, state.images_seen)
        set_learning_rate(trainer.engine, rate)
        for _ in range(accumulated):
            _micro_step(trainer, batches, interval, state.step + 1)
        state = _after_step(trainer, state, interval)
        ended = state.images_seen >= train.images
        logged = ended or crossed(train.log_images, state.images_seen, train.global_batch)
        nonfinite_recovery.check(train, state, logged)
        if logged:
            _write_line(trainer, state, interval, rate)
            interval = MetricAccumulator(trainer.device, trainer.objective.interval)
        every = train.snapshot_images
        if every and (ended or crossed(every, state.images_seen, train.global_batch)):
            # Before the checkpoint: whoever goes on from that one does not come by here again.
            _save_snapshot(trainer, state)
        stop = _agree_to_stop(trainer.rank, trainer.control)
        if stop or ended or crossed(train.checkpoint_images, state.images_seen, train.global_batch):
            # A stop may come after a step or two: that is not far enough.
            state = state if stop else nonfinite_recovery.recovered(state)
            sums = interval.gathered(trainer.control)
            _save(trainer, state.model_copy(update={"interval_sums": sums}), hurried=stop)
        if trainer.log:
            trainer.log.status(state)
        if stop and not ended:
            raise StopRequested(
                f"stopped at step {state.step} ({state.images_seen:,} images seen); run it again to continue"
            )
    return state


def _micro_step(trainer: Trainer, batches: Batches, interval: MetricAccumulator, step: int) -> None:
    _heartbeat(trainer, f"the data of step {step}")
    waiting = time.monotonic()
    batch = next(batches)
    sample, label = trainer.source.draw(batch, trainer.device)
    interval.waited += time.monotonic() - waiting
    _heartbeat(trainer, f"the forward pass of step {step}")
    # Dropout, too, is a function of the position, or a resumed run would differ.
    seed_generators(ambient_seed(trainer.source.seed, batch.first), trainer.device)
    network = network_for(trainer.objective, trainer.engine)
    losses = trainer.objective.loss(network, sample, label if trainer.conditional else None)
    _heartbeat(trainer, f"the backward pass and the update of step {step}")
    trainer.engine.backward(losses.mean())
    trainer.engine.step()
    interval.add(losses, sample.t)


def _after_step(trainer: Trainer, state: TrainState, interval: MetricAccumulator) -> TrainState:
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
            "skipped_in_a_row": 0 if applied else state.skipped_in_a_row + 1,
            "images_seen": state.images_seen + trainer.train.global_batch,
            "position": state.position + trainer.train.global_batch,
            "seconds": state.seconds + seconds,
        }
    )


def _write_line(trainer: Trainer, state: TrainState, interval: MetricAccumulator, rate: float) -> None:
    measured = interval.summary(trainer.control)
    norm = trainer.engine.get_global_grad_norm()
    if trainer.log is None:
        return
    trainer.log.line(
        {
            "step": state.step,
            "images_seen": state.images_seen,
            "position": state.position,
            "lr": rate,
            # Before clipping; infinite, so absent, if the last step was skipped.
            "grad_norm": None if norm is None else float(norm),
            "seconds": state.seconds,
            "skipped_steps": state.step - state.applied_steps,
            "rollbacks": state.rollbacks,
            **measured,
            **_speed(trainer, measured["images_per_s"]),
        }
    )


def _speed(trainer: Trainer, images_per_s: float) -> dict[str, float]:
    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else None
    bf16 = use_bf16(trainer.train, trainer.device)
    return utilization(images_per_s, trainer.flops, trainer.rank.count, name, bf16)


def _agree_to_stop(rank: Rank, control: Any) -> bool:
    """Whether any rank was asked to stop; every rank gets the same answer at the same step."""
    asked = torch.tensor(int(rank.stop_requested()))
    dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=control)
    return bool(asked.item())


def _go_back(trainer: Trainer, trouble: TrainState) -> TrainState:
    found = None
    if nonfinite_recovery.may_go_back(trouble):
        found = save_load.load(trainer.engine, trainer.averages, trainer.checkpoints, trainer.recipe)
    state = nonfinite_recovery.continued(trouble, found, trainer.setback)
    if trainer.log:
        trainer.log.forget_after(state.step)
        trainer.log.status(state, now=True)
    return state


def _heartbeat(trainer: Trainer, at: str) -> None:
    if trainer.watch:
        trainer.watch.beat(at)


def _save_snapshot(trainer: Trainer, state: TrainState) -> None:
    names = [power_name(width) for width in trainer.train.ema_power_widths]
    parts = {name: trainer.averages.shards[name] for name in names}
    save_load.save_parts(trainer.engine, parts, state, trainer.snapshots, trainer.recipe)


def _save(trainer: Trainer, state: TrainState, hurried: bool) -> None:
    """Save a checkpoint; with the held-out loss unless somebody waits for the end."""
    if trainer.held_out and not hurried:
        _heartbeat(trainer, f"the held-out loss of step {state.step}")
        loss = trainer.held_out.loss(trainer.engine, trainer.objective, trainer.conditional, trainer.device)
        state = state.model_copy(update={"held_out_loss": loss})
        if trainer.log:
            trainer.log.held_out_line({"step": state.step, "images_seen": state.images_seen, "loss": loss})
    _heartbeat(trainer, f"saving step {state.step}")
    save_load.save(trainer.engine, trainer.averages, state, trainer.checkpoints, trainer.recipe)
    if trainer.log:
        trainer.log.facts["last_checkpoint"] = save_load.directory_name(state)
        trainer.log.status(state, now=True)
