"""Libraries that commands and modules import, and those that they do not: torch takes seconds of CPU time."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.command_server import CommandServer
from tests.test_architecture import CORE, modules, name_of

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


@pytest.fixture(scope="module")
def data_process(folder: Path) -> Iterator[CommandServer]:
    """A process that has imported what reads scikit-learn's digits."""
    server = CommandServer(folder, os.environ | {"PYTHONPATH": str(ROOT)}, ["numpy", "sklearn.datasets"])
    yield server
    server.close()


def modules_of(server: CommandServer, *command: str) -> str:
    """Exit code and heavy modules of a command."""
    return server.run("python", "-c", SCRIPT, *command).stderr.splitlines()[-1]


@pytest.mark.parametrize("command", [("shard",), ("validate", "--quick"), ("status",)], ids=" ".join)
def test_data_commands_and_status_need_no_torch(data_process, folder, command):
    places = ("--run.root", str(folder / "runs"), "--data.root", str(folder / "sets"))
    config = ("--config", str(ROOT / "infra" / "configs" / "digits.yaml"))
    if command[0] == "validate":
        modules_of(data_process, "shard", *config, *places)
    assert modules_of(data_process, command[0], *config, *places, *command[1:]) == "0"


def test_a_comparison_of_scores_needs_no_torch(data_process, folder):
    assert modules_of(data_process, "compare", str(folder)) == "2"  # there is nothing to compare


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


UNET_SHAPE = """
import sys
from fm_core.config import parse_config
from fm_core.models.build import build_meta_network
unet = {"channels": 32, "attention_resolutions": [8], "class_conditional": True}
build_meta_network(parse_config({"model": unet}, "here").model, (3, 16, 16), 10)
print("torch._dynamo" in sys.modules)
"""
TRAINING = """
import sys
import fm_core.stages.train, fm_core.training.train_worker
from fm_core.config import parse_config
from fm_core.models.build import build_method
build_method(parse_config({}, "here").method)
unused = {"scipy", "sklearn", "torchdiffeq", "torch._dynamo", "matplotlib", "jinja2"}
print(*sorted(unused & set(sys.modules)))
"""
WITHOUT_PREFECT = """
import importlib, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "prefect":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

assert "prefect" not in sys.modules
sys.meta_path.insert(0, NotInstalled())
try:
    import prefect
    raise SystemExit("prefect was found")
except ModuleNotFoundError:
    pass
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1, "imported")
"""


@pytest.fixture(scope="module")
def network_process() -> Iterator[CommandServer]:
    """A process that has imported what builds networks."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    server = CommandServer(ROOT, variables, ["fm_core.models.build"])
    yield server
    server.close()


def test_the_shape_of_a_unet_is_had_without_the_compiler(network_process: CommandServer):
    """Every `fm train` asks for it; the import takes more than a second."""
    done = network_process.run("python", "-c", UNET_SHAPE)
    assert done.stdout == "False\n", done.stderr


SHARD_CHECKS = """
import sys
from fm_core.commands import preflight
from fm_core.config import parse_config
preflight(parse_config({"run": {"root": sys.argv[1]}, "data": {"root": sys.argv[1]}}, "here"), ["shard"])
print("torch" in sys.modules)
"""


def test_the_checks_before_sharding_need_no_torch(data_process, tmp_path):
    assert data_process.run("python", "-c", SHARD_CHECKS, str(tmp_path)).stdout == "False\n"


def test_checks_and_ranks_of_a_training_import_only_what_they_use():
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "\n", done.stderr[-2000:]


def test_every_module_imports_where_prefect_is_not_installed(network_process: CommandServer):
    names = [name_of(path) for path in modules(CORE) if path.stem != "__main__"]
    assert len(names) > 50
    done = network_process.run("python", "-c", WITHOUT_PREFECT, *names)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(names)} imported"
