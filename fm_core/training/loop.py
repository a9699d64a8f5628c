"""Training loop: steps, logging, validation, checkpoints, stop requests and rollbacks."""

import time
from collections.abc import Callable
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
from fm_core.run.directory import step_name
from fm_core.training import nonfinite_recovery
from fm_core.training.batch_source import BatchSource, ambient_seed, seed_generators
from fm_core.training.ema import ModelEMA, power_name
from fm_core.training.engine import micro_batch_of, network_for, set_learning_rate, use_bf16
from fm_core.training.hang_watchdog import HangWatchdog
from fm_core.training.lr_schedule import crossed, learning_rate
from fm_core.training.metrics import MetricAccumulator, TrainLog
from fm_core.training.mfu import utilization
from fm_core.training.validation_loss import ValidationLoss
from fm_core.training.zero_state import ZeroState


@dataclass
class Trainer:
    """Everything the loop works with, on one rank."""

    train: TrainSection
    engine: Any
    objective: Objective
    averages: ModelEMA
    source: BatchSource
    rank: Rank
    device: torch.device
    recipe: dict[str, Any]
    """What the weights belong to: network, method, data; recorded in every file of weights."""
    conditional: bool
    """Whether the network sees the labels."""
    flops: float
    """FLOPs of one forward pass for one image."""
    checkpoints: CheckpointCatalog | None
    """On rank 0 only."""
    log: TrainLog | None
    """On rank 0 only."""
    snapshots: CheckpointCatalog | None = None
    """On rank 0 only: snapshots of the power-function averages, all of which stay."""
    rollback_record: Path | None = None
    """On rank 0 only: the file that records a rollback."""
    validation: ValidationLoss | None = None
    """None if there are no validation images."""
    on_first_step: Callable[[], None] | None = None
    """On rank 0 only: called once, after the first step that was applied."""
    watchdog: HangWatchdog | None = None
    """None if ranks that hang are not detected."""
    step_start: float = field(default_factory=time.monotonic)
    """When the current step started."""
    control: Any = field(default_factory=lambda: dist.new_group(backend="gloo"))
    """Process group on the CPU, for what the ranks agree on besides tensors of the device."""

    @property
    def sharded(self) -> ZeroState:
        """The tensors that go into a checkpoint."""
        return ZeroState(self.engine, self.averages.shards)


def run(trainer: Trainer, state: TrainState) -> TrainState:
    """Train from `state` until train.images were seen.

    Raises:
        StopRequested: training was asked to stop; a checkpoint was saved.
        UnrecoverableError: steps cannot be applied and a rollback to a checkpoint has not helped.
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
        except NonFiniteGradientsError as error:
            state = _roll_back(trainer, error.state)


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
        nonfinite_recovery.check_skipped_steps(train, state, logged)
        if logged:
            _write_line(trainer, state, interval, rate)
            interval = MetricAccumulator(trainer.device, trainer.objective.interval)
        every = train.snapshot_images
        if every and (ended or crossed(every, state.images_seen, train.global_batch)):
            # Before the checkpoint: a run that resumes from it does not come by here again.
            _save_snapshot(trainer, state)
        stop = _agree_to_stop(trainer.rank, trainer.control)
        if stop or ended or crossed(train.checkpoint_images, state.images_seen, train.global_batch):
            # A stop may come after a step or two, which is too few to count as recovered.
            state = state if stop else nonfinite_recovery.clear_rollback(state)
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
    # Dropout, too, must be a function of the position, or a resumed run would differ.
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
        if trainer.on_first_step:
            trainer.on_first_step()
            trainer.on_first_step = None
    interval.images += trainer.train.global_batch
    now = time.monotonic()
    seconds, trainer.step_start = now - trainer.step_start, now
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
            # Before clipping; infinite, and therefore absent, if the last step was skipped.
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
    """Whether any rank was asked to stop; all ranks get the same answer at the same step."""
    asked = torch.tensor(int(rank.stop_requested()))
    dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=control)
    return bool(asked.item())


def _roll_back(trainer: Trainer, failed: TrainState) -> TrainState:
    checkpoint = None
    if nonfinite_recovery.may_roll_back(failed):
        checkpoint = save_load.load(trainer.sharded, trainer.checkpoints, trainer.recipe)
    state = nonfinite_recovery.roll_back(failed, checkpoint, trainer.rollback_record)
    if trainer.log:
        trainer.log.forget_after(state.step)
        trainer.log.status(state, now=True)
    return state


def _heartbeat(trainer: Trainer, at: str) -> None:
    if trainer.watchdog:
        trainer.watchdog.heartbeat(at)


def _save_snapshot(trainer: Trainer, state: TrainState) -> None:
    names = [power_name(width) for width in trainer.train.ema_power_widths]
    save_load.save(trainer.sharded, state, trainer.snapshots, trainer.recipe, parts=names)


def _save(trainer: Trainer, state: TrainState, hurried: bool) -> None:
    """Save a checkpoint, with the validation loss unless the save is hurried by a stop request."""
    if trainer.validation and not hurried:
        _heartbeat(trainer, f"the validation loss of step {state.step}")
        loss = trainer.validation.loss(trainer.engine, trainer.objective, trainer.conditional, trainer.device)
        state = state.model_copy(update={"held_out_loss": loss})
        if trainer.log:
            trainer.log.validation_line({"step": state.step, "images_seen": state.images_seen, "loss": loss})
    _heartbeat(trainer, f"saving step {state.step}")
    save_load.save(trainer.sharded, state, trainer.checkpoints, trainer.recipe)
    if trainer.log:
        trainer.log.facts["last_checkpoint"] = step_name(state.step)
        trainer.log.status(state, now=True)
