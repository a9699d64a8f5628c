"""Launches of the rank modules of tests/support, as a job launches its ranks."""

import os
import signal
import subprocess

from fm_core.launch.rank_group import LOOPBACK, LOOPBACK_INTERFACE, rank_group_command
from fm_core.storage.atomic_files import read_json
from tests.support import ROOT


def launch(module, folder, ranks, result):
    """Run `tests.support.MODULE FOLDER` on `ranks` ranks; content of its JSON file `result` in the folder."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        **LOOPBACK_INTERFACE,
    }
    rank = ["-m", f"tests.support.{module}", str(folder)]
    process = subprocess.Popen(
        rank_group_command(rank, ranks, meet=f"{LOOPBACK}:0"),
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    content = read_json(folder / result)
    assert content, output[-8000:]
    return content
