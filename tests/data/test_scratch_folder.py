"""Temporary copies of a source: private, shared by processes, and removed by the last."""

import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fm_core.data.sources.scratch_folder import COMPLETE, STALE_SECONDS, ScratchFolder
from fm_core.errors import UserError


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def copy(folder: Path) -> None:
    (folder / "content").write_bytes(b"images")


def never(folder: Path) -> None:
    raise AssertionError("made a second time")


def test_no_other_user_reads_or_prepares_it(temporary):
    path = ScratchFolder("source").fill(copy, 1)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    (temporary / "elsewhere").mkdir()
    path.parent.rename(temporary / "moved")
    path.parent.symlink_to(temporary / "elsewhere")
    with pytest.raises(UserError, match="is not a directory of its own"):
        ScratchFolder("source").fill(copy, 1)


def test_the_last_reader_removes_it():
    first, second = ScratchFolder("source"), ScratchFolder("source")
    path = first.fill(copy, 1)
    assert second.fill(never, 1) == path
    first.remove()
    assert (path / "content").exists(), "another one reads it"
    assert second.fill(never, 1) == path
    second.remove()
    assert not path.exists()


def test_who_leaves_does_not_hold_it():
    first, second = ScratchFolder("source"), ScratchFolder("source")
    path = first.fill(copy, 1)
    first.leave()
    pickle.loads(pickle.dumps(second)).remove()
    assert not path.exists()
    assert (first.fill(copy, 1) / "content").exists()


def test_a_process_that_ends_without_releasing_it_removes_it(temporary):
    """As one of two flow processes that write pieces does, when the other one released its copy before."""
    program = (
        "import sys; from fm_core.data.sources.scratch_folder import ScratchFolder\n"
        "s = ScratchFolder('source')\n"
        "print(s.fill(lambda path: (path / 'content').touch(), 1), flush=True); sys.stdin.read()"
    )
    first = ScratchFolder("source")
    path = first.fill(copy, 1)
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    other = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline().strip() == str(path)
    first.remove()
    assert (path / "content").exists(), "the other process reads it"
    other.communicate("")
    assert not path.exists()


def test_what_a_killed_process_left_is_removed_a_day_later():
    left, read = ScratchFolder("left"), ScratchFolder("read")
    paths = [left.fill(copy, 1), read.fill(copy, 1)]
    left.leave()
    ScratchFolder("new").fill(copy, 1)
    assert paths[0].exists()
    for path in paths:
        long_ago = (path / COMPLETE).stat().st_mtime - STALE_SECONDS - 1
        os.utime(path / COMPLETE, (long_ago, long_ago))
    ScratchFolder("new").fill(copy, 1)
    assert [path.exists() for path in paths] == [False, True]


def test_a_full_disk_is_refused_in_one_line_that_names_the_variable(monkeypatch, temporary):
    with pytest.raises(UserError, match="set TMPDIR to a larger disk"):
        ScratchFolder("source").fill(copy, 2**62)
    monkeypatch.setenv("XDG_CACHE_HOME", str(temporary / "cache"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a larger disk"):
        ScratchFolder("source").fill(copy, 2**62)
