"""Every command of the page on operations, run on a finished demo."""

import json
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

from fm_core.storage.atomic_files import write_json
from fm_core.storage.store import Store
from tests.support import ROOT
from tests.support.demo_project import SERVE, SHRUNKEN, WORKER, Demo, created_run
from tests.support.operator import until
from tests.support.page_commands import page_commands

OPERATIONS = ROOT / "infra" / "docs" / "operations.md"
PAGE = OPERATIONS.read_text()
COMMANDS = page_commands(OPERATIONS)
ELSEWHERE = (SERVE, WORKER)
"""Commands that run until they are stopped: test_team_server.py runs them, from these same strings."""
INLINE = [" ".join(command.split()) for command in re.findall(r"`(fm [^`]+)`", PAGE)]
"""Commands of a stage in running text."""
ON_A_RUN = ("prefect flow-run cancel RUN_ID", "prefect flow-run retry RUN_ID")


def later(demo: Demo, command: str) -> str:
    """Create the run of a command, for another time; its id."""
    return created_run(demo.command(*shlex.split(command), "--start-in", "2 hours"))


def test_commands_that_do_not_end_run_in_another_test(demo: Demo):
    assert set(ELSEWHERE) <= set(COMMANDS)
    pid = (demo.root / "runs" / ".prefect" / "worker.pid").read_text()
    running = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    assert set(shlex.split(WORKER)[1:]) <= set(running)


def test_every_other_command_succeeds(demo: Demo):
    others = [command for command in COMMANDS if command not in (*ELSEWHERE, *ON_A_RUN)]
    for command in others:
        if command.startswith("prefect deployment run"):
            assert demo.prefect("flow-run", "delete", later(demo, command)).returncode == 0
        elif command != "git pull":
            demo.page_command(command)
    (demo.root / "runs" / "digits" / "STOP").unlink()
    again = demo.command("python", "-m", "flows.automations")
    rules = again.stdout.splitlines()
    assert len(rules) == 3, again.stderr
    assert all(line.endswith(": updated") for line in rules)


def test_a_run_that_crashes_again_and_again_is_failed(demo: Demo):
    """The rule of the sixth crash, with two; this run has no deployment, so that no worker takes it up."""
    text = (demo.root / "infra" / "automations.yaml").read_text()
    assert text.count("threshold: 6") == 1
    (demo.root / "rules.yaml").write_text(text.replace("threshold: 6", "threshold: 2"))
    assert demo.command("python", "-m", "flows.automations", "rules.yaml").returncode == 0
    flow = demo.api("/flows/", {"name": "crashing"})["id"]
    run_id = demo.api("/flow_runs/", {"flow_id": flow, "tags": ["auto-resume"]})["id"]
    again = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    query = {"filter": {"event": {"name": ["prefect.flow-run.AwaitingRetry"]}}, "limit": 50}

    def restarts() -> int:
        events = demo.api("/events/filter", query)["events"]
        return sum(event["resource"]["prefect.resource.id"].endswith(run_id) for event in events)

    demo.api(f"/flow_runs/{run_id}/set_state", again)
    until(lambda: restarts() == 1, "the server has seen the first crash")
    assert demo.run(run_id)["state"]["name"] == "AwaitingRetry"
    demo.api(f"/flow_runs/{run_id}/set_state", again)
    until(lambda: demo.run(run_id)["state"]["type"] == "FAILED", "the run has failed")
    assert demo.run(run_id)["state"]["message"].startswith("it crashed six times within a day")
    assert demo.command("python", "-m", "flows.automations").returncode == 0


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


def test_a_stage_alone_is_cancelled_before_it_begins_and_retried(demo: Demo):
    """One that trains is cancelled and retried in test_long_run.py."""
    assert set(ON_A_RUN) <= set(COMMANDS)
    config = {**SHRUNKEN, "sample": {"images": 24, "batch": 24, "solver": "euler", "steps": 4}}
    config["launch"] = {"kind": "debug"}  # two processes sample in the demo
    run_id = later(demo, f"prefect deployment run sample-images --param 'config={json.dumps(config)}'")
    cancel, retry = (command.replace("RUN_ID", run_id) for command in ON_A_RUN)
    demo.page_command(cancel)
    assert demo.run(run_id)["state"]["type"] == "CANCELLED"
    demo.page_command(retry)
    until(lambda: demo.run(run_id)["state"]["type"] == "COMPLETED", "the worker takes it up")
    assert demo.run(run_id)["state"]["message"] == "24 images of step 10 with euler, NFE 4"


def test_files_that_it_names_exist():
    named = set(re.findall(r"`((?:infra|tests)/[\w./-]+?)/?`", PAGE))
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert [name for name in missing if name != "infra/.env"] == []
