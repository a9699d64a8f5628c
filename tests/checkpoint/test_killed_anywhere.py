"""kill -9 before each change of the file system while checkpoints are written, copied and retired.

A forked child performs the operation with an audit hook, which Python calls before it opens, creates, renames
or removes anything, and which kills the child at the n-th of these calls; n increases until the child
survives. Writes to an open file, and copies by the kernel, trigger no such event: two functions are replaced
by ones that write half of the content, may be killed there, and then write all of it.
"""

import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file

from fm_core.checkpoint import weights_file
from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.checkpoint_saver import CheckpointSaver
from fm_core.checkpoint.format import complete_steps, verify
from fm_core.checkpoint.retention import Retention, retain_remote
from fm_core.checkpoint.tensor_layout import Fragment
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.uploader import upload_checkpoint
from fm_core.storage.store import Store

CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.link",
    "os.symlink",
    "os.truncate",
}
RELATIVE = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.rename": 2}
"""Index of the argument with the open folder that the path is relative to, or -1."""
WRITES = os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC
NAMES = ("raw", "optimizer/exp_avg", "ema-0.9")


def die_at(count, below):
    """From here on, be killed before the count-th change of a file below a folder."""
    passed = 0

    def change(path):
        nonlocal passed
        if str(path).startswith(str(below)):
            passed += 1
            if passed == count:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in CHANGES or (event == "open" and arguments[2] & WRITES):
            change(full_path(event, arguments))

    def halfway(path, content):
        Path(path).write_bytes(content[: len(content) // 2])
        change(path)

    def write_in_two(file, content, progress, write=weights_file.write_chunks):
        write(file, content[: len(content) // 2], progress)
        change(file.name)
        write(file, content[len(content) // 2 :], progress)

    def copy_in_two(source, target, copyfile=shutil.copyfile, **options):
        halfway(target, Path(source).read_bytes())
        return copyfile(source, target, **options)

    weights_file.write_chunks, shutil.copyfile = write_in_two, copy_in_two
    sys.addaudithook(hook)


def full_path(event, arguments):
    """What an event is about; rmtree names things from an open folder."""
    folder = arguments[RELATIVE[event]] if event in RELATIVE else -1
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    return path if folder == -1 else str(Path(f"/proc/self/fd/{folder}").readlink() / path)


def survives(action, count, below):
    """Whether a forked child completes an action; otherwise it was killed."""
    child = os.fork()
    if child == 0:
        try:
            die_at(count, below)
            action()
        except BaseException:
            os._exit(9)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the child failed without a kill"
    return os.WIFEXITED(status)


def write(checkpoints, step):
    tensors = {"a": torch.full((3,), float(step))}
    problem = checkpoints.begin(step)
    for name in NAMES:
        problem = problem or checkpoints.write(step, name, tensors, {"recipe": "{}"})
    problem = problem or checkpoints.finish(TrainState(step=step, images_seen=step * 10))
    assert problem is None


def local(root):
    return CheckpointCatalog(str(root / "checkpoints"), root / "staging", Retention(2))


def remote(root):
    """A store without atomic uploads: its files are visible while they are copied."""
    (root / "bucket").mkdir(exist_ok=True)
    filesystem = DirFileSystem(path=str(root / "bucket"), fs=LocalFileSystem(auto_mkdir=True))
    return Store(filesystem, "checkpoints", "dir://bucket/checkpoints", None)


class Waiting:
    """Uploads that are never started."""

    def catch_up(self, steps, newest=None):
        pass


def elsewhere(root, folder="elsewhere"):
    """The checkpoints as another host sees them, where nothing is staged."""
    checkpoints = CheckpointCatalog(str(root / "unused"), root / "none", Retention(2))
    checkpoints.store, checkpoints.folder, checkpoints.uploads = remote(root), root / folder, Waiting()
    return checkpoints


def test_a_local_save_with_retention_leaves_the_old_or_the_new_newest(tmp_path):
    kills = 0
    while True:
        root = tmp_path / str(kills)
        for step in (10, 20):
            write(local(root), step)
        survived = survives(lambda root=root: write(local(root), 30), kills + 1, root)
        newest = local(root).newest()
        assert newest.name in ("step-00000020", "step-00000030")
        assert verify(newest) is None
        assert not survived or complete_steps(root / "checkpoints") == [20, 30]
        # The next session continues, whatever files are left.
        write(local(root), 30)
        write(local(root), 40)
        assert complete_steps(root / "checkpoints") == [30, 40]
        assert sorted(path.name for path in (root / "checkpoints").glob("step-*")) == [
            "step-00000030",
            "step-00000040",
        ]
        if survived:
            break
        kills += 1
    assert kills > 20


class Shards:
    """A state of three parts on one rank."""

    parts = NAMES
    shapes: ClassVar = {"a": (3,)}

    def __init__(self, step):
        self.step = step

    def fragments(self):
        return [Fragment("a", 0, 3, 0, 0)]

    def shards(self, part):
        return [torch.full((3,), float(self.step))]


def save_beside_training(root, step):
    saver = CheckpointSaver()
    saver.start(Shards(step), TrainState(step=step, images_seen=step * 10), local(root), {})
    saver.wait()
    assert [save.result for save in saver.take()] == [None]


def test_a_save_beside_training_leaves_the_old_or_the_new_newest(tmp_path):
    kills = 0
    while True:
        root = tmp_path / str(kills)
        for step in (10, 20):
            write(local(root), step)
        survived = survives(lambda root=root: save_beside_training(root, 30), kills + 1, root)
        newest = local(root).newest()
        assert newest.name in ("step-00000020", "step-00000030")
        assert verify(newest) is None
        if newest.name == "step-00000030":
            files = {"raw": "a", "optimizer/00000-of-00001": "exp_avg/a[0:3]", "ema-0.9": "a"}
            for name, key in files.items():
                assert load_file(newest / f"{name}.safetensors")[key].tolist() == [30.0] * 3
        save_beside_training(root, 40)
        assert complete_steps(root / "checkpoints")[-1] == 40
        assert not survived or complete_steps(root / "checkpoints") == [30, 40]
        if survived:
            break
        kills += 1
    assert kills > 20


def copied(root, step):
    upload_checkpoint(remote(root), root / "staging", step)
    retain_remote(remote(root), Retention(2), step)


def stage(root, step):
    folder = CheckpointCatalog(str(root / "staging"), root / "none", Retention(None))
    write(folder, step)


def test_an_upload_with_retention_leaves_the_old_or_the_new_newest(tmp_path):
    kills = 0
    while True:
        root = tmp_path / str(kills)
        for step in (10, 20, 30):
            stage(root, step)
            if step < 30:
                copied(root, step)
        survived = survives(lambda root=root: copied(root, 30), kills + 1, root / "bucket")
        newest = elsewhere(root).newest()
        assert newest.name in ("step-00000020", "step-00000030")
        assert not survived or newest.name == "step-00000030"
        assert verify(newest) is None
        copied(root, 30)
        assert sorted(path.name for path in (root / "bucket" / "checkpoints").iterdir()) == [
            "step-00000020",
            "step-00000030",
        ]
        if survived:
            break
        kills += 1
    assert kills > 12


def test_a_fetch_that_is_killed_leaves_nothing_that_counts(tmp_path):
    root = tmp_path
    stage(root, 10)
    copied(root, 10)
    kills = 0
    while True:
        fresh = elsewhere(root, f"fetched-{kills}")
        survived = survives(fresh.newest, kills + 1, fresh.folder)
        assert complete_steps(fresh.folder) in ([], [10])
        assert verify(fresh.newest()) is None
        if survived:
            break
        kills += 1
    assert kills > 4


def half(place):
    """A change for its folder, one when the file is opened, one in its header, and one in its tensor."""
    weights_file.write_tensors(place, "a", {"a": torch.zeros(3)}, {})


def temporary(place):
    tempfile.mkstemp(dir=place)


def removed(place):
    """Two files, their folder, and the one above."""
    shutil.rmtree(place)


def test_the_hook_kills(tmp_path):
    assert not survives(lambda: (tmp_path / "a").write_text("x"), 1, tmp_path)
    assert not (tmp_path / "a").exists()
    assert survives(lambda: (tmp_path / "a").write_text("x"), 2, tmp_path)
    for changes, action in ((4, half), (1, temporary), (4, removed)):
        place = tmp_path / action.__name__
        for count in range(1, changes + 1):
            shutil.rmtree(place, ignore_errors=True)
            (place / "below").mkdir(parents=True)
            (place / "below" / "a").touch()
            (place / "below" / "b").touch()
            assert not survives(partial(action, place), count, place), (action, count)
        assert survives(partial(action, place), changes + 1, place), action
    with pytest.raises(AssertionError, match="failed without a kill"):
        survives(lambda: 1 / 0, 1, tmp_path)
