"""STOP files: handled once, also those that were created while nothing ran."""

import os
from pathlib import Path

import pytest

from fm_core.errors import StopRequested
from fm_core.run.lease import Lease
from fm_core.run.stop_file import (
    mark_stop_handled,
    own_directories,
    pending_request,
    refuse_pending_request,
    request_stop,
    was_stopped,
)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A control directory and its run directory."""
    control = tmp_path / "samples" / "key"
    control.mkdir(parents=True)
    return control, tmp_path


@pytest.mark.parametrize("number", [0, 1])
def test_a_request_while_nothing_ran_ends_the_next_start_and_only_that(places, number: int):
    (places[number] / "STOP").touch()
    with pytest.raises(
        StopRequested, match="STOP was created while nothing was running: this start ends and"
    ):
        refuse_pending_request(*places)
    assert was_stopped(places[0])
    assert pending_request(*places) is None
    refuse_pending_request(*places)
    assert not was_stopped(places[0])


def test_a_request_that_was_handled_does_not_end_the_next_start(places):
    assert request_stop(places[0])
    (places[1] / "STOP").touch()
    mark_stop_handled(*places)
    assert pending_request(*places) is None
    assert was_stopped(places[0])
    refuse_pending_request(*places)


@pytest.mark.parametrize(("asked", "handled"), [(100.0, True), (102.0, False)])
def test_a_request_is_spent_by_a_job_that_stopped_after_it(places, asked: float, handled: bool):
    """Even if its supervisor was killed and could not say so."""
    (places[1] / "STOP").touch()
    os.utime(places[1] / "STOP", (asked, asked))
    if handled:
        refuse_pending_request(*places, handled_at={places[1]: 101.0})
        assert pending_request(*places) is None
    else:
        with pytest.raises(StopRequested):
            refuse_pending_request(*places, handled_at={places[1]: 101.0})


@pytest.mark.parametrize("held", [True, False])
def test_a_request_is_left_to_the_job_that_holds_the_run(places, held: bool):
    """Sampling stops at it too, but only training removes it."""
    control, run = places
    lease = Lease(run / "lock")
    with lease.guard():
        lease.take(os.getpid(), job="training")
    if not held:
        lease.release(job="training")
    (run / "STOP").touch()
    if held:
        refuse_pending_request(*own_directories(control, run))
        mark_stop_handled(*own_directories(control, run))
        assert pending_request(run) == run / "STOP"
    else:
        with pytest.raises(StopRequested):
            refuse_pending_request(*own_directories(control, run))
        assert pending_request(run) is None
    assert own_directories(run, run) == (run,)


def test_a_directory_that_cannot_be_seen_holds_no_request(tmp_path: Path, monkeypatch):
    def stale(*_: object, **__: object) -> None:
        raise OSError(116, "Stale file handle")

    (tmp_path / "STOP").touch()
    monkeypatch.setattr(Path, "stat", stale)
    assert pending_request(tmp_path) is None
    monkeypatch.setattr(Path, "touch", stale)
    assert not request_stop(tmp_path)
