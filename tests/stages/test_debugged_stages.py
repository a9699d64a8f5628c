"""Stages under launch.kind debug: results equal to those of one local process, and a debugger that works."""

import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from fm_core.stages.sample import sample
from fm_core.stages.train import train
from fm_core.storage.atomic_files import read_json, read_lines
from tests.support import ROOT
from tests.support.pseudo_terminal import Terminal
from tests.support.tiny_run import DEBUG as IN_PROCESS
from tests.support.tiny_run import VARIABLES, TinyRun

README = ROOT / "README.md"

# Two threads, where the commands' environment says one: both launchers must set them.
LOCAL = {"launch": {"processes": 1, "threads": 2}}
DEBUG = {"launch": {"kind": "debug", "processes": 1, "threads": 2}}
TIMES = ("seconds", "images_per_s", "data_seconds", "memory_bytes", "tflops_per_device", "mfu")


@pytest.fixture(scope="module")
def local_run(tiny) -> TinyRun:
    """A run of one local process, trained."""
    run = TinyRun(tiny.root, "one-local", LOCAL)
    called = run.fm("train")
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


def assert_equal(run: TinyRun, local_run: TinyRun) -> None:
    assert metrics(run) == metrics(local_run)
    ours, theirs = weights(run), weights(local_run)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def state() -> dict[str, object]:
    """What a rank changes in its process."""
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "threads": torch.get_num_threads(),
        "process group": torch.distributed.is_initialized(),
    }


