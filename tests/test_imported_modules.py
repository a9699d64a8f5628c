"""Commands that compute nothing with torch do not import it: it takes seconds of CPU time."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPT = """
import sys
from fm_core.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "deepspeed", "torchdiffeq", "prefect", "matplotlib"}
print(code, *sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


def modules_of(folder: Path, *command: str) -> str:
    """Exit code and heavy modules of a command, in an interpreter of its own."""
    places = ("--run.root", str(folder / "runs"), "--data.root", str(folder / "sets"))
    config = ("--config", str(ROOT / "infra" / "configs" / "digits.yaml"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, command[0], *config, *places, *command[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", [("shard",), ("validate", "--quick"), ("status",)], ids=" ".join)
def test_data_commands_and_status_need_no_torch(folder, command):
    assert modules_of(folder, *command) == "0"


def test_a_comparison_of_scores_needs_no_torch(folder):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "compare", str(folder)], capture_output=True, text=True, cwd=folder
    )
    assert done.stderr.splitlines()[-1] == "2"  # there is nothing to compare


def test_help_needs_no_torch(folder):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fm_core", "train", "--help"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {
        line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")
    }
    assert "fm_core.cli" in imported
    assert not imported & {"torch", "deepspeed", "prefect", "numpy", "scipy"}
