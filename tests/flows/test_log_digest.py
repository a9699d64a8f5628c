"""The digest of log files for the UI: each warning once, and the traceback of a failure."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from flows.log_digest import MAX_ENTRIES, TRACEBACK, LogDigest
from tests.support import ROOT

FAILURE = f"""{TRACEBACK}
  File "loop.py", line 3, in run
    step()
FloatingPointError: the loss is not a number
"""


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "train-0.log").write_text("WARNING: of an earlier session\n" + FAILURE)
    return tmp_path


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def texts(digest: LogDigest, level: int = logging.WARNING) -> list[str]:
    entries = list(digest.new_entries())
    assert {entry[0] for entry in entries} <= {level}
    return [text for _, text in entries]


def test_each_new_warning_is_shown_once_and_nothing_else(logs: Path):
    digest = LogDigest(logs, "train")
    append(
        logs / "train-0.log",
        "step 1\n[2026-11-22 21:00:00,123] [WARNING] [a.py:5] slow\n[2026-11-22 21:00:08,003] [WARN",
    )
    append(logs / "train-1.log", "[rank1]: [2026-11-22 21:00:07,001] [WARNING] [a.py:5] slow\n")
    append(logs / "sample-0.log", "WARNING: another stage\n")
    assert texts(digest) == ["train-0.log: [WARNING] [a.py:5] slow"]
    append(logs / "train-0.log", "ING] [b.py:6] the rest of the line\nstep 2\n")
    assert texts(digest) == ["train-0.log: [WARNING] [b.py:6] the rest of the line"]
    assert texts(digest) == []


def test_the_level_decides_and_not_a_word_of_the_message(logs: Path):
    digest = LogDigest(logs, "train")
    append(logs / "train-0.log", "warning: of no logger\nan ERROR of 1e-5\n2 WARNING lights\n")
    append(logs / "train-0.log", "[2026-11-22 21:00:00,123] [INFO] [a] Warning: none\n")
    assert texts(digest) == []
    append(logs / "train-0.log", "W1122 21:00:00.000000 123 torch/a.cpp:1] slow\n")
    assert texts(digest) == ["train-0.log: W1122 21:00:00.000000 123 torch/a.cpp:1] slow"]
    append(logs / "train-0.log", "[2026-11-22 21:00:00,123] [ERROR] [a] no checkpoint was written\n")
    assert texts(digest, logging.ERROR) == ["train-0.log: [ERROR] [a] no checkpoint was written"]


def test_every_log_line_of_a_rank_is_read_with_its_level(logs: Path):
    """The lines of a real process: of this package, and of Python's warnings."""
    digest = LogDigest(logs, "train")
    code = (
        "import logging, warnings; from fm_core.output import log_to_stderr; log_to_stderr(logging.INFO)\n"
        "logging.getLogger('fm_core.training.x').warning('the %s is down', 'store')\n"
        "logging.getLogger('fm_core').info('the store is back'); warnings.warn('old')"
    )
    with (logs / "train-0.log").open("a") as log:
        subprocess.run([sys.executable, "-c", code], stderr=log, cwd=ROOT, check=True)
    first, second = texts(digest)
    assert first == "train-0.log: [WARNING] [fm_core.training.x] the store is down"
    assert second == "train-0.log: [WARNING] [py.warnings] <string>:3: UserWarning: old"
    assert "[INFO] [fm_core] the store is back" in (logs / "train-0.log").read_text()


def test_a_flood_of_warnings_is_counted(logs: Path):
    digest = LogDigest(logs, "train")
    append(logs / "train-0.log", "".join(f"WARNING: number {number}\n" for number in range(MAX_ENTRIES + 50)))
    assert len(texts(digest)) == MAX_ENTRIES
    assert digest.omitted == 50


def test_a_traceback_is_shown_in_full_once_it_is_complete(logs: Path):
    digest = LogDigest(logs, "train")
    lines = FAILURE.splitlines(keepends=True)
    append(logs / "train-1.log", "step 9\n" + "".join(lines[:3]))
    assert texts(digest) == []
    append(logs / "train-1.log", lines[3] + "more lines\n")
    append(logs / "train-2.log", "".join(f"[rank2]: {line}" for line in lines))  # the same from another rank
    assert texts(digest, logging.ERROR) == [f"train-1.log: {FAILURE.rstrip()}"]


@pytest.mark.parametrize("mark", ["", "[rank2]: "])
def test_hosts_that_do_not_see_the_run_directory_are_read_in_the_log_of_the_job(logs: Path, mark: str):
    log = logs / "train.log"
    log.write_text("job 0af3 of train on h1.site, h2.site\n")
    digest = LogDigest(logs, "train")
    other = FAILURE.replace("FloatingPointError: the loss is not a number", "ValueError: something else")
    pairs = zip(FAILURE.splitlines(), other.splitlines(), strict=True)
    # Lines of two hosts arrive interleaved.
    for number, pair in enumerate(pairs):
        hosts = zip(("h2", "h3"), pair, strict=True)
        append(log, "".join(f"{host}: {mark}{line}\n" for host, line in hosts))
        append(log, f"h1: step {number}\n")
    assert texts(digest, logging.ERROR) == [
        f"train.log, h2: {FAILURE.rstrip()}",
        f"train.log, h3: {other.rstrip()}",
    ]
    append(log, f"h2: {mark}[2026-11-22 21:00:07,001] [WARNING] [a.py:5] slow\n")
    assert texts(digest) == ["train.log, h2: [WARNING] [a.py:5] slow"]


@pytest.mark.parametrize("regrown", [False, True])
def test_a_log_that_logrotate_truncates_in_place_is_read_from_its_beginning(logs: Path, regrown: bool):
    log = logs / "train-0.log"
    digest = LogDigest(logs, "train")
    append(log, "WARNING: one\n")
    assert texts(digest) == ["train-0.log: WARNING: one"]
    more = "".join(f"step {step}\n" for step in range(500 if regrown else 0))
    log.write_text(f"WARNING: two\n{more}")
    assert texts(digest) == ["train-0.log: WARNING: two"]
    append(log, "WARNING: three\n")
    assert texts(digest) == ["train-0.log: WARNING: three"]


def test_a_log_that_cannot_be_read_now_is_read_later(logs: Path, monkeypatch):
    digest = LogDigest(logs, "train")
    append(logs / "train-0.log", "WARNING: one\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        assert texts(digest) == []
    assert texts(digest) == ["train-0.log: WARNING: one"]


def test_slurm_numbers_its_hosts(logs: Path):
    digest = LogDigest(logs, "train")
    append(logs / "train.log", "".join(f"1: {line}\n" for line in FAILURE.splitlines()))
    assert texts(digest, logging.ERROR) == [f"train.log, 1: {FAILURE.rstrip()}"]


def test_a_failure_before_a_rank_has_its_log_is_shown_and_the_agent_s_own_error_is_not(logs: Path):
    digest = LogDigest(logs, "train")
    agent = FAILURE.replace("FloatingPointError: the loss is not a number", "x.errors.ChildFailedError: ")
    append(logs / "train.log", FAILURE + agent)
    assert texts(digest, logging.ERROR) == [f"train.log: {FAILURE.rstrip()}"]
