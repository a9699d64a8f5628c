"""Stages under launch.kind debug: results equal to those of one local process, and a debugger that works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fm_core.storage.atomic_files import read_json, read_lines
from tests.support import ROOT
from tests.support.pseudo_terminal import Terminal
from tests.support.tiny_run import TinyRun

pytestmark = pytest.mark.slow

# Two threads, where the commands' environment says one: both launchers must set them.
LOCAL = {"launch": {"processes": 1, "threads": 2}}
DEBUG = {"launch": {"kind": "debug", "processes": 1, "threads": 2}}
TIMES = ("seconds", "images_per_s", "data_seconds", "memory_bytes", "tflops_per_device", "mfu")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """Root of runs whose data set is there."""
    root = tmp_path_factory.mktemp("debugged")
    called = TinyRun(root, "shards").fm("shard")
    assert called.code == 0, called.err
    return root


@pytest.fixture(scope="module")
def local(sharded) -> TinyRun:
    """A run of one local process, trained and sampled."""
    run = TinyRun(sharded, "one-local", LOCAL)
    for stage in ("train", "sample"):
        called = run.fm(stage)
        assert called.code == 0, called.err
    return run


def metrics(run: TinyRun) -> list[dict]:
    lines = read_lines(run.path / "train" / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def weights(run: TinyRun) -> dict[str, torch.Tensor]:
    """Every tensor of every checkpoint, by file and name."""
    folder = run.path / "train" / "checkpoints"
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def sample_files(run: TinyRun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.path.glob("samples/*/*/*.tar"))}


def assert_equal(run: TinyRun, local: TinyRun) -> None:
    assert metrics(run) == metrics(local)
    ours, theirs = weights(run), weights(local)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


TWO_STAGES = """
import os, signal, sys
import torch, torch.distributed
from fm_core.config import load_config
from fm_core.stages.sample import sample
from fm_core.stages.train import train

def state():
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "threads": torch.get_num_threads(),
        "process group": torch.distributed.is_initialized(),
    }

before = state()
for stage, file in zip((train, train, sample), sys.argv[1:], strict=True):
    stage(load_config(file))
    now = state()
    assert now == before, [key for key in now if now[key] != before[key]]
