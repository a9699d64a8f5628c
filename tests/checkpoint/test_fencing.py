"""A job that is frozen between a check of its lease and its next operation does not damage its successor.

A forked child is stopped by a real SIGSTOP right after its n-th check, for every n. A successor takes over,
continues, and removes old checkpoints. The child is then continued, performs its pending operation, and
detects the loss of its lease at its next check.
"""

import os
import signal
import sys

import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import recorded_origin, stored_origin, stored_steps, verify
from fm_core.checkpoint.ownership import RunIdentity, WriteAccess
from fm_core.checkpoint.retention import Retention, retain_remote
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.uploader import upload_checkpoint
from fm_core.errors import LeaseLostError
from fm_core.run.directory import step_name
from fm_core.storage.store import Store

RUN = RunIdentity("a" * 32, "run")
LOST, FAILED = 3, 9


class FileFence:
    """A lease as a file with the epoch of its holder; stops its process after the n-th check."""

    def __init__(self, file, epoch, stop_after=None):
        self.job, self.epoch, self.file, self.left = f"job-{epoch}", epoch, file, stop_after

    def check(self):
        if int(self.file.read_text()) != self.epoch:
            raise LeaseLostError("another job has taken over")
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGSTOP)


def catalog(root, fence, retention=None):
    access = WriteAccess(Store.at(str(root / "checkpoints")), RUN, fence)
    return CheckpointCatalog(
        str(root / "checkpoints"), root / "none", retention or Retention(2), access=access
    )


def write(checkpoints, step):
    problem = checkpoints.begin(step)
    problem = problem or checkpoints.write(
        step, "raw", {"a": torch.full((3,), step + 0.1 * checkpoints.access.fence.epoch)}, {"recipe": "{}"}
    )
    assert (problem or checkpoints.finish(TrainState(step=step, images_seen=step * 10))) is None


