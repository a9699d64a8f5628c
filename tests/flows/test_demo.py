"""`infra/demo.sh`: a first and a second run, and refusals."""

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.demo_project import (
    SHRUNKEN,
    Demo,
    clean_environment,
    copy_of_the_tree,
    created_run,
    demo_command,
)

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
    password_file = demo.root / "runs" / ".prefect" / f"api-auth-{demo.port}"
    assert lines[2] == f"its login asks once for the password in {password_file}"
    assert password_file.stat().st_mode & 0o777 == 0o600


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
        "distill-model/default",
        "sweep/default",
        "sweep-point/default",
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


def test_the_api_wants_the_password_and_nothing_shows_it(demo: Demo):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://127.0.0.1:{demo.port}/api/admin/version", timeout=60
        )
    assert refused.value.code == 401
    secret = demo.password.partition(":")[2].encode()
    assert secret not in (demo.result.stdout + demo.result.stderr).encode()
    files = [
        path for path in (demo.root / "runs").rglob("*") if path.is_file() and "api-auth-" not in path.name
    ]
    assert [path for path in files if secret in path.read_bytes()] == []
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert [command for command in commands if secret.decode() in command] == []


def test_the_server_listens_on_the_loopback_interface_alone(demo: Demo):
    listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == demo.port]
    assert set(listening) == {"127.0.0.1"}


def test_the_second_demo_verifies_and_says_so(demo: Demo):
    again = demo_command(demo.root, "--keep", "--", json.dumps(SHRUNKEN))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to do, everything was complete" in again.stdout
    assert "using the Prefect server that is already running here" in again.stdout
    # The graph says so too: hashes were compared, nothing was made.
    bars = demo.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [created_run(again)]}}})
    assert {bar["state"]["name"] for bar in bars} == {"Cached"}
    assert len(bars) == len(STAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--", '{"trian": {}}'],
            "demo.sh: infra/configs/digits.yaml: trian: unknown key; did you mean train?\n",
        ),
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
