"""Standard output and error that are closed, full or gone do not end a command."""

import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fm_core.output import print_line
from fm_core.run.progress import Progress, byte_size
from fm_core.terminal import ProgressBar
from tests.support import ROOT

STATUS = "import sys; from fm_core.cli import main; sys.exit(main(['status', '--config', sys.argv[1]]))"


class FullDisk(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_closed_pipe_swallows_what_is_printed():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        assert not print_line("one", stream)
        assert print_line("two", stream), "it goes nowhere now"


def test_a_full_disk_or_a_closed_stream_is_not_an_error():
    closed = io.StringIO()
    closed.close()
    assert not print_line("a line", FullDisk())
    assert not print_line("a line", closed)


def test_a_process_whose_log_is_on_a_full_disk_goes_on():
    code = (
        "import logging, sys, warnings; from fm_core.output import drop_unwritable_output\n"
        "drop_unwritable_output(); print('caf\\xe9' * 9999); print('x', file=sys.stderr, flush=True)\n"
        "warnings.warn('w'); logging.warning('l'); sys.stdout.flush(); sys.exit(4)"
    )
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"},
            stdout=full,
            stderr=full,
        )
    assert done.returncode == 4


def test_a_character_that_the_locale_does_not_have_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii")
    assert print_line("café", stream)
    assert raw.getvalue() == b"caf\\xe9\n"


def test_a_progress_bar_on_a_closed_pipe_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "stderr", FullDisk())
    with ProgressBar() as bar:
        for done in range(4):
            bar.observe(Progress("train", done, 3, "images"))


def test_the_end_is_printed_once_however_often_it_is_reported(capsys, monkeypatch):
    clock = iter(range(1_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) / 100)
    with ProgressBar() as bar:
        for message in ("", "writing", "uploading", "uploading", "uploaded"):
            bar.observe(Progress("sample", 8_000, 8_000, "images", message))
    assert capsys.readouterr().err.splitlines() == [
        "sample: 8,000/8,000 images",
        "sample: 8,000/8,000 images, uploaded",
    ]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_exit_status_of_a_command_does_not_depend_on_its_reader(tmp_path: Path, stream: str):
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {{root: {tmp_path}}}\n" + ("" if stream == "stdout" else "nonsense: 1\n"))
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", STATUS, str(config)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        **{stream: writing},
    )
    os.close(writing)
    assert done.returncode == (0 if stream == "stdout" else 2)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (812, "812 bytes"),
        (48_300, "48.3 kB"),
        (5e6, "5 MB"),
        (1.25e10, "12.5 GB"),
        (3e12, "3 TB"),
    ],
)
def test_small_numbers_of_bytes_are_not_shown_as_zero(size: float, text: str):
    assert byte_size(size) == text
