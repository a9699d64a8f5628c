"""Every command of the README, run on a finished demo; long ones with a smaller configuration."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.demo_project import SHRUNKEN, Demo, clean_environment

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
STAGES = ("shard", "train", "sample", "evaluate", "report")
SMALL_PLANE = {"steps": 60, "batch": 16, "width": 8, "layers": 1, "held_out": 8, "samples": 64, "grid": 4}
SMALLER = {**SHRUNKEN, "train": {**SHRUNKEN["train"], "images": 1280, "log_images": 640}}


def flags(tree: dict[str, Any], prefix: str = "--") -> list[str]:
    """A nested mapping as command-line options."""
    options: list[str] = []
    for key, value in tree.items():
        options += (
            flags(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}", str(value)]
        )
    return options


def commands(beginning: str) -> list[str]:
    matches = [command for command in COMMANDS if command.startswith(beginning)]
    assert matches, f"the README no longer shows {beginning}"
    return matches


def test_every_command_is_of_a_kind_that_is_tested_here():
    kinds = ("bash infra/demo.sh", "bash infra/test.sh", "fm ", "prefect ")
    assert COMMANDS
    assert [command for command in COMMANDS if not command.startswith(kinds)] == []


def test_its_pictures_and_files_exist_and_nothing_is_left_to_fill_in():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert re.findall(r"^[A-Z]+_[A-Z_]+$", README, re.MULTILINE) == []


def test_the_demo_command_is_the_one_that_was_run(demo: Demo):
    assert commands("bash infra/demo.sh") == ["bash infra/demo.sh"]
    assert demo.result.returncode == 0


def test_the_test_command_finds_the_default_tests_and_with_all_the_others(demo: Demo):
    (command,) = commands("bash infra/test.sh")
    files = ("tests/flows/test_readme.py", "tests/test_tiers.py", "--collect-only", "-q")
    default, everything = (
        shell(demo.root, [*shlex.split(command), *more, *files]) for more in ((), ("--all",))
    )
    assert (default.returncode, everything.returncode) == (0, 0), default.stdout + everything.stdout
    assert "tests/test_tiers.py::" in default.stdout
    assert "test_the_stages_by_hand" not in default.stdout
    assert "--all adds" in default.stdout
    assert "test_the_stages_by_hand" in everything.stdout


def test_the_stages_by_hand(demo: Demo):
    for command in commands("fm "):
        arguments = shlex.split(command)
        arguments[0] = str(Path(sys.prefix) / "bin" / "fm")
        overrides = dict(SHRUNKEN) if "--run.name" not in arguments else dict(SMALLER)
        other_run = "--run.name" in arguments or "runs/" in command
        if arguments[1] == "reproduce":
            overrides = {"reproduce": {"plane": {**SMALL_PLANE, "rtol": 0.01, "atol": 0.01}}}
        if "runs/" in command:  # what was asked of that run is in its own configuration, but for the samples
            overrides = {"sample": {"images": 16, "batch": 16}}
        result = shell(demo.root, [*arguments, *flags(overrides)])
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        if not other_run and arguments[1] in STAGES:
            assert f"{arguments[1]} verified" in result.stdout, command


def test_the_server_and_worker_commands_are_those_of_the_demo(demo: Demo):
    for service in ("server", "worker"):
        (command,) = commands(f"prefect {service} start")
        pid = (demo.root / "runs" / ".prefect" / f"{service}.pid").read_text()
        running = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        assert set(shlex.split(command)[1:]) <= set(running)


def test_the_deployments_and_their_runs(demo: Demo):
    (deploy,) = commands("prefect --no-prompt deploy")
    result = demo.prefect(*shlex.split(deploy)[1:])
    assert result.returncode == 0, result.stdout + result.stderr
    for command in commands("prefect deployment run"):
        deployment, config = deployment_run(command)
        state = demo.watched(deployment, "--param", f"config={json.dumps(config)}")["state"]
        if deployment == "train-imagenet64":
            assert state["type"] == "FAILED"
            for archive in re.findall(r"`(Imagenet64_\w+\.zip)`", README):
                assert archive.split("_part")[0] in state["message"]
        else:
            assert state["type"] == "COMPLETED", state


def deployment_run(command: str) -> tuple[str, dict[str, Any]]:
    """The deployment a command names and its configuration, shrunken."""
    arguments = shlex.split(command)
    given = next(
        (argument.removeprefix("config=") for argument in arguments if argument.startswith("config=")), "{}"
    )
    config: dict[str, Any] = json.loads(given)
    if arguments[3] == "train-imagenet64":
        return arguments[3], config
    return arguments[3], {**(SMALLER if config else SHRUNKEN), **config}


def shell(root: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"PYTHONPATH": str(root)}
    return subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, timeout=400)
