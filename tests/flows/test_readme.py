"""Every command of the README, run on a finished demo; long ones with a smaller configuration."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from fm_core.config import ReproduceSection, load_config
from tests.support import ROOT
from tests.support.demo_project import SHRUNKEN, Demo, created_run
from tests.support.page_commands import flags, page_commands, starting_with

README = (ROOT / "README.md").read_text()
COMMANDS = page_commands(ROOT / "README.md")
STAGES = ("shard", "train", "sample", "evaluate", "report")
SMALL_TOY2D = {"steps": 60, "batch": 16, "width": 8, "layers": 1, "held_out": 8, "samples": 64, "grid": 4}
SMALL_TOY2D |= {"rtol": 0.01, "atol": 0.01}
DEBUG = {**SHRUNKEN, "launch": {"kind": "debug"}}
"""For runs beside the demo's: one process, the command's or the flow run's own. The demo trains with two."""


def commands(beginning: str) -> list[str]:
    return starting_with(beginning, COMMANDS)


def test_every_command_is_of_a_kind_that_is_tested_here():
    kinds = ("bash infra/demo.sh", "bash infra/test.sh", "bash infra/serve.sh", "fm ", "prefect ")
    assert COMMANDS
    assert [command for command in COMMANDS if not command.startswith(kinds)] == []


def test_its_pictures_and_files_exist_and_nothing_is_left_to_fill_in():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []
    assert re.findall(r"^[A-Z]+_[A-Z_]+$", README, re.MULTILINE) == []


def test_the_demo_command_is_the_one_that_was_run(demo: Demo):
    assert commands("bash infra/demo.sh") == ["bash infra/demo.sh"]
    assert demo.result.returncode == 0


def test_the_test_command_finds_the_default_tests_and_with_all_the_others(demo: Demo):
    (command,) = commands("bash infra/test.sh")
    files = ("tests/flows/test_readme.py", "tests/test_tiers.py", "--collect-only", "-q")
    default, everything = (demo.shell(*shlex.split(command), *more, *files) for more in ((), ("--all",)))
    assert (default.returncode, everything.returncode) == (0, 0), default.stderr + everything.stderr
    assert "tests/test_tiers.py::" in default.stdout
    assert "test_the_stages_by_hand" not in default.stdout
    assert "--all adds" in default.stdout
    assert "test_the_stages_by_hand" in everything.stdout


def small_toy2d(reproduce: ReproduceSection) -> dict[str, Any]:
    """Overrides for the 2-D comparison: two of its experiments and its student, all with few steps."""
    cells = [cell for cell in reproduce.cells if cell.name in ("ddpm", "fm-ot")]
    students = [
        student.model_dump(mode="json", exclude_unset=True) | {"pairs": 32, "steps": 2}
        for student in reproduce.few_steps.students
    ]
    few_steps = {"experiments": ["ddpm", "fm-ot"], "solvers": ["euler"], "students": students}
    return {
        "toy2d": SMALL_TOY2D,
        "cells": json.dumps([cell.model_dump(mode="json", exclude_unset=True) for cell in cells]),
        "few_steps": {key: json.dumps(value) for key, value in few_steps.items()},
    }


def test_the_stages_by_hand(demo: Demo):
    for command in commands("fm "):
        if "photographs" in command:
            continue  # tests/infra/test_your_own_images.py
        arguments = shlex.split(command)
        overrides = dict(SHRUNKEN) if "--run.name" not in arguments else dict(DEBUG)
        other_run = "--run.name" in arguments or "runs/" in command
        if arguments[1] == "reproduce":
            file = demo.root / "infra" / "configs" / "checkerboard.yaml"
            overrides = {"reproduce": small_toy2d(load_config(file).reproduce)}
        if "runs/" in command:  # what was asked of that run is in its own configuration, but for the samples
            overrides = {"sample": {"images": 16, "batch": 16}}
        if "--launch.kind" in arguments:
            del overrides["launch"]
        if arguments[1] == "doctor":
            overrides = {}
        result = demo.command(*arguments, *flags(overrides))
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        if not other_run and arguments[1] in STAGES:
            assert f"{arguments[1]} verified" in result.stdout, command


def test_the_server_and_worker_commands_are_those_of_the_demo(demo: Demo):
    assert commands("bash infra/serve.sh") == ["bash infra/serve.sh"]
    (worker,) = commands("prefect worker start")
    for service, command in {"server": "prefect server start", "worker": worker}.items():
        pid = (demo.root / "runs" / ".prefect" / f"{service}.pid").read_text()
        running = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        assert set(shlex.split(command)[1:]) <= set(running)


def test_the_deployments_and_their_runs(demo: Demo, imagenet_without_archives: dict[str, Any]):
    (deploy,) = commands("prefect --no-prompt deploy")
    demo.page_command(deploy)
    for command in commands("prefect deployment run"):
        arguments = shlex.split(command)
        if arguments[3] == "train-imagenet64":
            assert command == "prefect deployment run train-imagenet64"
            state = imagenet_without_archives["state"]
            assert state["type"] == "FAILED"
            for archive in re.findall(r"`(Imagenet64_\w+\.zip)`", README):
                assert archive.split("_part")[0] in state["message"]
        elif arguments[3] == "train-images":  # tests/infra/test_your_own_images.py runs its stages
            run_id = created_run(demo.command(*arguments, "--start-in", "2 hours"))
            assert demo.run(run_id)["parameters"]["config_file"] == "photographs.yaml"
            assert demo.prefect("flow-run", "delete", run_id).returncode == 0
        elif "--param" not in arguments:  # a run of minutes; the demo ran the same on its configuration
            run_id = created_run(demo.command(*arguments, "--start-in", "2 hours"))
            assert demo.run(run_id)["deployment_id"] == demo.run(demo.run_id)["deployment_id"]
            assert demo.prefect("flow-run", "delete", run_id).returncode == 0
        else:
            config = json.loads(arguments[arguments.index("--param") + 1].removeprefix("config="))
            arguments[arguments.index("--param") + 1] = f"config={json.dumps(DEBUG | config)}"
            state = demo.run(created_run(demo.command(*arguments)))["state"]
            assert state["type"] == "COMPLETED", state