def test_stages_in_one_interpreter_equal_those_of_local_processes(local_run, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    first, second = TinyRun(local_run.root, "debug-1", DEBUG), TinyRun(local_run.root, "debug-2", DEBUG)
    before = state()
    for stage, run in ((train, first), (train, second), (sample, second)):
        stage(run.config)
        now = state()
        assert now == before, [key for key in now if now[key] != before[key]]
    assert_equal(first, local_run)
    assert_equal(second, local_run)
    for record in ("train-0.end.json", "samples/*/*/sample-0.end.json"):
        (path,) = second.path.glob(record)
        assert read_json(path)["kind"] == "done"
    assert second.fm("status").out.startswith("sample done: 20/20 images")
    assert "launch.kind debug" in (second.path / "logs" / "train-0.log").read_text()


def test_a_local_job_continues_what_was_stopped_in_the_debugger(local_run):
    over = {**DEBUG, "method": {"path": "tests.support.fault_injection:FaultyPath"}}
    run = TinyRun(local_run.root, "stopped-debug", over)
    stopped = run.fm("train", FAULT="0:stop:5")
    assert stopped.code == 3, stopped.err
    assert stopped.err.endswith("fm: stopped at step 5 (80 images seen); run it again to continue\n")
    assert not (run.path / "lock").exists()
    signaled = run.fm("train", FAULT="0:SIGTERM:2")
    assert signaled.code == 3, signaled.err
    finished = run.fm("train", "--launch.kind", "local")
    assert finished.code == 0, finished.err
    assert_equal(run, local_run)


@pytest.fixture
def failed_in_debugger(tiny):
    """A run whose path fails, and the outcome of its training in this process."""
    over = {**DEBUG, "method": {"path": "tests.support.fault_injection:FailingPath"}}
    run = TinyRun(tiny.root, "failing-debug", over)
    return run, run.fm("train")


def test_an_error_shows_its_own_traceback_on_the_terminal(failed_in_debugger):
    run, failed = failed_in_debugger
    assert failed.code == 1
    assert "Traceback (most recent call last):" in failed.err
    assert "fault_injection.py" in failed.err
    assert failed.err.endswith("fm: ZeroDivisionError: a number\n")
    assert "fault_injection.py" in (run.path / "logs" / "train-error.log").read_text()
    assert read_json(run.path / "train-0.end.json")["kind"] == "error"
    assert not (run.path / "logs" / "restarts.jsonl").exists()
    assert not (run.path / "lock").exists()


def test_more_than_one_process_or_host_is_refused_in_one_line(tiny):
    for arguments, named in (
        (("train", "--launch.processes", "2"), "launch.processes 2"),
        (("sample", "--launch.hostfile", "hosts"), "launch.hostfile"),
        (("train", "--launch.slurm.nodes", "2"), "launch.slurm"),
        (("evaluate", "--evaluate.processes", "2"), "evaluate.processes 2"),
    ):
        run = TinyRun(tiny.root, "refused-debug", {"launch": {"processes": None, "kind": "debug"}})
        refused = run.fm(*arguments)
        assert refused.code == 2, refused.err
        assert named in refused.err
        assert refused.err.count("\n") == 1
        assert not run.path.exists()


def terminal(run: TinyRun, stage: str, at: str) -> Terminal:
    command = [sys.executable, "-m", "fm_core", stage, "--config", str(run.file), "--launch.kind", "debug"]
    environment = {**os.environ, **VARIABLES, "BREAKPOINT": at, "TERM": "dumb"}
    environment.pop("PYTHONBREAKPOINT", None)
    return Terminal(command, run.root, environment)


@pytest.fixture(scope="module")
def debugged_run(tiny) -> TinyRun:
    """A run whose ranks stop in the debugger, not trained yet."""
    over = {
        "launch": {"processes": 1, "threads": 1},
        "method": {"objective": "tests.support.breakpoints:Stopping"},
    }
    return TinyRun(tiny.root, "stopping", over)


def test_a_breakpoint_in_the_training_step_opens_the_debugger(debugged_run):
    fm = terminal(debugged_run, "train", "loss")
    try:
        fm.wait_for("(Pdb)")
        fm.type("x_t.shape\n")
        assert "torch.Size([16, 1, 8, 8])" in fm.wait_for("(Pdb)")
        # Ctrl-C at the prompt is the debugger's, and no request to stop.
        fm.type("while True: pass\n")
        fm.wait_for("pass")
        fm.type("\x03")
        assert "KeyboardInterrupt" in fm.wait_for("(Pdb)")
        refused = debugged_run.fm("train")
        assert refused.code == 2
        assert "is in use by process" in refused.err
        fm.type("c\n")
        assert fm.wait() == 0, fm.output
    finally:
        fm.kill()
    assert "train done" in fm.output
    assert read_json(debugged_run.path / "train" / "DONE.json")["step"] == 20


def test_quitting_the_debugger_in_a_sampling_rank_stops_the_stage_with_status_3(debugged_run):
    if not (debugged_run.path / "train" / "DONE.json").exists():
        assert debugged_run.fm("train", *IN_PROCESS).code == 0
    fm = terminal(debugged_run, "sample", "velocity")
    try:
        fm.wait_for("(Pdb)")
        fm.type("t.shape\n")
        assert "torch.Size([8])" in fm.wait_for("(Pdb)")
        fm.type("q\n")
        assert fm.wait() == 3, fm.output
    finally:
        fm.kill()
    assert "fm: the debugger was quit; run it again to continue" in fm.output
    assert not list(debugged_run.path.rglob("lock"))
    again = debugged_run.fm("sample", *IN_PROCESS)
    assert again.out.startswith("sample done"), again.err


def test_the_command_of_the_readme_debugs_a_stage(tiny):
    (command,) = [
        line
        for line in README.read_text().splitlines()
        if line.startswith("fm ") and "launch.kind debug" in line
    ]
    arguments = command.split()
    assert arguments[:2] == ["fm", "train"]
    config = arguments[arguments.index("--config") + 1]
    assert (README.parent / config).exists()
    run = TinyRun(tiny.root, "from-the-readme", {"launch": {"processes": None}})
    done = run.fm("train", *arguments[arguments.index("--config") + 2 :])
    assert done.code == 0, done.err
