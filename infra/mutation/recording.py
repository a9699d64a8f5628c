"""Recording of the lines that each test executes: a pytest plugin, and a reader of its records.

Processes started by a test are recorded for that test. A fixture is recorded for the first test that uses it.
A process that is killed with SIGKILL leaves no record.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import coverage
import pytest

CONTEXT = "MUTATION_TEST"
TIMES = "MUTATION_TIMES"
SETTINGS = """\
[run]
source_pkgs = fm_core, flows
parallel = true
data_file = {folder}/data
patch = subprocess
sigterm = true
context = ${{MUTATION_TEST-}}
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Set the current test for this process and its child processes, and record the test's duration."""
    recorder = coverage.Coverage.current()
    if recorder is not None:
        recorder.switch_context(item.nodeid)
    os.environ[CONTEXT] = item.nodeid
    began = time.monotonic()
    try:
        return (yield)
    finally:
        del os.environ[CONTEXT]
        with Path(os.environ[TIMES]).open("a", encoding="utf-8") as file:
            file.write(json.dumps([item.nodeid, time.monotonic() - began]) + "\n")


@dataclass(frozen=True)
class ExecutedLines:
    """Test ids by file and line, and the duration of each test in seconds when it was recorded."""

    lines: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]

    def tests_of(self, file: str, first: int, last: int) -> list[str]:
        """Tests that execute at least one of these lines, fastest first.

        Lines that are executed during imports belong to no test; all tests of the file are used instead.
        """
        by_line = self.lines.get(file, {})
        names = {name for line in range(first, last + 1) for name in by_line.get(line, [])}
        names = names or {name for tests in by_line.values() for name in tests}
        return sorted(names & self.seconds.keys(), key=lambda name: (self.seconds[name], name))

    @staticmethod
    def read(file: Path) -> "ExecutedLines":
        """Read the records that `record` wrote."""
        record = json.loads(file.read_text(encoding="utf-8"))
        lines = {path: {int(n): tests for n, tests in by.items()} for path, by in record["lines"].items()}
        return ExecutedLines(lines, record["seconds"])


def record(root: Path, folder: Path, arguments: list[str]) -> int:
    """Run pytest with these arguments and the recorder, write folder/lines.json, and return the status."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("data*"):
        old.unlink()
    settings, times = folder / "coverage.ini", folder / "times.jsonl"
    settings.write_text(SETTINGS.format(folder=folder), encoding="utf-8")
    times.unlink(missing_ok=True)
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest"]
    command += ["-p", "infra.mutation.recording", *arguments]
    status = subprocess.run(command, cwd=root, env=os.environ | {TIMES: str(times)}).returncode
    seconds = dict(json.loads(line) for line in times.read_text(encoding="utf-8").splitlines())
    # A test whose id contains a path of this tree does not exist in a copy of it.
    seconds = {test: duration for test, duration in seconds.items() if str(root) not in test}
    recorder = coverage.Coverage(config_file=str(settings))
    recorder.combine([str(folder)], keep=True)
    lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    data = recorder.get_data()
    for path in data.measured_files():
        file = _relative(path)
        if file:
            for line, contexts in data.contexts_by_lineno(path).items():
                # The format is "static context|dynamic context", and one of the two is empty.
                lines[file][line] |= {name for context in contexts for name in context.split("|") if name}
    result = {
        "lines": {f: {n: sorted(t) for n, t in by.items()} for f, by in lines.items()},
        "seconds": seconds,
    }
    (folder / "lines.json").write_text(json.dumps(result), encoding="utf-8")
    return status


def _relative(path: str) -> str | None:
    """Path of a module relative to the root of the repository, even if a test ran a copy of the module."""
    parts = Path(path).parts
    for package in ("fm_core", "flows"):
        if package in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return None
