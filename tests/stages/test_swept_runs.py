"""`fm sweep` in processes of its own: the page's command, runs that it trains, and a kill."""

import json
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest

from fm_core.config import load_config
from fm_core.storage.atomic_files import read_json
from tests.support import ROOT
from tests.support.page_commands import page_commands, starting_with
from tests.support.short_classifier import short_classifier
from tests.support.tiny_run import DEBUG, TinyRun

AXES = {"sample.solver": ["euler", "midpoint"], "sample.steps": [1, 3]}
CHEAP = ("--sample.trajectories", "0", "--evaluate.likelihood.images", "0")
ARGUMENTS = (*DEBUG, *CHEAP, "--sweep.axes", json.dumps(AXES))


def only(run: TinyRun, name: str) -> Path:
    (file,) = run.path.glob(f"sweep/solver-steps-*/{name}")
    return file


def stamps(run: TinyRun) -> dict[Path, int]:
    """Modification times of samples and scores."""
    files = [*run.path.glob("samples/*/*/*.tar"), *run.path.glob("evaluation/*/*.json")]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.fixture
def swept_by_the_page(tiny):
    """A run after the command that sampling-and-evaluation.md shows."""
    page = page_commands(ROOT / "infra" / "docs" / "sampling-and-evaluation.md")
    (command,) = starting_with("fm sweep", page)
    run = tiny.copy("of-the-page")
    _, _, _, _, *arguments = shlex.split(command)
    done = run.fm("sweep", *arguments, *DEBUG, *CHEAP)
    assert done.code == 0, done.err
    return run


def test_the_command_of_the_page_sweeps(swept_by_the_page):
    results = read_json(only(swept_by_the_page, "results.json"))
    assert [point["nfe"]["mean"] for point in results["points"]] == [8, 16, 16, 32]


@pytest.fixture(scope="module")
def swept_training(tiny):
    """A sweep over two learning rates and two numbers of steps, whose runs are trained."""
    axes = {"train.learning_rate": [0.01, 0.002], "sample.steps": [1, 2]}
    with short_classifier():
        keys = ("--run.name", "rates", "--train.images", "64", "--sweep.axes", json.dumps(axes))
        done = tiny.fm("sweep", *DEBUG, *CHEAP, *keys)
    assert done.code == 0, done.err
    return tiny.path.with_name("rates")


def test_points_of_training_are_normal_runs_that_are_trained_once(swept_training):
    for rate in ("0.01", "0.002"):
        run = swept_training.with_name(f"rates-learning_rate-{rate}")
        assert read_json(run / "train" / "DONE.json")["images_seen"] == 64
        lines = [json.loads(line) for line in (run / "logs" / "stages.jsonl").read_text().splitlines()]
        states = [line["state"] for line in lines if line["stage"] == "train"]
        assert states == ["done", "verified"]
        assert load_config(run / "config.yaml").sweep.axes == {}
        assert len(list(run.glob("samples/*/*/DONE.json"))) >= 2
    assert not (swept_training / "train").exists()
    (file,) = swept_training.glob("sweep/learning_rate-steps-*/results.json")
    results = read_json(file)
    assert len(results["points"]) == 4
    assert {point["run"] for point in results["points"]} == {
        "rates-learning_rate-0.01",
        "rates-learning_rate-0.002",
    }
    assert "rates-learning_rate-0.01" in file.with_name("sweep.html").read_text()


@pytest.fixture
def killed_sweep(tiny):
    """A run whose sweep was killed with SIGKILL after its first point was scored."""
    run = tiny.copy("killed")
    shutil.rmtree(run.path / "evaluation")
    process = run.start("sweep", *ARGUMENTS)
    try:
        deadline = time.monotonic() + 300
        while not list(run.path.glob("evaluation/*/ema-euler-1-*.json")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    return run


def test_after_a_kill_the_same_command_continues(killed_sweep):
    before = stamps(killed_sweep)
    status = killed_sweep.fm("status")
    assert "to continue: fm sweep --config" in status.out
    assert "logs/sweep.yaml" in status.out
    again = killed_sweep.fm("sweep", *ARGUMENTS)
    assert again.code == 0, again.err
    after = stamps(killed_sweep)
    assert {file: after[file] for file in before if "ema-euler-1-" in str(file)} == {
        file: stamp for file, stamp in before.items() if "ema-euler-1-" in str(file)
    }
    assert len(read_json(only(killed_sweep, "results.json"))["points"]) == 4
