"""The command `fm reproduce` when it is killed, stopped, or given invalid settings."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fm_core import cli
from fm_core.config import merge
from fm_core.storage.atomic_files import read_json
from tests.support.tiny_toy2d import CELLS, configured, place


def written(root, **toy2d):
    """Path of a written configuration file with two experiments."""
    tree = merge(configured(root, CELLS[:2]).model_dump(mode="json"), {"reproduce": {"toy2d": toy2d}})
    file = root / "tiny.yaml"
    file.write_text(
        yaml.safe_dump({"run": tree["run"], "launch": {"threads": 1}, "reproduce": tree["reproduce"]})
    )
    return file


def start(root, **toy2d):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fm_core", "reproduce", "--config", str(written(root, **toy2d))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_until(ready, process):
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def killed_comparison(tmp_path):
    """Root and settings of a comparison that was killed during the training of its second experiment."""
    # Training of the second experiment takes seconds, so that the signals arrive during it.
    long = {"steps": 300, "batch": 64}
    process = start(tmp_path, **long)
    wait_until(place(tmp_path, "ddpm", "result.json").exists, process)
    process.kill()
    process.communicate()
    return tmp_path, long


def test_a_kill_costs_the_current_experiment_and_a_stop_is_reported(killed_comparison, capsys):
    root, long = killed_comparison
    first = place(root, "ddpm", "result.json")
    modified = first.stat().st_mtime_ns
    assert not place(root, "fm-ot", "result.json").exists()

    process = start(root, **long)
    # The killed process has left its lock behind: wait for the lock of the new process.
    wait_until(lambda: read_json(place(root, "lock"))["pid"] == process.pid, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr.splitlines()[-1]) == (3, "fm: stopped; run it again to continue")

    assert cli.main(["reproduce", "--config", str(written(root, **long))]) == 0
    assert capsys.readouterr().out.startswith("reproduce done")
    assert first.stat().st_mtime_ns == modified
    assert json.loads(place(root, "results.json").read_text())["failed"] == {}


def test_nonsense_is_one_line_and_status_two(tmp_path, capsys):
    assert cli.main(["reproduce", "--config", str(written(tmp_path, nfe=[3]))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "reproduce.toy2d.nfe" in line
