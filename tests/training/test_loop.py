"""Order of saves in the training loop, with everything that needs a process replaced."""

import errno
from contextlib import suppress
from types import SimpleNamespace

import pytest

from fm_core.checkpoint.train_state import TrainState
from fm_core.config import TrainSection
from fm_core.errors import LeaseLostError, UserError
from fm_core.training import loop, nonfinite_recovery

BATCH = 4


class Fence:
    """A fence whose lease may be lost."""

    lost = False

    def check(self):
        if self.lost:
            raise LeaseLostError("taken over")


def test_a_configuration_that_cannot_be_written_is_written_after_a_later_step(caplog):
    attempts = []

    def bind():
        attempts.append(len(attempts))
        if len(attempts) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    trainer = SimpleNamespace(rank=SimpleNamespace(fence=Fence()), on_first_step=bind, binding_failed=False)
    while trainer.on_first_step:
        loop._bind(trainer, trainer.on_first_step)
    assert attempts == [0, 1, 2]
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_a_job_that_was_replaced_does_not_bind_the_run_and_a_refusal_is_final():
    fence, bound = Fence(), []
    trainer = SimpleNamespace(rank=SimpleNamespace(fence=fence), on_first_step=None, binding_failed=False)
    with pytest.raises(UserError, match="another run"):
        loop._bind(trainer, lambda: (_ for _ in ()).throw(UserError("another run")))
    fence.lost = True
    with pytest.raises(LeaseLostError):
        loop._bind(trainer, lambda: bound.append(1))
    assert bound == []


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_between_checkpoint_and_snapshot_has_lost_neither(monkeypatch):
    """Killed after each save in turn and continued from the last checkpoint, all snapshots are there."""
    train = TrainSection(
        images=BATCH * 6,
        global_batch=BATCH,
        log_images=BATCH * 100,
        checkpoint_images=BATCH * 2,
        ema_power_widths=(0.1,),
        snapshot_images=BATCH * 2,
    )
    checkpoint, snapshots, saves = TrainState(), set(), []

    def saved(what, state):
        nonlocal checkpoint
        if what == "checkpoint":
            checkpoint = state
        else:
            snapshots.add(state.step)
        saves.append(what)
        raise Killed

    def after_step(trainer, state, interval):
        seen = state.images_seen + BATCH
        return state.model_copy(update={"step": state.step + 1, "images_seen": seen})

    interval = SimpleNamespace(restore=lambda *facts: None, gathered=lambda control: ())
    monkeypatch.setattr(loop, "MetricAccumulator", lambda *facts: interval)
    monkeypatch.setattr(loop, "set_learning_rate", lambda *facts: None)
    monkeypatch.setattr(loop, "_micro_step", lambda *facts: None)
    monkeypatch.setattr(loop, "_write_line", lambda *facts: None)
    monkeypatch.setattr(loop, "_after_step", after_step)
    agreement = SimpleNamespace(start=None, result=lambda: (False, False))
    monkeypatch.setattr(loop, "StepAgreement", lambda *facts: agreement)
    monkeypatch.setattr(nonfinite_recovery, "check_skipped_steps", lambda *facts: None)
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda trainer, state, scheduled, last: saved("checkpoint", state)
    )
    monkeypatch.setattr(loop, "save_snapshot", lambda trainer, state, last: saved("snapshot", state))
    trainer = SimpleNamespace(
        train=train, engine=None, device=None, control=None, log=None, snapshot_missing=False
    )
    trainer.saver = SimpleNamespace(step=None)
    trainer.objective, trainer.rank = SimpleNamespace(interval=(0, 1)), SimpleNamespace(number=0)
    for _ in range(12):
        with suppress(Killed):
            loop._steps(trainer, checkpoint, None, 1)
            break
        # An existing snapshot is overwritten at once, so the next kill comes at a later save.
        monkeypatch.setattr(
            loop,
            "save_snapshot",
            lambda trainer, state, last: state.step in snapshots or saved("snapshot", state),
        )
    assert checkpoint.step == 6
    assert snapshots == {2, 4, 6}
