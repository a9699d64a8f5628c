"""Checkpoints that cannot be written, in the real save with one rank: training continues and reports it."""

import errno
import logging
import os
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fm_core.checkpoint import format as checkpoint_format
from fm_core.checkpoint import weights_file
from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.checkpoint_saver import CheckpointSaver
from fm_core.checkpoint.format import RAW, complete_steps
from fm_core.checkpoint.retention import Retention
from fm_core.checkpoint.tensor_layout import Fragment
from fm_core.checkpoint.train_state import TrainState
from fm_core.errors import LeaseLostError, UnreachableError, UserError
from fm_core.run.status import read_status
from fm_core.storage.atomic_files import read_lines
from fm_core.training.saving import finish_saves, load_checkpoint, save_checkpoint, save_snapshot
from fm_core.training.train_log import TrainLog
from fm_core.training.trainer import Trainer

RECIPE = {"model": {"channels": 8}}


class OneTensor:
    """A state of one tensor."""

    parts = (RAW, "ema-0.9")

    def __init__(self):
        self.value = torch.zeros(4)

    @property
    def shapes(self):
        return {"a": tuple(self.value.shape)}

    def fragments(self):
        return [Fragment("a", 0, self.value.numel(), 0, 0)]

    def shards(self, part):
        return [self.value]

    def scatter(self, part, read):
        self.value = read("a")

    def set_applied_steps(self, steps):
        pass


class Watchdog:
    """Records its heartbeats."""

    def __init__(self):
        self.heartbeats = []

    def heartbeat(self, at, patience=1):
        self.heartbeats.append((at, patience))

    def progress(self, at):
        self.heartbeats.append(at)


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class FakeTrainer(Trainer):
    """A trainer with only the parts that saving needs."""

    sharded = None

    def __init__(self, folder):
        self.sharded, self.watchdog, self.validation, self.completed = OneTensor(), Watchdog(), None, None
        self.checkpoints = CheckpointCatalog(str(folder / "checkpoints"), folder / "none", Retention(3))
        self.recipe = RECIPE
        self.log = TrainLog(folder, folder / "metrics.jsonl", "a1", 100)
        self.engine = self.objective = self.device = None
        self.conditional, self.saver, self.snapshots = False, CheckpointSaver(), None

    def save(self, step, last=False, scheduled=True):
        self.log.line({"step": step, "loss": 0.5, "lr": 1e-3, "images_per_s": 5.0})
        self.sharded.value = torch.full((4,), float(step))
        save_checkpoint(self, TrainState(step=step, images_seen=step), scheduled, last)
        finish_saves(self)


@pytest.fixture
def trainer(group, tmp_path):
    return FakeTrainer(tmp_path)


