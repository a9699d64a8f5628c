"""`infra/demo.sh`: a first and a second run, refusals, and an interruption."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.demo_project import SHRUNKEN, Demo, clean_environment, copy_of_the_tree, demo_command

pytestmark = pytest.mark.slow
STAGES = ("shard", "train", "sample", "evaluate", "report")


def test_the_demo_ends_with_a_report(demo: Demo):
    lines = demo.result.stdout.splitlines()
    assert demo.result.returncode == 0, demo.result.stdout + demo.result.stderr
    assert demo.result.stderr == ""
    report = next(line for line in lines if line.startswith("report: "))
    assert report == f"report: {demo.root}/runs/digits/report.html"
    assert "<img" in Path(report.removeprefix("report: ")).read_text()


def test_a_taken_port_is_reported_and_another_one_is_used(demo: Demo):
    lines = demo.result.stdout.splitlines()
    assert demo.port != 4200
    assert lines[0] == f"port 4200 is in use; the Prefect server takes {demo.port}"
    assert lines[1] == f"Prefect UI: http://127.0.0.1:{demo.port}"


def test_progress_is_on_the_terminal(demo: Demo):
    assert "train running: " in demo.result.stdout
    for stage in STAGES:
        assert f"task-run.Completed * {stage}" in demo.result.stdout


def test_everything_is_deployed(demo: Demo):
    flows = {flow["id"]: flow["name"] for flow in demo.api("/flows/filter", {})}
    deployed = {
        f"{flows[deployment['flow_id']]}/{deployment['name']}": deployment
        for deployment in demo.api("/deployments/filter", {})
    }
    assert set(deployed) == {
        "train-digits/default",
        "train-images/default",
        "train-imagenet32/default",
        "train-imagenet64/default",
        "reproduce-paper/default",
        "reproduce-digits/default",
        "reproduce-cifar10/default",
        "reproduce-imagenet32/default",
        "reproduce-imagenet64/default",
        "shard-dataset/default",
        "train-model/default",
        "sample-images/default",
        "evaluate-model/default",
    }
    for deployment in deployed.values():
        assert deployment["job_variables"] == {
            "stream_output": False,
            "env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60"},
        }
        assert deployment["enforce_parameter_schema"]
        assert deployment["description"]
        assert deployment["tags"]


def test_the_server_listens_on_the_loopback_interface_alone(demo: Demo):
    listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == demo.port]
    assert set(listening) == {"127.0.0.1"}


def test_the_second_demo_verifies_and_says_so(demo: Demo):
    began = time.monotonic()
    again = demo_command(demo.root, "--keep", "--", json.dumps(SHRUNKEN))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to do, everything was complete" in again.stdout
    assert "using the Prefect server that is already running here" in again.stdout
    assert time.monotonic() - began < 120
    # The graph says so too: hashes were compared, nothing was made.
    second = again.stdout.split("UUID: ")[1].split()[0]
    bars = demo.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [second]}}})
    assert {bar["state"]["name"] for bar in bars} == {"Cached"}
    assert len(bars) == len(STAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--", '{"trian": {}}'], "demo.sh: infra/configs/digits.yaml: trian: unknown key\n"),
        (["--", "{"], "demo.sh: after -- JSON is expected"),
        (["--", "3"], "demo.sh: after -- a JSON object of sections is expected, not 3\n"),
        (["--name", "a/b"], "demo.sh: infra/configs/digits.yaml: run.name: "),
        (["--kepe"], "demo.sh: --kepe is not an option; see --help\n"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(tmp_path: Path, options: list[str], message: str):
    refused = demo_command(copy_of_the_tree(tmp_path), *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(message)
    assert refused.stderr.count("\n") == 1


def test_a_machine_without_a_recent_python_is_refused_in_one_line(tmp_path: Path):
    old = {**clean_environment(), "PYTHON": "/usr/bin/false"}
    del old["FM_ENVIRONMENT"]
    command = ["bash", "infra/demo.sh"]
    refused = subprocess.run(command, cwd=copy_of_the_tree(tmp_path), env=old, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(
        "demo.sh: no Python >= 3.11 with its venv module found at /usr/bin/false;"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(tmp_path)]
    if subprocess.run(mounted, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_refused_in_one_line(small_disk: Path):
    refused = demo_command(copy_of_the_tree(small_disk))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"MiB free under {small_disk}; the demo needs 1024 MiB" in refused.stderr
    assert refused.stderr.count("\n") == 1


def processes_below(root: Path) -> list[psutil.Process]:
    matches: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            ours = str(root) in (process.environ().get("PYTHONPATH") or "")
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                matches.append(process)
        except psutil.Error:
            continue
    return matches


def test_an_interrupted_demo_leaves_checkpoints_and_no_process(tmp_path: Path):
    root = copy_of_the_tree(tmp_path)
    long_run = json.dumps({"train": {"images": 1_000_000, "log_images": 640}})
    with (tmp_path / "output.txt").open("w") as output:
        demo = subprocess.Popen(
            ["bash", "infra/demo.sh", "--", long_run],
            cwd=root,
            env=clean_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Whoever started the tests in the background had them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    metrics = root / "runs" / "digits" / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() and demo.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(demo.pid, signal.SIGINT)  # what Ctrl-C does
    try:
        status = demo.wait(timeout=120)
    except subprocess.TimeoutExpired:
        for process in processes_below(root):
            process.kill()
        raise
    printed = (tmp_path / "output.txt").read_text()
    assert metrics.exists(), printed
    assert status == 3, printed
    assert list((root / "runs" / "digits" / "train" / "checkpoints").glob("step-*/COMPLETE")), printed
    assert processes_below(root) == []
