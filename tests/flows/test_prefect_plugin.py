"""The plugin resolves bare deployment names and finds the server's password, and nothing else changes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.prefect_plugin import api_password
from tests.support import ROOT
from tests.support.demo_project import Demo, created_run

STOCK = "Invalid deployment name format: {}. Expected format: <FLOW_NAME>/<DEPLOYMENT_NAME>"


def python(code: str, cwd: Path = ROOT, **variables: str) -> str:
    command, environment = [sys.executable, "-c", code], {**os.environ, **variables}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize("name", ["train-digits", "train-digits/default", "train-imagenet64"])
def test_a_bare_name_is_the_default_deployment(demo: Demo, name: str):
    result = demo.prefect("deployment", "run", name, "--start-in", "2 hours")
    run_id = created_run(result)
    run = demo.run(run_id)
    deployment = demo.api(f"/deployments/{run['deployment_id']}")
    flow = demo.api(f"/flows/{run['flow_id']}")
    assert (flow["name"], deployment["name"]) == (name.split("/")[0], "default")
    assert demo.prefect("flow-run", "delete", run_id).returncode == 0


def test_an_unknown_flow_name_gets_prefects_own_message(demo: Demo):
    result = demo.prefect("deployment", "run", "train-nothing")
    assert result.returncode == 1
    assert STOCK.format("train-nothing") in result.stdout + result.stderr


def test_without_the_plugin_prefect_is_as_it_was(demo: Demo):
    variables = {"PREFECT_PLUGINS_ENABLED": "false", "PREFECT_API_AUTH_STRING": demo.password}
    result = demo.prefect("deployment", "run", "train-digits", **variables)
    assert result.returncode == 1
    assert STOCK.format("train-digits") in result.stdout + result.stderr


WORKER = """
import os, signal, subprocess, sys, time
import prefect.main
from prefect.utilities.processutils import setup_signal_handlers_worker
setup_signal_handlers_worker(os.getpid(), "the worker", lambda text: print(text, flush=True))
environment = {**os.environ, "PREFECT__FLOW_RUN_ID": "1"}
run = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment, start_new_session=True)
try:
    while True:
        run.poll()
        time.sleep(0.1)
except KeyboardInterrupt:
    print("the run ended with", run.poll(), flush=True)
"""
RUN = """
import signal, sys, time
def save(number, frame):
    time.sleep(1.0)
    sys.exit(5)
signal.signal(signal.SIGTERM, save)
print("running", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_ended_lets_its_runs_save_first(number: signal.Signals):
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert worker.stdout
        assert worker.stdout.readline() == "running\n"
        worker.send_signal(number)
        printed = worker.communicate(timeout=60)[0]
    finally:
        worker.kill()
    assert printed.startswith("asking 1 flow run(s) to save")
    assert printed.endswith("the run ended with 5\n")


def test_the_plugin_is_loaded_and_brings_nothing_heavy():
    loaded = python(
        "import sys, prefect.main\n"
        "print('flows.prefect_plugin' in sys.modules,"
        " sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'fm_core', 'numpy'}))",
    )
    assert loaded == "True []"


@pytest.mark.parametrize("missing", ["the module", "the method"])
def test_a_prefect_that_has_changed_is_not_modified(missing: str):
    hide = {
        "the module": "sys.modules['prefect.client.orchestration'] = None",
        "the method": "del client.__mro__[[hasattr(c, '__dict__') and 'read_deployment_by_name' in c.__dict__"
        " for c in client.__mro__].index(True)].read_deployment_by_name",
    }[missing]
    output = python(
        "import logging, sys\n"
        "from prefect.client.orchestration import PrefectClient as client\n"
        "from flows import prefect_plugin\n"
        f"{hide}\n"
        "from prefect.plugins import HookContext\n"
        "print(prefect_plugin.setup_environment(ctx=HookContext('0', None, logging.getLogger)),"
        " 'read_deployment_by_name' in client.__dict__)",
        cwd=Path("/"),
    )
    assert output == "None False"


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two homes of servers: PREFECT_HOME and the user's own."""
    named, user = tmp_path / "named", tmp_path / "user" / ".prefect"
    for home in (named, user):
        home.mkdir(parents=True)
    monkeypatch.setenv("PREFECT_HOME", str(named))
    monkeypatch.setenv("HOME", str(user.parent))
    monkeypatch.delenv("FM_API_AUTH_FILE", raising=False)
    monkeypatch.setattr("flows.prefect_plugin.__file__", str(tmp_path / "project" / "flows" / "x.py"))
    return named, user


def keep(folder: Path, port: int, password: str, age: float = 0, mode: int = 0o600) -> Path:
    file = folder / f"api-auth-{port}"
    file.write_text(password + "\n")
    file.chmod(mode)
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def test_the_password_of_the_project_s_server_is_found(homes: tuple[Path, Path]):
    named, user = homes
    assert api_password("http://127.0.0.1:4200/api") is None
    assert api_password(None) is None
    keep(named, 4200, "operator:older", age=60)
    keep(user, 4200, "operator:newer")
    assert api_password("http://127.0.0.1:4200/api") == "operator:newer"
    assert api_password("http://localhost:4200/api") == "operator:newer"


def test_the_password_goes_to_no_other_server(homes: tuple[Path, Path]):
    keep(homes[0], 4200, "operator:secret")
    for url in ("http://127.0.0.1:4201/api", "http://host:4200/api", "https://api.prefect.cloud/api"):
        assert api_password(url) is None


def test_a_file_that_others_can_read_or_that_is_a_link_does_not_count(homes: tuple[Path, Path]):
    readable = keep(homes[0], 4200, "operator:secret", mode=0o644)
    (homes[1] / "api-auth-4200").symlink_to(keep(homes[0], 4201, "operator:secret"))
    assert readable.exists()
    assert api_password("http://127.0.0.1:4200/api") is None


def test_containers_name_the_file(homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FM_API_AUTH_FILE", str(keep(homes[0], 4200, "operator:shared")))
    assert api_password("http://server:4200/api") == "operator:shared"


def test_prefect_sends_the_password_that_was_found_and_prefers_one_that_was_set(tmp_path: Path):
    port = 1  # no server of this project has it, so runs/.prefect holds no newer password for it
    keep(tmp_path, port, "operator:found")
    code = "from prefect.settings import PREFECT_API_AUTH_STRING as s; print(s.value())"
    variables = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    passwords = [python(code, **variables), python(code, **variables, PREFECT_API_AUTH_STRING="me:mine")]
    assert passwords == ["operator:found", "me:mine"]