def frozen(root, action, take_over):
    """Freeze a child in `action` after each of its checks in turn; yields root, successor's, exit code."""
    checks = 0
    while True:
        checks += 1
        place = root / str(checks)
        place.mkdir()
        (place / "epoch").write_text("1")
        child = os.fork()
        if child == 0:
            try:
                action(place, FileFence(place / "epoch", 1, checks))
            except LeaseLostError:
                os._exit(LOST)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(FAILED)
            os._exit(0)
        status = os.waitpid(child, os.WUNTRACED)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        (place / "epoch").write_text("2")
        expected = take_over(place)
        os.kill(child, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        yield place, expected, code
    assert checks > 6


def old_job(place, fence):
    """Steps 10 to 30 with retention; there is also a step 30 of a discarded branch."""
    checkpoints = catalog(place, fence)
    for step in (10, 20):
        write(checkpoints, step)
    (place / "checkpoints" / "step-00000030").mkdir()
    (place / "checkpoints" / "step-00000030" / "raw.safetensors").write_text("never completed")
    for step in (30, 40):
        write(checkpoints, step)


@pytest.mark.parametrize("steps", [(10, 20, 30, 40), (30, 40, 50), (40,)])
def test_nothing_of_the_successor_is_lost_locally(tmp_path, steps):
    def take_over(place):
        successor = catalog(place, FileFence(place / "epoch", 2))
        resumed = successor.newest()
        for step in steps:
            write(successor, step)
        mine = [path for path in (place / "checkpoints").glob("step-*") if is_of(path, 2)]
        assert mine
        return resumed, {path.name: (path / "COMPLETE").read_bytes() for path in mine}

    codes = set()
    for place, (_, expected), code in frozen(tmp_path, old_job, take_over):
        codes.add(code)
        directories = {name: place / "checkpoints" / name for name in expected}
        assert {name: (path / "COMPLETE").read_bytes() for name, path in directories.items()} == expected
        assert [verify(path) for path in directories.values()] == [None] * len(directories)
        # The successor goes on, and so does the next start.
        successor = catalog(place, FileFence(place / "epoch", 2))
        write(successor, 60)
        assert catalog(place, FileFence(place / "epoch", 2)).newest().name == "step-00000060"
        assert not list((place / "checkpoints").glob(".*"))
    # A job that is frozen at its last check has no later check to detect the loss.
    assert codes <= {LOST, 0}
    assert LOST in codes


def is_of(path, epoch):
    return recorded_origin(path).get("epoch") == epoch


def bucket(root):
    (root / "bucket").mkdir(exist_ok=True)
    filesystem = DirFileSystem(path=str(root / "bucket"), fs=LocalFileSystem(auto_mkdir=True))
    return Store(filesystem, "checkpoints", "dir://bucket/checkpoints", None)


def stage(root, step, fence):
    access = WriteAccess(Store.at(str(root / "staging")), RUN, fence)
    write(CheckpointCatalog(str(root / "staging"), root / "none", Retention(None), access=access), step)


def upload(root, fence, step):
    access = WriteAccess(bucket(root), RUN, fence)
    access.claim()
    upload_checkpoint(access.store, root / "staging", step, access)
    retain_remote(access.store, Retention(2), step, access)


class NoFence(FileFence):
    def check(self):
        pass


def steps_of(store, epoch):
    return [
        step for step in stored_steps(store) if stored_origin(store, step_name(step)).get("epoch") == epoch
    ]


def test_nothing_of_the_successor_is_lost_in_a_store(tmp_path):
    def old(place, fence):
        bucket(place).write_bytes("step-00000030/COMPLETE", b'{"schema": 1, "files": {}}')
        for step in (10, 20, 30, 40):
            stage(place, step, NoFence(None, 1))
            upload(place, fence, step)

    def take_over(place):
        fence = FileFence(place / "epoch", 2)
        other = place / "other-host"
        other.mkdir()
        # It resumes from the newest, and reaches the steps that the old job is writing.
        resumed = max(steps_of(bucket(place), 1), default=0)
        for step in (resumed + 10, resumed + 20):
            stage(other, step, fence)
            remote = WriteAccess(bucket(place), RUN, fence)
            remote.claim()
            upload_checkpoint(remote.store, other / "staging", step, remote)
            retain_remote(remote.store, Retention(2), step, remote)
        mine = steps_of(bucket(place), 2)
        assert mine
        return mine

    codes = set()
    for place, expected, code in frozen(tmp_path, old, take_over):
        codes.add(code)
        assert set(expected) <= set(stored_steps(bucket(place)))
        for step in expected:
            folder = place / "bucket" / "checkpoints" / step_name(step)
            assert verify(folder) is None
            assert recorded_origin(folder)["epoch"] == 2
    assert codes <= {LOST, 0}
    assert LOST in codes


def test_a_job_without_its_lease_writes_nothing(tmp_path):
    (tmp_path / "epoch").write_text("2")
    with pytest.raises(LeaseLostError):
        catalog(tmp_path, FileFence(tmp_path / "epoch", 1)).begin(10)
    assert not (tmp_path / "checkpoints").exists()


def test_complete_names_the_run_and_the_job_that_wrote_it(tmp_path):
    (tmp_path / "epoch").write_text("7")
    write(catalog(tmp_path, FileFence(tmp_path / "epoch", 7)), 10)
    origin = recorded_origin(tmp_path / "checkpoints" / "step-00000010")
    assert origin == {"run": {"id": "a" * 32, "name": "run"}, "job": "job-7", "epoch": 7}


def test_a_lease_that_cannot_be_read_does_not_hide_why_a_checkpoint_cannot_be_written(tmp_path):
    (tmp_path / "epoch").write_text("1")
    fence = FileFence(tmp_path / "epoch", 1)
    checkpoints = catalog(tmp_path, fence)
    write(checkpoints, 10)
    (tmp_path / "epoch").unlink()
    problem = checkpoints.begin(20)
    assert problem is not None
    assert problem.temporary
    assert str(tmp_path / "checkpoints" / step_name(20)) in problem.message
    (tmp_path / "epoch").write_text("2")
    with pytest.raises(LeaseLostError):
        checkpoints.begin(20)
