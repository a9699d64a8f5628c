"""The README's commands that take seconds, called in this process on a run of four steps."""

import shlex
import signal
from pathlib import Path

import pytest

from fm_core.cli import main
from tests.support import ROOT
from tests.support.demo_project import SMALL_NETWORK
from tests.support.page_commands import flags, page_commands, starting_with

SMALL = {
    "model": SMALL_NETWORK,
    "train": {"images": 64, "global_batch": 16, "log_images": 32, "warmup_images": 0},
    "sample": {"images": 8, "batch": 8, "solver": "euler", "steps": 2},
    "launch": {"kind": "debug", "threads": 1},
}


ANOTHER_RUN = ("--run.name", "another")
"""For the configuration as it is."""
COMMANDS = page_commands(ROOT / "README.md")


def commands(beginning: str) -> list[str]:
    return starting_with(beginning, COMMANDS)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the README's relative paths mean what they mean in a clone."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "infra").symlink_to(ROOT / "infra")
    return folder


@pytest.fixture(autouse=True)
def _in_the_project(project: Path, monkeypatch: pytest.MonkeyPatch):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(project)
    yield
    signal.signal(signal.SIGTERM, handler)


def call(capsys: pytest.CaptureFixture[str], command: str, *more: str) -> str:
    """What a command prints; it has to succeed."""
    program, *arguments = shlex.split(command)
    assert program == "fm"
    try:
        code = main([*arguments, *more])
    except SystemExit as end:  # --help
        code = end.code
    printed = capsys.readouterr()
    assert code == 0, f"{command}\n{printed.out}{printed.err}"
    return printed.out


def test_the_stages_by_hand_in_their_order(capsys):
    small = flags(SMALL)
    for stage in ("shard", "train", "sample"):
        command = f"fm {stage} --config infra/configs/digits.yaml"
        assert command in COMMANDS
        assert f"{stage} done" in call(capsys, command, *small)
        assert f"{stage} verified" in call(capsys, command, *small)
    (status,) = commands("fm status")
    assert "sample" in call(capsys, status)
    # The run's own file says what was asked; other samples of it take only what differs.
    (other,) = commands("fm sample --config runs/")
    ours = other.replace("runs/slower", "runs/digits").replace("--sample.steps 20", "--sample.steps 2")
    assert "sample done" in call(capsys, ours)


@pytest.fixture
def shards(capsys) -> None:
    """The data set, of another test or new."""
    call(capsys, "fm shard --config infra/configs/digits.yaml", *ANOTHER_RUN)


def test_the_stage_to_debug_is_the_same_run_in_one_process(capsys, shards):
    (command,) = [each for each in commands("fm train") if "--launch.kind debug" in each]
    small = flags({key: value for key, value in SMALL.items() if key != "launch"})
    assert "train done" in call(capsys, command, *small)


def test_checks_of_the_data_and_of_a_configuration(capsys, shards):
    for flag in ((), ("--quick",), ("--deep",)):
        call(capsys, "fm validate --config infra/configs/digits.yaml", *ANOTHER_RUN, *flag)
    (cost,) = commands("fm doctor")
    assert "295,131,267" in call(capsys, cost)  # parameters
    call(capsys, "fm doctor --config infra/configs/digits.yaml --model", *ANOTHER_RUN)


@pytest.mark.parametrize("command", ["fm --help", "fm train --help", "fm reproduce --help"])
def test_help_is_printed(capsys, command: str):
    assert "usage" in call(capsys, command).lower()


def test_a_comparison_is_estimated_without_starting_it(capsys):
    (command,) = commands("fm reproduce")
    call(capsys, command, "--dry-run")
    assert not Path("runs/checkerboard/reproduce").exists()
