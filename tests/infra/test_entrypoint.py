"""The first process of a container, as that of a PID namespace: runs and jobs save before it ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT

NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")

SAVES = """
import os, signal, sys, time
from pathlib import Path
name = sys.argv[1]
def save(number, frame):
    time.sleep(0.5)
    Path(name + "-saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
Path(name + "-runs").touch()
time.sleep(300)
"""
"""A process that needs a moment to save."""

WORKER = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
def start(name, **variables):
    environment = {{**os.environ, **variables}}
    subprocess.Popen([sys.executable, "-c", {SAVES!r}, name], env=environment, start_new_session=True)
def end(number, frame):
    left = [name for name in ("flow", "orphan") if not Path(name + "-saved").exists()]
    Path("worker-ended").write_text(" ".join(left))
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
start("flow", PREFECT__FLOW_RUN_ID="1")
start("orphan", FM_JOB="a-job")
Path("worker-pid").write_text(str(os.getpid()))
while True:
    time.sleep(1)
"""
"""A worker with a flow run, and a job whose supervisor is gone."""


def until(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def pid_namespace() -> tuple[str, ...]:
    """A command that runs another one as the first process of a PID namespace."""
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here: they need unshare and root")
    return NAMESPACE


def first_process(container: subprocess.Popen[bytes]) -> int:
    """The process id, outside of the namespace, of the first process in it."""
    children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
    until(lambda: children.read_text().split())
    return int(children.read_text().split()[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_everything_saves_before_the_worker_is_ended(pid_namespace, tmp_path: Path, number: signal.Signals):
    entrypoint = [sys.executable, str(ROOT / "infra" / "entrypoint.py")]
    container = subprocess.Popen(
        [*pid_namespace, *entrypoint, sys.executable, "-c", WORKER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    try:
        until(lambda: all((tmp_path / f"{name}-runs").exists() for name in ("flow", "orphan")))
        os.kill(first_process(container), number)
        assert container.wait(60) == 7
    finally:
        container.kill()
    assert (tmp_path / "flow-saved").exists()
    assert (tmp_path / "orphan-saved").exists()
    assert (tmp_path / "worker-ended").read_text() == "", "the worker was ended first"


def test_the_status_of_a_command_that_exits_is_passed_on():
    command = [sys.executable, str(ROOT / "infra" / "entrypoint.py"), "sh", "-c"]
    assert subprocess.run([*command, "exit 5"]).returncode == 5
    assert subprocess.run([*command, "kill -9 $$"]).returncode == 128 + 9
