"""torchrun launches of the rank modules of tests/support, as a job launches its ranks."""

import os
import signal
import subprocess
import sys

from fm_core.storage.atomic_files import read_json
from tests.support import ROOT


def launch(module, folder, ranks, result):
    """Run `tests.support.MODULE FOLDER` on `ranks` ranks; content of its JSON file `result` in the folder."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    process = subprocess.Popen(
        [*agent, f"--nproc-per-node={ranks}", "-m", f"tests.support.{module}", str(folder)],
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
