"""Ranks of this folder's modules, started by torchrun as a job's are."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from fm_core.storage.atomic_files import read_json

HERE = Path(__file__).parent


def launch(module, folder, ranks, found):
    """What ranks of a module of this folder left in a file of `folder`, to which they are pointed."""
    variables = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    started = subprocess.Popen(
        [*agent, f"--nproc-per-node={ranks}", "-m", module, str(folder)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = started.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    answer = read_json(folder / found)
    assert answer, said[-8000:]
    return answer
