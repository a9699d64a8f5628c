"""Training loop: steps, logging, validation, checkpoints, stop requests and rollbacks."""

import logging
import time
from collections.abc import Callable

import torch

from fm_core.checkpoint.train_state import TrainState
from fm_core.data.batches import Batches
from fm_core.errors import NonFiniteGradientsError, StopRequested
from fm_core.training import nonfinite_recovery
from fm_core.training.batch_source import ambient_seed, seed_generators
from fm_core.training.engine import micro_batch_of, network_for, set_learning_rate, use_bf16
from fm_core.training.lr_schedule import crossed, learning_rate
from fm_core.training.metrics import MetricAccumulator
from fm_core.training.mfu import utilization
from fm_core.training.saving import (
    finish_saves,
    load_checkpoint,
    save_checkpoint,
    save_snapshot,
    take_saves,
)
from fm_core.training.step_agreement import StepAgreement
from fm_core.training.trainer import Trainer

LOG = logging.getLogger(__name__)


def run(trainer: Trainer, state: TrainState) -> TrainState:
    """Train from `state` until train.images images were seen.

    Raises:
        StopRequested: training was asked to stop; a checkpoint was saved.
        UnreachableError: the last checkpoint, or that of a stop, could not be written.
        LeaseLostError: another job has taken over the run.
        UnrecoverableError: gradients are not finite, and a rollback to a checkpoint has not helped.
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
    agreement = StepAgreement(trainer.rank, lambda: trainer.saver.busy, trainer.control)
    while state.images_seen < train.images:
        rate = learning_rate(train, state.images_seen)
        set_learning_rate(trainer.engine, rate)
        for left in reversed(range(accumulated)):
            before_backward = agreement.start if left == 0 else None
            _micro_step(trainer, batches, interval, state.step + 1, before_backward)
        state = _after_step(trainer, state, interval)
        ended = state.images_seen >= train.images
        logged = ended or crossed(train.log_images, state.images_seen, train.global_batch)
        nonfinite_recovery.check_skipped_steps(train, state, logged)
        if logged:
            _write_line(trainer, state, interval, rate)
            interval = MetricAccumulator(trainer.device, trainer.objective.interval)
        stop, writing = agreement.result()
        if trainer.saver.step is not None and not writing:
            take_saves(trainer)
        scheduled = ended or crossed(train.checkpoint_images, state.images_seen, train.global_batch)
        every = train.snapshot_images
        if every and (
            ended
            or crossed(every, state.images_seen, train.global_batch)
            or (trainer.snapshot_missing and scheduled)
        ):
            # Before the checkpoint, because a run that resumes from it does not reach this point again.
            save_snapshot(trainer, state, last=ended)
        if stop or scheduled:
            # A stop may come after one or two steps, which are too few to count as recovered.
            state = state if stop else nonfinite_recovery.clear_rollback(state)
            sums = interval.gathered(trainer.control)
            saved = state.model_copy(update={"interval_sums": sums})
            save_checkpoint(trainer, saved, scheduled, last=stop or ended)
        if trainer.log:
            trainer.log.status(state)
        if stop and not ended:
            raise StopRequested(
                f"stopped at step {state.step} ({state.images_seen:,} images seen); run it again to continue"
            )
    return state


def _micro_step(
    trainer: Trainer,
    batches: Batches,
    interval: MetricAccumulator,
    step: int,
    before_backward: Callable[[], None] | None = None,
) -> None:
    trainer.heartbeat(f"the data of step {step}")
    waiting = time.monotonic()
    batch = next(batches)
    sample, label = trainer.source.draw(batch, trainer.device)
    interval.waited += time.monotonic() - waiting
    trainer.heartbeat(f"the forward pass of step {step}")
    # Dropout must also be a function of the position; otherwise a resumed run would differ.
    seed_generators(ambient_seed(trainer.source.seed, batch.first), trainer.device)
    network = network_for(trainer.objective, trainer.engine)
    losses = trainer.objective.loss(network, sample, label if trainer.conditional else None)
    if before_backward:
        before_backward()
    trainer.heartbeat(f"the backward pass and the update of step {step}")
    trainer.engine.backward(losses.mean())
    trainer.engine.step()
    interval.add(losses, sample.t)


def _after_step(trainer: Trainer, state: TrainState, interval: MetricAccumulator) -> TrainState:
    applied = bool(trainer.engine.was_step_applied())
    if applied:
        trainer.averages.update(state.applied_steps)
        if trainer.on_first_step:
            _bind(trainer, trainer.on_first_step)
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


def _bind(trainer: Trainer, bind: Callable[[], None]) -> None:
    """Bind the run to its configuration; if the write fails, it is retried after the next step.

    Raises LeaseLostError if another job has taken over the run, UserError if it is bound to another
    configuration.
    """
    try:
        trainer.rank.fence.check()
        bind()
    except OSError as error:
        if not trainer.binding_failed:
            LOG.warning("cannot write config.yaml (%s); retrying after each step", error)
        trainer.binding_failed = True
        return
    trainer.on_first_step, trainer.binding_failed = None, False


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
            # Before clipping; not finite, and therefore absent, if the last step was skipped.
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
    extra = trainer.objective.extra_forwards
    return utilization(images_per_s, trainer.flops, trainer.rank.count, name, bf16, extra)


def _roll_back(trainer: Trainer, failed: TrainState) -> TrainState:
    finish_saves(trainer)
    checkpoint = None
    if nonfinite_recovery.may_roll_back(failed):
        checkpoint = load_checkpoint(trainer)
    state = nonfinite_recovery.roll_back(failed, checkpoint, trainer.rollback_record)
    if trainer.log:
        trainer.log.forget_after(state.step)
        trainer.log.status(state, now=True)
    return state
