"""Order of saves in the training loop, with everything that needs a process replaced."""

from contextlib import suppress
from types import SimpleNamespace

from fm_core.checkpoint.train_state import TrainState
from fm_core.config import TrainSection
from fm_core.training import loop, nonfinite_recovery

BATCH = 4


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
    monkeypatch.setattr(loop, "_agree_to_stop", lambda *facts: False)
    monkeypatch.setattr(nonfinite_recovery, "check_skipped_steps", lambda *facts: None)
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda trainer, state, scheduled, last: saved("checkpoint", state)
    )
    monkeypatch.setattr(loop, "save_snapshot", lambda trainer, state, last: saved("snapshot", state))
    trainer = SimpleNamespace(
        train=train, engine=None, device=None, control=None, log=None, snapshot_missing=False
    )
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
