"""Every command of the operator's page (infra/README.md), run on a finished demo."""

import json
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fm_core.storage.atomic_files import write_json
from fm_core.storage.store import Store
from tests.support import ROOT
from tests.support.demo_project import SERVE, SHRUNKEN, WORKER, Demo, clean_environment
from tests.support.operator import until

pytestmark = pytest.mark.slow

PAGE = (ROOT / "infra" / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
ELSEWHERE = (SERVE, WORKER)
"""Commands that do not end by themselves: test_team_server.py runs them, from these same strings."""
INLINE = [" ".join(command.split()) for command in re.findall(r"`(fm [^`]+)`", PAGE)]
"""Commands of a stage in running text."""
ON_A_RUN = ("prefect flow-run cancel RUN_ID", "prefect flow-run retry RUN_ID")


def run(demo: Demo, command: str) -> str:
    arguments = shlex.split(command)
    if arguments[0] in ("prefect", "python"):
        done = demo.command(*arguments)
    else:
        environment = clean_environment()
        done = subprocess.run(
            arguments, cwd=demo.root, env=environment, capture_output=True, text=True, timeout=180
        )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def later(demo: Demo, command: str) -> str:
    """Create the run of a command, for another time; its id."""
    return run(demo, f"{command} --start-in '2 hours'").split("UUID: ")[1].split()[0]


def test_commands_that_do_not_end_run_in_another_test(demo: Demo):
    assert set(ELSEWHERE) <= set(COMMANDS)
    pid = (demo.root / "runs" / ".prefect" / "worker.pid").read_text()
    running = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    assert set(shlex.split(WORKER)[1:]) <= set(running)


def test_every_other_command_succeeds(demo: Demo):
    others = [command for command in COMMANDS if command not in (*ELSEWHERE, *ON_A_RUN)]
    for command in others:
        if command.startswith("prefect deployment run"):
            run(demo, f"prefect flow-run delete {later(demo, command)}")
        elif command != "git pull":
            run(demo, command)
    (demo.root / "runs" / "digits" / "STOP").unlink()
    rules = run(demo, "python -m flows.automations").splitlines()
    assert len(rules) == 3
    assert all(line.endswith(": updated") for line in rules)


def test_a_run_that_crashes_again_and_again_is_failed(demo: Demo):
    """The rule of the sixth crash, with two; this run has no deployment, so that no worker takes it up."""
    text = (demo.root / "infra" / "automations.yaml").read_text()
    assert text.count("threshold: 6") == 1
    (demo.root / "rules.yaml").write_text(text.replace("threshold: 6", "threshold: 2"))
    run(demo, "python -m flows.automations rules.yaml")
    flow = demo.api("/flows/", {"name": "crashing"})["id"]
    run_id = demo.api("/flow_runs/", {"flow_id": flow, "tags": ["auto-resume"]})["id"]
    again = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    demo.api(f"/flow_runs/{run_id}/set_state", again)
    time.sleep(3)
    assert demo.run(run_id)["state"]["name"] == "AwaitingRetry"
    demo.api(f"/flow_runs/{run_id}/set_state", again)
    until(lambda: demo.run(run_id)["state"]["type"] == "FAILED", 45, "the run is given up")
    assert demo.run(run_id)["state"]["message"].startswith("it crashed six times within a day")
    run(demo, "python -m flows.automations")


def test_commands_in_running_text_succeed(demo: Demo):
    run_directory = demo.root / "runs" / "digits"
    (newest,) = [path for path in [max(run_directory.glob("train/checkpoints/step-*"))] if path.is_dir()]
    best = run_directory / "beside" / "checkpoints" / newest.name
    shutil.copytree(newest, best, ignore=shutil.ignore_patterns("optimizer"))
    samples = set(run_directory.glob("samples/*/*"))
    asked = (run_directory / "config.yaml").read_bytes()
    few = ("--sample.images", "8", "--sample.solver", "euler", "--sample.steps", "2")
    seen: set[str] = set()
    for command in INLINE:
        arguments = command.replace("<run.name>", "digits").split()
        if "--config" in arguments:
            seen.add(arguments[1])
            done = demo.command(*arguments, *(few if arguments[1] == "sample" else ()))
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert seen == {"status", "sample"}
    assert (run_directory / "config.yaml").read_bytes() == asked
    (made,) = set(run_directory.glob("samples/*/*")) - samples
    shutil.rmtree(made)
    shutil.rmtree(run_directory / "beside")


def test_a_backup_holds_complete_files_and_none_that_is_being_written(tmp_path: Path):
    (command,) = [command for command in COMMANDS if command.startswith("tar ")]
    folder = tmp_path / "runs" / "a" / "train" / "checkpoints"
    (folder / "step-00000010").mkdir(parents=True)
    write_json(folder / "step-00000010" / "COMPLETE", {"files": {}})
    tempfile.mkstemp(dir=folder / "step-00000010", prefix=".state.json.")  # as write_bytes makes them
    with suppress(KeyboardInterrupt), Store.at(str(folder)).staged("raw.safetensors") as (stage, _):
        left = tmp_path / stage.name
        shutil.copy(stage, left)
        raise KeyboardInterrupt
    left.rename(folder / left.name)
    (tmp_path / "runs" / ".prefect").mkdir()
    (tmp_path / "runs" / ".prefect" / "prefect.db").touch()
    assert subprocess.run(shlex.split(command), cwd=tmp_path).returncode == 0
    with tarfile.open(tmp_path / "backup.tar.gz") as archive:
        files = [member.name for member in archive.getmembers() if member.isfile()]
    assert files == ["runs/a/train/checkpoints/step-00000010/COMPLETE"]


def test_pulling_is_all_that_a_clone_needs(tmp_path: Path):
    assert "git pull" in COMMANDS
    script = """
        set -e; git init -q -b main here; cd here; git config user.email a@b; git config user.name a
        git commit -q --allow-empty -m one; cd ..; git clone -q here clone
        cd here; git commit -q --allow-empty -m two; cd ../clone; git pull; git log --format=%s | head -n 1
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "two", done.stderr


def test_cancelling_and_retrying(demo: Demo):
    """Before it began; one that trains is cancelled and retried in test_long_run.py."""
    assert set(ON_A_RUN) <= set(COMMANDS)
    run_id = later(demo, f"prefect deployment run train-digits --param 'config={json.dumps(SHRUNKEN)}'")
    cancel, retry = (command.replace("RUN_ID", run_id) for command in ON_A_RUN)
    run(demo, cancel)
    assert demo.run(run_id)["state"]["type"] == "CANCELLED"
    run(demo, retry)
    until(lambda: demo.run(run_id)["state"]["type"] == "COMPLETED", 120, "the worker takes it up")
    assert "nothing to do, everything was complete" in demo.run(run_id)["state"]["message"]


def test_files_that_it_names_exist():
    named = set(re.findall(r"`((?:infra|tests)/[\w./-]+?)/?`", PAGE))
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert [name for name in missing if name != "infra/.env"] == []
