"""The command `fm reproduce` when it is killed, stopped, or given invalid settings."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fm_core.config import merge
from fm_core.storage.atomic_files import read_json
from tests.support.tiny_toy2d import CELLS, configured, place

pytestmark = pytest.mark.slow


def start(root, **plane):
    tree = merge(configured(root, CELLS[:2]).model_dump(mode="json"), {"reproduce": {"plane": plane}})
    file = root / "tiny.yaml"
    file.write_text(
        yaml.safe_dump({"run": tree["run"], "launch": {"threads": 1}, "reproduce": tree["reproduce"]})
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fm_core", "reproduce", "--config", str(file)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_until(ready, process):
    for _ in range(1200):
        if ready():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("waited for a minute")


def test_a_kill_costs_the_current_experiment_and_a_stop_is_reported(tmp_path):
    # The second experiment lasts for seconds: the signals come while it is trained.
    long = {"steps": 300, "batch": 64}
    first = place(tmp_path, "ddpm", "result.json")
    process = start(tmp_path, **long)
    wait_until(first.exists, process)
    process.kill()
    process.communicate()
    modified = first.stat().st_mtime_ns
    assert not place(tmp_path, "fm-ot", "result.json").exists()

    process = start(tmp_path, **long)
    # The killed process has left its lock behind: wait for that of the new one.
    wait_until(lambda: read_json(place(tmp_path, "lock"))["pid"] == process.pid, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.splitlines()[-1]) == (3, "fm: stopped; run it again to continue")

    process = start(tmp_path, **long)
    out, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert out.startswith("reproduce done")
    assert first.stat().st_mtime_ns == modified
    assert json.loads(place(tmp_path, "results.json").read_text())["failed"] == {}


def test_nonsense_is_one_line_and_status_two(tmp_path):
    process = start(tmp_path, nfe=[3])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(stderr.splitlines()) == 1
    assert "reproduce.plane.nfe" in stderr
