"""Errors of side work: logged once, never raised."""

import logging
from contextlib import contextmanager

import pytest

from fm_core.errors import StopRequested, UnreachableError, UserError
from fm_core.run.best_effort import BestEffort


def raising(error: BaseException):
    def work():
        raise error

    return work


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("x"), SystemExit(1)])
def test_an_error_is_logged_once_until_it_worked_again(caplog, error: BaseException):
    effort = BestEffort()
    with caplog.at_level(logging.WARNING, "fm_core"):
        assert [effort.call("read it", raising(error), 3) for _ in range(3)] == [3, 3, 3]
        assert len(caplog.records) == 1
        assert caplog.records[0].getMessage().startswith(f"cannot read it ({type(error).__name__}: ")
        assert effort.call("read it", lambda: 5, 3) == 5
        effort.call("read it", raising(error), 3)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("error", [StopRequested("now"), KeyboardInterrupt()])
def test_requests_to_stop_pass_through(error: BaseException):
    effort = BestEffort()
    for attempt in (
        lambda: effort.call("do it", raising(error), None),
        lambda: effort.retry("x", raising(error)),
    ):
        with pytest.raises(type(error)):
            attempt()


@pytest.mark.parametrize(
    ("error", "pauses"),
    [
        (OSError(116, "Stale file handle"), [1.0, 2.0]),
        (UnreachableError("s3://bucket"), [1.0, 2.0]),
        (UserError("train.images: is wrong"), []),
    ],
)
def test_what_may_be_over_soon_is_tried_again_and_what_the_user_must_fix_is_not(error, pauses: list[float]):
    slept: list[float] = []
    with pytest.raises(type(error)):
        BestEffort(slept.append).retry("do it", raising(error), (1.0, 2.0))
    assert slept == pauses


def test_a_context_that_fails_at_its_start_or_end_does_not_disturb_the_block():
    events: list[str] = []

    @contextmanager
    def context(where: str):
        if where == "start":
            raise OSError(11, "no process can start")
        yield
        raise OSError(5, "Input/output error")

    for where in ("start", "end"):
        with BestEffort().context("scoring", context(where)):
            events.append(where)
    assert events == ["start", "end"]


def test_the_error_of_the_block_itself_is_raised():
    closed: list[bool] = []

    @contextmanager
    def context():
        try:
            yield
        finally:
            closed.append(True)

    with pytest.raises(ZeroDivisionError), BestEffort().context("scoring", context()):
        raise ZeroDivisionError
    assert closed