print("restored")
"""


def test_stages_in_one_interpreter_equal_those_of_local_processes(local):
    first, second = TinyRun(local.root, "debug-1", DEBUG), TinyRun(local.root, "debug-2", DEBUG)
    files = [first.file, second.file, second.file]
    done = subprocess.run(
        [sys.executable, "-c", TWO_STAGES, *map(str, files)],
        env={**os.environ, **variables()},
        cwd=local.root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.endswith("restored\n"), done.stderr
    assert_equal(first, local)
    assert_equal(second, local)
    assert sample_files(second)
    assert sample_files(second) == sample_files(local)
    for record in ("train-0.end.json", "samples/*/*/sample-0.end.json"):
        (path,) = second.path.glob(record)
        assert read_json(path)["kind"] == "done"
    assert second.fm("status").out.startswith("sample done: 20/20 images")
    assert "launch.kind debug" in (second.path / "logs" / "train-0.log").read_text()


def test_a_local_job_continues_what_was_stopped_in_the_debugger(local):
    over = {**DEBUG, "method": {"path": "tests.support.fault_injection:FaultyPath"}}
    run = TinyRun(local.root, "stopped-debug", over)
    stopped = run.fm("train", FAULT="0:stop:5")
    assert stopped.code == 3, stopped.err
    assert stopped.err.endswith("fm: stopped at step 5 (80 images seen); run it again to continue\n")
    assert not (run.path / "lock").exists()
    signaled = run.fm("train", FAULT="0:SIGTERM:2")
    assert signaled.code == 3, signaled.err
    finished = run.fm("train", "--launch.kind", "local")
    assert finished.code == 0, finished.err
    assert_equal(run, local)


def test_an_error_shows_its_own_traceback_on_the_terminal(local):
    run = TinyRun(
        local.root,
        "failing-debug",
        {**DEBUG, "method": {"path": "tests.support.fault_injection:FailingPath"}},
    )
    failed = run.fm("train")
    assert failed.code == 1
    assert "Traceback (most recent call last):" in failed.err
    assert "fault_injection.py" in failed.err
    assert failed.err.endswith("fm: ZeroDivisionError: a number\n")
    assert "fault_injection.py" in (run.path / "logs" / "train-error.log").read_text()
    assert read_json(run.path / "train-0.end.json")["kind"] == "error"
    assert not (run.path / "logs" / "restarts.jsonl").exists()
    assert not (run.path / "lock").exists()


def test_more_than_one_process_or_host_is_refused_in_one_line(sharded):
    for arguments, named in (
        (("train", "--launch.processes", "2"), "launch.processes 2"),
        (("sample", "--launch.hostfile", "hosts"), "launch.hostfile"),
        (("train", "--launch.slurm.nodes", "2"), "launch.slurm"),
        (("evaluate", "--evaluate.processes", "2"), "evaluate.processes 2"),
    ):
        run = TinyRun(sharded, "refused-debug", {"launch": {"processes": None, "kind": "debug"}})
        refused = run.fm(*arguments)
        assert refused.code == 2, refused.err
        assert named in refused.err
        assert refused.err.count("\n") == 1
        assert not run.path.exists()


def variables(**more: str) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def terminal(run: TinyRun, stage: str, at: str) -> Terminal:
    command = [sys.executable, "-m", "fm_core", stage, "--config", str(run.file), "--launch.kind", "debug"]
    environment = {**os.environ, **variables(BREAKPOINT=at, TERM="dumb")}
    environment.pop("PYTHONBREAKPOINT", None)
    return Terminal(command, run.root, environment)


@pytest.fixture(scope="module")
def stopping(sharded) -> TinyRun:
    """A run whose ranks stop in the debugger, not trained yet."""
    over = {
        "launch": {"processes": 1, "threads": 1},
        "method": {"objective": "tests.support.breakpoints:Stopping"},
    }
    return TinyRun(sharded, "stopping", over)


def test_a_breakpoint_in_the_training_step_opens_the_debugger(stopping):
    fm = terminal(stopping, "train", "loss")
    try:
        fm.wait_for("(Pdb)")
        fm.type("x_t.shape\n")
        assert "torch.Size([16, 1, 8, 8])" in fm.wait_for("(Pdb)")
        # Ctrl-C at the prompt is the debugger's, and no request to stop.
        fm.type("while True: pass\n")
        fm.wait_for("pass")
        fm.type("\x03")
        assert "KeyboardInterrupt" in fm.wait_for("(Pdb)")
        refused = stopping.fm("train")
        assert refused.code == 2
        assert "is in use by process" in refused.err
        fm.type("c\n")
        assert fm.wait() == 0, fm.output
    finally:
        fm.kill()
    assert "train done" in fm.output
    assert read_json(stopping.path / "train" / "DONE.json")["step"] == 20


def test_a_breakpoint_in_a_sampling_rank_opens_the_debugger(stopping):
    if not (stopping.path / "train" / "DONE.json").exists():
        assert stopping.fm("train").code == 0
    fm = terminal(stopping, "sample", "velocity")
    try:
        fm.wait_for("(Pdb)")
        fm.type("t.shape\n")
        assert "torch.Size([8])" in fm.wait_for("(Pdb)")
        fm.type("c\n")
        assert fm.wait() == 0, fm.output
    finally:
        fm.kill()
    assert "sample done" in fm.output


def test_quitting_the_debugger_stops_the_stage_with_status_3(sharded):
    over = {
        "launch": {"processes": 1, "threads": 1},
        "method": {"objective": "tests.support.breakpoints:Stopping"},
    }
    run = TinyRun(sharded, "quit", over)
    fm = terminal(run, "train", "loss")
    try:
        fm.wait_for("(Pdb)")
        fm.type("q\n")
        assert fm.wait() == 3, fm.output
    finally:
        fm.kill()
    assert "fm: the debugger was quit; run it again to continue" in fm.output
    assert not (run.path / "lock").exists()


def test_the_command_of_the_readme_debugs_a_stage(sharded):
    (command,) = [
        line
        for line in README.read_text().splitlines()
        if line.startswith("fm ") and "launch.kind debug" in line
    ]
    arguments = command.split()
    assert arguments[:2] == ["fm", "train"]
    config = arguments[arguments.index("--config") + 1]
    assert (README.parent / config).exists()
    run = TinyRun(sharded, "from-the-readme", {"launch": {"processes": None}})
    shutil.rmtree(run.path, ignore_errors=True)
    done = run.fm("train", *arguments[arguments.index("--config") + 2 :])
    assert done.code == 0, done.err


README = ROOT / "README.md"
