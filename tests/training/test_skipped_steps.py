"""When it is time to go back because no step is applied; test_engine.py has the real ones."""

import pytest

from fm_core.config import TrainSection
from fm_core.training.setback import NothingApplied, check, interval_steps
from fm_core.training.state import TrainState


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
def test_it_is_time_after_the_limit_or_a_whole_interval_of_several_steps(skipped, logged, raises):
    train = TrainSection(global_batch=12, log_images=24, skipped_limit=3)
    state = TrainState(step=4, images_seen=48, position=48, skipped_in_a_row=skipped)
    if raises:
        with pytest.raises(NothingApplied, match=f"{skipped} steps in a row, the last of them step 4"):
            check(train, state, logged)
    else:
        check(train, state, logged)