def failing(number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


PLACES = {
    "writing": (weights_file, "write_chunks"),
    "syncing": (checkpoint_format, "sync"),
    "the record": (checkpoint_format, "write_json"),
    "the directory": (os, "mkdir"),
    "the rename": (os, "rename"),
}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EROFS])
@pytest.mark.parametrize("place", PLACES)
def test_training_goes_on_loudly_and_the_next_interval_tries_again(
    trainer, tmp_path, monkeypatch, caplog, place, number
):
    trainer.save(10)
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[place], failing(number))
        trainer.save(20)
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1
    assert os.strerror(number) in caplog.text
    assert complete_steps(tmp_path / "checkpoints") == [10]
    trainer.log.status(TrainState(step=25), now=True)
    status = read_status(tmp_path)
    assert os.strerror(number) in status["checkpoint_problem"]
    assert status["message"].endswith("the last checkpoint could not be written")
    trainer.save(30)
    assert complete_steps(tmp_path / "checkpoints") == [10, 30]
    assert "checkpoint_problem" not in read_status(tmp_path)
    assert [line["step"] for line in read_lines(trainer.log.metrics)] == [10, 20, 30]
    assert not list((tmp_path / "checkpoints").glob(".writing*"))


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, UnreachableError), (errno.EACCES, UserError)])
def test_at_its_end_or_a_stop_a_run_reports_that_it_could_not_be_saved(trainer, monkeypatch, number, kind):
    monkeypatch.setattr(weights_file, "write_chunks", failing(number))
    with pytest.raises(UserError, match=r"cannot write checkpoint .*step-00000010") as caught:
        trainer.save(10, last=True)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_metrics_that_are_not_on_the_disk_make_no_checkpoint_valid(trainer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fm_core.training.train_log.sync", failing(errno.EIO))
        trainer.save(10)
    assert complete_steps(tmp_path / "checkpoints") == []
    trainer.save(20)
    assert complete_steps(tmp_path / "checkpoints") == [20]


def test_every_piece_and_file_is_progress_of_a_rank_that_waits(trainer, monkeypatch):
    seen, progress, forwarded = [], trainer.saver._progress, threading.Event()
    trainer.saver._progress = lambda at: (seen.append(at), progress(at))
    trainer.watchdog.progress = lambda at: forwarded.set()
    write = weights_file.write_chunks

    def write_when_forwarded(file, content, progress):
        progress(f"writing {file.name}")
        assert forwarded.wait(60)
        write(file, content, progress)

    monkeypatch.setattr(weights_file, "write_chunks", write_when_forwarded)
    trainer.save(10)
    assert all(patience > 1 for _, patience in trainer.watchdog.heartbeats)
    assert [at for at in seen if "gathering" in at] == ["gathering raw", "gathering ema-0.9"]
    for what in ("writing", "hashing"):
        for file in ("raw.safetensors", "ema-0.9.safetensors", "state.json"):
            if (what, file) != ("writing", "state.json"):
                assert any(what in at and file in at for at in seen), (what, file)


def test_training_goes_on_while_a_checkpoint_is_written(trainer, tmp_path, monkeypatch):
    begun, released = threading.Event(), threading.Event()
    write = weights_file.write_chunks

    def write_later(*arguments):
        begun.set()
        assert released.wait(60)
        write(*arguments)

    monkeypatch.setattr(weights_file, "write_chunks", write_later)
    trainer.sharded.value.fill_(10.0)
    save_checkpoint(trainer, TrainState(step=10), scheduled=True, last=False)
    assert begun.wait(60)
    assert trainer.saver.busy
    trainer.sharded.value.fill_(11.0)
    assert complete_steps(tmp_path / "checkpoints") == []
    released.set()
    finish_saves(trainer)
    assert load_checkpoint(trainer).step == 10
    assert trainer.sharded.value.tolist() == [10.0] * 4


def test_the_next_save_waits_for_the_one_before(trainer, tmp_path):
    for step, complete in ((10, []), (20, [10]), (30, [10, 20])):
        trainer.sharded.value = torch.full((4,), float(step))
        save_checkpoint(trainer, TrainState(step=step), scheduled=True, last=step == 30)
        assert set(complete_steps(tmp_path / "checkpoints")) >= set(complete)
    assert trainer.saver.step is None
    assert complete_steps(tmp_path / "checkpoints") == [10, 20, 30]


def add_snapshots(trainer):
    trainer.train = SimpleNamespace(ema_power_widths=(0.1,))
    trainer.sharded.parts = (*OneTensor.parts, "ema-power-0.1")
    trainer.snapshots = trainer.checkpoints.snapshots()


def test_a_snapshot_that_fails_at_the_end_makes_no_checkpoint_valid(trainer, tmp_path, monkeypatch):
    """Otherwise the next start would find training complete and never write the snapshot."""
    add_snapshots(trainer)
    trainer.save(10)
    monkeypatch.setattr(trainer.snapshots, "begin", failing(errno.ENOSPC))
    save_snapshot(trainer, TrainState(step=20), last=True)
    with pytest.raises(UnreachableError):
        save_checkpoint(trainer, TrainState(step=20), scheduled=True, last=True)
    assert complete_steps(tmp_path / "checkpoints") == [10]
    assert trainer.snapshot_missing


def test_a_snapshot_that_fails_before_the_end_costs_no_checkpoint(trainer, tmp_path, monkeypatch):
    add_snapshots(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.snapshots, "begin", failing(errno.ENOSPC))
        save_snapshot(trainer, TrainState(step=20), last=False)
        trainer.save(20, last=True)  # at a stop
    assert trainer.snapshot_missing
    assert complete_steps(tmp_path / "checkpoints") == [20]
    save_snapshot(trainer, TrainState(step=30), last=False)
    trainer.save(30)
    assert not trainer.snapshot_missing
    assert complete_steps(tmp_path / "checkpoints" / "snapshots") == [30]


def test_a_writer_that_fails_unexpectedly_ends_the_rank(trainer, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(weights_file, "write_chunks", broken)
    with pytest.raises(RuntimeError, match="the thread that writes checkpoints has failed") as caught:
        trainer.save(10)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_lost_lease_ends_the_job_without_another_write(trainer, tmp_path):
    class Lost:
        job, epoch, left = "a1", 1, 2

        def check(self):
            self.left -= 1
            if self.left < 0:
                raise LeaseLostError("another job has taken over")

    trainer.save(10)
    trainer.checkpoints.access.fence = Lost()
    with pytest.raises(LeaseLostError):
        trainer.save(20)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    with pytest.raises(LeaseLostError):
        trainer.save(30)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")} == left
    assert complete_steps(tmp_path / "checkpoints")[0] == 10


@pytest.mark.parametrize(("scheduled", "measured"), [(True, [10]), (False, [])])
def test_a_stop_on_a_scheduled_step_keeps_its_validation_loss(trainer, scheduled, measured):
    trainer.validation = SimpleNamespace(loss=lambda *facts: 0.25)
    trainer.save(10, last=True, scheduled=scheduled)
    assert [line["step"] for line in read_lines(trainer.log.validation)] == measured
    state = load_checkpoint(trainer)
    assert state.held_out_loss == (0.25 if scheduled else None)


def test_a_run_that_had_a_checkpoint_never_begins_again(trainer, tmp_path):
    assert load_checkpoint(trainer) is None
    trainer.save(10)
    (tmp_path / "checkpoints").rename(tmp_path / "unmounted")
    with pytest.raises(UnreachableError, match="this run has completed step-00000010: check that the disk"):
        load_checkpoint(trainer)
    (tmp_path / "unmounted").rename(tmp_path / "checkpoints")
    assert load_checkpoint(trainer).step == 10


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(trainer, tmp_path, monkeypatch):
    trainer.save(10)
    trainer.save(20)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_format, "sha256_stream", failing(errno.EIO))
        with pytest.raises(UnreachableError):
            load_checkpoint(trainer)
    assert load_checkpoint(trainer).step == 20
    assert complete_steps(tmp_path / "checkpoints") == [10, 20]
