"""The launches of lab_rank.py, each made once for all tests of this folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fm_core.run.files import read_json

HERE = Path(__file__).parent


def launch(folder, ranks):
    variables = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*agent, f"--nproc-per-node={ranks}", "-m", "lab_rank", str(folder)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = read_json(folder / f"found-{ranks}.json")
    assert found, done.stdout[-3000:] + done.stderr[-5000:]
    return found


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Processes are killed here, machines are not."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="session")
def two(folder):
    return launch(folder, 2)


@pytest.fixture(scope="session")
def others(folder, two):
    """One, three and four processes, after two."""
    return {ranks: launch(folder, ranks) for ranks in (1, 3, 4)}
