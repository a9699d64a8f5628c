"""The online evaluation of a run is ended only on its own host."""

import subprocess
import sys

import pytest

from fm_core.launch.online_eval import online_eval_directory, stop_online_eval
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import read_json, write_json


@pytest.fixture
def scorer(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Lease(online_eval_directory(tmp_path) / "lock").take(process.pid)
    yield process
    process.kill()
    process.wait()


def test_the_scoring_of_this_host_is_ended(tmp_path, scorer):
    stop_online_eval(tmp_path)
    assert scorer.poll() is not None


@pytest.mark.parametrize("other", [{"host_id": "another boot/4026531836"}, {"start_ticks": 1}])
def test_a_process_that_only_has_the_pid_of_a_scoring_is_not_ended(tmp_path, scorer, other):
    lock = online_eval_directory(tmp_path) / "lock"
    record = read_json(lock)
    record.pop("schema")
    write_json(lock, {**record, **other})
    stop_online_eval(tmp_path)
    assert scorer.poll() is None


def test_a_holder_without_a_process_is_not_ended(tmp_path):
    Lease(online_eval_directory(tmp_path) / "lock").take_for("Slurm job 7")
    stop_online_eval(tmp_path)
