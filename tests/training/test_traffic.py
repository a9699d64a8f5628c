"""What fm doctor --cost says of the network against what two processes send (traffic_rank.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fm_core.run.files import read_json
from fm_core.training.cost import network_bytes

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traffic")
    variables = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*agent, "--nproc-per-node=2", "-m", "traffic_rank", str(folder)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = read_json(folder / "traffic.json")
    assert found, done.stdout[-3000:] + done.stderr[-5000:]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_predicted_traffic_is_what_the_collectives_carry(sent, stage, micro_batches):
    found = sent[f"{stage}-{micro_batches}"]
    predicted = network_bytes(found["parameters"], stage, 2, micro_batches)
    assert found["bytes"] == pytest.approx(predicted, rel=0.02)
