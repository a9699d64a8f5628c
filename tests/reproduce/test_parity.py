"""infra/benchmarks/parity.py on the run of a tiny comparison, with real training and sampling by torchcfm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fm_core.config import load_config
from fm_core.models.build import build_network

ROOT = Path(__file__).parents[2]


def parity(run, work, public_python):
    command = [sys.executable, str(ROOT / "infra" / "benchmarks" / "parity.py"), str(run)]
    command += ["--work", str(work), "--peers", str(public_python.parents[1]), "--json", str(work / "p.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=300)


def test_torchcfm_gets_the_same_start_and_budget_and_is_scored_by_the_same_feature_extractor(
    compared, tmp_path, public_python
):
    run = compared[0] / "runs" / "both" / "reproduce" / "fm-ot-s0"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = parity(run, tmp_path, public_python)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    result = json.loads((tmp_path / "p.json").read_text())
    (pair,) = result["pairs"]
    ours, theirs = pair["ours"], pair["theirs"]
    assert (ours["images_seen"], ours["step"]) == (theirs["images_seen"], theirs["step"]) == (128, 8)
    config = load_config(run / "config.yaml")
    torch.manual_seed(config.run.seed)
    network = build_network(config.model, (1, 8, 8), 10)
    assert theirs["initial_weights_sha256"] == sha256(network)
    for side in (ours, theirs):
        assert side["nfe"] > 6
        assert side["frechet_distance"]["value"] > 0
        assert side["frechet_distance"]["stderr"] > 0
        assert side["frechet_distance"]["images"] == 20
    assert ours["frechet_distance_of_held_out"] == theirs["frechet_distance_of_held_out"]
    scores = compared[1].counts["frechet_distance_fm-ot-s0"]
    assert ours["frechet_distance"]["value"] == pytest.approx(scores, rel=1e-6)
    a, b = (np.load(tmp_path / "both-fm-ot-s0" / f"{side}.npz")["arr_0"] for side in ("ours", "theirs"))
    assert a.shape == b.shape == (20, 8, 8, 1)
    assert (a != b).any()
    ratio = theirs["frechet_distance"]["value"] / ours["frechet_distance"]["value"]
    assert f"| {ratio:.2f} ± " in done.stdout
    assert result["verdict"] in done.stdout


def sha256(network: torch.nn.Module) -> str:
    import hashlib

    content = b"".join(weight.detach().numpy().tobytes() for weight in network.parameters())
    return hashlib.sha256(content).hexdigest()


def test_a_run_of_another_objective_is_refused_in_one_line(compared, tmp_path, public_python):
    done = parity(compared[0] / "runs" / "both" / "reproduce" / "ddpm-s0", tmp_path, public_python)
    assert done.returncode == 1
    assert "method.objective noise-prediction; torchcfm's is flow-matching" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
