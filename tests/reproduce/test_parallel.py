"""Experiments in parallel: device shares, failures, stopping, and results equal to serial results."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from fm_core.commands import stage_function
from fm_core.config import load_config, merge, parse_config
from fm_core.errors import UserError
from fm_core.reproduce import parallel as module
from fm_core.reproduce.parallel import VISIBLE, device_shares
from fm_core.run.progress import Progress
from fm_core.storage.atomic_files import read_json
from tests.support import ROOT
from tests.support.tiny_image_comparison import CELLS, configured

reproduce = stage_function("reproduce")

DIGITS = ROOT / "infra" / "configs" / "reproduce-digits.yaml"


def asked(parallel, **launch):
    return load_config(DIGITS, {"launch": launch, "reproduce": {"parallel": parallel}})


@pytest.fixture
def eight(monkeypatch):
    monkeypatch.setattr(module, "device_count", lambda: 8)
    monkeypatch.delenv(VISIBLE, raising=False)


def test_gpus_are_distributed_and_none_twice(eight):
    assert device_shares(asked(2)) == [{VISIBLE: "0,1,2,3"}, {VISIBLE: "4,5,6,7"}]
    assert device_shares(asked(3)) == [{VISIBLE: "0,1"}, {VISIBLE: "2,3"}, {VISIBLE: "4,5"}]
    assert device_shares(asked(4, processes=1)) == [{VISIBLE: str(n)} for n in range(4)]
    assert device_shares(asked(1)) == [{}]


def test_visible_gpus_are_distributed_by_their_names(eight, monkeypatch):
    monkeypatch.setattr(module, "device_count", lambda: 2)
    monkeypatch.setenv(VISIBLE, "5,7")
    assert device_shares(asked(2)) == [{VISIBLE: "5"}, {VISIBLE: "7"}]


@pytest.mark.parametrize(
    ("parallel", "launch", "message"),
    [
        (2, {"processes": 8}, "2: that many experiments of 8 processes need 16 GPUs and this host has 8"),
        (9, {}, "9: that many experiments of 1 processes need 9 GPUs and this host has 8"),
        (2, {"kind": "ssh", "hostfile": "hosts"}, "launch by slurm"),
    ],
)
def test_more_than_there_is_is_refused_in_one_line(eight, parallel, launch, message):
    with pytest.raises(UserError) as caught:
        device_shares(asked(parallel, **launch))
    assert message in str(caught.value)
    assert str(caught.value).startswith("reproduce.parallel")
    assert "\n" not in str(caught.value)


def test_slurm_distributes_devices_itself(eight):
    assert device_shares(asked(3, kind="slurm", processes=8)) == [{}, {}, {}]


def test_cores_are_distributed_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(module, "device_count", lambda: 0)
    monkeypatch.setattr(module, "world", lambda launch: (2, 12))
    assert device_shares(asked(3)) == [{}, {}, {}]
    assert module._with_thread_share(asked(3)).launch.threads == 4
    assert module._with_thread_share(asked(3, threads=5)).launch.threads == 5
    assert module._with_thread_share(asked(20)).launch.threads == 1


def test_a_2d_comparison_refuses_what_it_would_ignore():
    with pytest.raises(UserError, match=r"reproduce\.parallel"):
        parse_config({"reproduce": {"kind": "toy2d", "parallel": 2}}, where="x")


BROKEN = {
    "name": "broken",
    "title": "Broken",
    "objective": "tests.support.fault_injection:FailingObjective",
    "path": "optimal-transport",
}


LOCAL = {"launch": {"kind": "local", "restarts": 0}, "reproduce": {"parallel": 2}}


@dataclass
class FailedComparison:
    """A comparison of three experiments, run two at a time, one of which fails."""

    root: Path
    message: str
    seen: list[Progress]

    @property
    def directory(self) -> Path:
        return self.root / "runs" / "both" / "reproduce"


@pytest.fixture(scope="module")
def failed_in_parallel(tmp_path_factory) -> FailedComparison:
    root, seen = tmp_path_factory.mktemp("parallel"), []
    tree = configured(root, cells=[BROKEN, *CELLS]).model_dump(mode="json")
    config = parse_config(merge(tree, LOCAL), where="x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        with pytest.raises(RuntimeError) as caught:
            reproduce(config, seen.append)
    return FailedComparison(root, str(caught.value), seen)


def test_one_that_fails_costs_the_others_nothing_and_they_are_what_they_are_one_by_one(
    compared, failed_in_parallel
):
    assert re.search(r"1 of 3 runs failed \(broken-s0: .*no loss today", failed_in_parallel.message)
    directory = failed_in_parallel.directory
    results, before = read_json(directory / "results.json"), read_json(Path(compared[1].paths["results"]))
    assert list(results["failed"]) == ["broken-s0"]
    assert "no loss today" in (directory.parent / "logs" / "reproduce-broken-s0.log").read_text()
    for ours, theirs in zip(results["cells"], before["cells"], strict=True):
        for key in ("run", "steps", "trajectories_sha256"):
            assert ours[key] == theirs[key]
        assert ours["scores"]["frechet_distance"] == theirs["scores"]["frechet_distance"]
        assert ours["while_training"] == theirs["while_training"]
    done = [progress.done for progress in failed_in_parallel.seen if progress.stage == "reproduce"]
    assert done == sorted(done)
    # The two experiments were trained at the same time.
    spans = [trained(directory / name) for name in ("ddpm-s0", "broken-s0")]
    assert max(begun for begun, _ in spans) < min(ended for _, ended in spans)


def test_without_the_one_that_failed_the_comparison_is_complete(failed_in_parallel):
    complete = configured(failed_in_parallel.root)
    assert reproduce(complete).state == "done"
    assert reproduce(complete).state == "verified"


def trained(run: Path) -> tuple[float, float]:
    """Start of a run's first stage and end of its last stage, in seconds since 1970."""
    began = (run / "environment.json").stat().st_mtime
    return began, (run / "logs" / "stages.jsonl").stat().st_mtime


@pytest.fixture
def stopped_in_parallel(tmp_path) -> tuple[Path, int, str]:
    """Root, exit status and last output line of a comparison stopped while it trained two networks."""
    tree = configured(tmp_path).model_dump(mode="json")
    long = merge(merge(tree, LOCAL), {"train": {"images": 64_000, "checkpoint_images": 32_000}})
    file = tmp_path / "both.yaml"
    file.write_text(yaml.safe_dump(long))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fm_core", "reproduce", "--config", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 500
        while not all((folder / "metrics.jsonl").exists() for folder in training_folders(tmp_path)):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=300)
    finally:
        process.terminate()
        process.wait(60)
    return tmp_path, process.returncode, stderr.splitlines()[-1]


def training_folders(root: Path) -> list[Path]:
    return [root / "runs" / "both" / "reproduce" / name / "train" for name in ("ddpm-s0", "fm-ot-s0")]


def test_asked_to_stop_it_saves_what_was_trained_and_leaves_no_process(stopped_in_parallel):
    root, status, line = stopped_in_parallel
    assert (status, line) == (3, "fm: stopped; run it again to continue")
    assert [other for other in psutil.process_iter() if str(root) in " ".join(arguments(other))] == []
    for folder in training_folders(root):
        assert not (folder / "DONE.json").exists()
        assert list(folder.glob("checkpoints/step-*/COMPLETE")), "what was trained is kept"


def arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
