"""Recovery from non-finite gradients, without processes; test_engine.py has the real ones."""

import pytest

from fm_core.checkpoint.train_state import TrainState
from fm_core.config import RunConfig, TrainSection
from fm_core.errors import NonFiniteGradientsError, UnrecoverableError
from fm_core.run.directory import identity
from fm_core.storage.atomic_files import read_json
from fm_core.training import nonfinite_recovery
from fm_core.training.nonfinite_recovery import (
    check_skipped_steps,
    clear_rollback,
    interval_steps,
    restore_rollback,
    roll_back,
)


@pytest.mark.parametrize(
    ("batch", "every", "seen", "steps"),
    [
        (12, 24, 24, 2),
        (12, 24, 48, 2),
        (12, 30, 36, 3),
        (12, 30, 60, 2),
        (12, 30, 96, 3),
        (12, 24, 36, 1),
        (12, 1, 120, 1),
        (12, 1000, 60, 5),
    ],
)
def test_the_steps_of_a_logging_interval_are_a_function_of_progress(batch, every, seen, steps):
    train = TrainSection(global_batch=batch, log_images=every)
    assert interval_steps(train, seen) == steps


@pytest.mark.parametrize(
    ("skipped", "logged", "raises"),
    [(3, False, True), (2, False, False), (2, True, True), (1, True, False), (0, True, False)],
)
def test_recovery_starts_after_the_limit_or_a_full_interval_of_several_steps(skipped, logged, raises):
    train = TrainSection(global_batch=12, log_images=24, skipped_limit=3)
    state = TrainState(step=4, images_seen=48, position=48, skipped_in_a_row=skipped)
    if raises:
        with pytest.raises(
            NonFiniteGradientsError, match=f"{skipped} steps in a row, the last of them step 4"
        ):
            check_skipped_steps(train, state, logged)
    else:
        check_skipped_steps(train, state, logged)


def state_at(step, skipped=0, **facts):
    """A state whose position is ahead of its images by `ahead` steps."""
    ahead = facts.pop("ahead", 0)
    return TrainState(
        step=step,
        applied_steps=step - skipped,
        images_seen=step * 12,
        position=(step + ahead) * 12,
        **facts,
    )


def went_on(state, step, skipped=0):
    """The same some steps later, of which this many were skipped."""
    moved = step - state.step
    return state.model_copy(
        update={
            "step": step,
            "applied_steps": state.applied_steps + moved - skipped,
            "position": state.position + moved * 12,
            "skipped_in_a_row": skipped,
        }
    )


def test_trouble_at_the_same_place_ends_training_with_advice_that_can_be_followed(tmp_path):
    back = roll_back(state_at(50, skipped=8, skipped_in_a_row=8), state_at(40), tmp_path / "setback.json")
    assert (back.step, back.position, back.rollbacks) == (40, 50 * 12, 1)
    with pytest.raises(UnrecoverableError, match="already rolled back once") as caught:
        roll_back(went_on(back, 48, skipped=8), state_at(40), None)
    message = str(caught.value)
    assert "another run.name with train.init_from = this run and a lower train.learning_rate" in message
    # The learning rate of an existing run cannot be changed.
    assert "learning_rate" in identity(RunConfig())["train"]


def test_after_a_checkpoint_of_clean_steps_training_may_go_back_again(tmp_path):
    record = tmp_path / "setback.json"
    back = roll_back(state_at(50, skipped=8), state_at(40), record)
    # One of these steps was skipped: not yet.
    saved = clear_rollback(went_on(back, 60, skipped=1))
    with pytest.raises(UnrecoverableError):
        roll_back(went_on(saved, 68, skipped=8), saved, None)
    saved = clear_rollback(went_on(saved, 80))
    again = roll_back(went_on(saved, 88, skipped=8), saved, record)
    assert (again.step, again.rollbacks) == (80, 2)
    assert again.position == saved.position + 8 * 12
    assert read_json(record)["rollbacks"] == 2
    with pytest.raises(UnrecoverableError):
        roll_back(went_on(again, 88, skipped=8), saved, None)


def test_a_run_that_was_killed_after_going_back_goes_on_in_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite_recovery.dist, "broadcast_object_list", lambda objects, src: None)
    record = tmp_path / "setback.json"
    checkpoint = state_at(40)
    assert restore_rollback(checkpoint, record) == checkpoint
    back = roll_back(state_at(50, skipped=8), checkpoint, record)
    assert restore_rollback(checkpoint, record) == back
    # The same step, reached again after another rollback, is past it.
    later = checkpoint.model_copy(update={"rollbacks": 1, "position": 7_777})
    assert restore_rollback(later, record) == later
    second = roll_back(clear_rollback(went_on(back, 60)), clear_rollback(went_on(back, 60)), record)
    assert restore_rollback(clear_rollback(went_on(back, 60)), record) == second
