"""The log of a training run on a disk that is full, slow, or temporarily unmounted."""

import errno
import os
import time
from pathlib import Path

import pytest

from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import LeaseLostError
from fm_core.run.fence import LeaseFence
from fm_core.run.lease import Lease
from fm_core.run.status import read_status
from fm_core.storage import atomic_files
from fm_core.storage.atomic_files import append_line, read_lines
from fm_core.training import train_log
from fm_core.training.train_log import TrainLog, set_lines_aside


def line(step):
    return {"step": step, "loss": 0.1 * step, "lr": 1e-3, "images_per_s": 5.0}


@pytest.fixture
def log(tmp_path) -> TrainLog:
    return TrainLog(tmp_path, tmp_path / "train" / "metrics.jsonl", "a1", 100)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EROFS])
def test_lines_that_cannot_be_written_are_kept_reported_once_and_written_in_order(
    log, monkeypatch, caplog, number
):
    log.line(line(1))
    with monkeypatch.context() as patch:
        patch.setattr(train_log, "append_line", failing(number))
        for step in (2, 3):
            log.line(line(step))
        log.validation_line({"step": 3, "loss": 0.5})
        with pytest.raises(OSError, match="injected"):
            log.sync()
    assert len(caplog.messages) == 1
    assert "cannot write metrics" in caplog.messages[0]
    log.line(line(4))
    assert [record["step"] for record in read_lines(log.metrics)] == [1, 2, 3, 4]
    assert [record["step"] for record in read_lines(log.validation)] == [3]


def failing(number):
    def fail(*arguments, **options):
        raise OSError(number, "injected")

    return fail


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"step": 1})
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        try:
            append_line(path, {"step": 2, "more": "x" * 100})
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_text() == '{"step": 1}\n'


def test_a_status_that_cannot_be_written_stops_nothing(log, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(train_log, "write_status", failing(errno.ESTALE))
        for step in (1, 2):
            log.status(TrainState(step=step), now=True)
    assert len(caplog.messages) == 1
    log.status(TrainState(step=3), now=True)
    assert read_status(log.directory)["step"] == 3


def test_a_status_is_written_at_most_once_in_a_few_seconds(log, monkeypatch):
    now, written = [100.0], []
    monkeypatch.setattr(train_log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train_log, "write_status", lambda *facts, step, **more: written.append(step))
    for step in range(20):
        log.status(TrainState(step=step))
        now[0] += 0.5
    assert written == [0, 6, 12, 18]


def test_nothing_is_written_to_a_run_directory_that_is_not_mounted(tmp_path):
    run = tmp_path / "run"
    landmark = run / "train" / "history.json"
    landmark.parent.mkdir(parents=True)
    landmark.touch()
    log = TrainLog(run, run / "train" / "metrics.jsonl", "a1", 100, landmark=landmark)
    log.line(line(1))
    run.rename(tmp_path / "unmounted")
    run.mkdir()
    log.line(line(2))
    log.status(TrainState(step=2), now=True)
    assert list(run.iterdir()) == []
    run.rmdir()
    (tmp_path / "unmounted").rename(run)
    log.line(line(3))
    assert [record["step"] for record in read_lines(log.metrics)] == [1, 2, 3]


def test_nothing_is_written_to_the_run_of_a_successor_however_long_the_machine_was_paused(
    tmp_path, monkeypatch
):
    lease = Lease(tmp_path / "lock")
    epoch = lease.take(os.getpid(), job="a1", stage="train")
    log = TrainLog(tmp_path, tmp_path / "metrics.jsonl", "a1", 100, fence=LeaseFence(lease, "a1", epoch))
    log.line(line(1))
    log.status(TrainState(step=1), now=True)
    lease.take_for("elsewhere", job="b2", stage="train")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    wall = time.time() + 60  # a paused machine's monotonic clock may stand still
    monkeypatch.setattr(train_log.time, "time", lambda: wall)
    with pytest.raises(LeaseLostError, match="elsewhere"):
        log.line(line(2))
    with pytest.raises(LeaseLostError, match="elsewhere"):
        log.status(TrainState(step=2), now=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lines_are_on_the_disk_before_the_checkpoint_that_covers_them(log, monkeypatch):
    synced = []
    monkeypatch.setattr(train_log, "sync", lambda path: synced.append(Path(path).name))
    log.line(line(1))
    log.validation_line({"step": 1, "loss": 0.5})
    log.sync()
    assert synced == ["metrics.jsonl", "held_out.jsonl", "train"]


def test_lines_are_set_aside_durably_before_the_file_is_rewritten(tmp_path, monkeypatch):
    path, events = tmp_path / "metrics.jsonl", []
    for step in (1, 2, 3):
        append_line(path, {"step": step})

    def killed(target, content):
        events.append(Path(target).name)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_log, "flush", lambda file: events.append(Path(file.name).name))
    with monkeypatch.context() as patch:
        patch.setattr(train_log, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            set_lines_aside(path, 1)
    assert events == ["metrics.set-aside.jsonl", "metrics.jsonl"]
    set_lines_aside(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    # They were there already.
    assert (tmp_path / "metrics.set-aside.jsonl").read_text() == '{"step": 2}\n{"step": 3}\n'
    assert atomic_files.read_lines(path) == [{"step": 1}]


def test_lines_are_not_set_aside_in_a_run_directory_that_is_not_mounted(tmp_path):
    run = tmp_path / "run"
    landmark = run / "train" / "history.json"
    landmark.parent.mkdir(parents=True)
    landmark.touch()
    log = TrainLog(run, run / "train" / "metrics.jsonl", "a1", 100, landmark=landmark)
    for step in (1, 2, 3):
        log.line(line(step))
    run.rename(tmp_path / "unmounted")
    with pytest.raises(OSError, match="run directory is mounted"):
        log.forget_after(1)
    (tmp_path / "unmounted").rename(run)
    log.forget_after(1)
    log.line(line(2))
    assert [record["step"] for record in read_lines(log.metrics)] == [1, 2]


def test_a_line_whose_file_could_not_be_closed_is_there_once(log, monkeypatch):
    append = train_log.append_line

    def append_and_fail(path, record):
        append(path, record)
        raise OSError(5, "Input/output error")  # of close

    log.line(line(1))
    with monkeypatch.context() as patch:
        patch.setattr(train_log, "append_line", append_and_fail)
        log.line(line(2))
    log.line(line(3))
    log.line(line(3))  # an equal line is not one that was written by a failed attempt
    assert [record["step"] for record in read_lines(log.metrics)] == [1, 2, 3, 3]
