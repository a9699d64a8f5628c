"""The plugin resolves bare deployment names and finds the server's password, and nothing else changes."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.plugins import HookContext, SetupResult
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings
from prefect.utilities import processutils

from flows import prefect_plugin
from flows.prefect_plugin import api_password, setup_environment
from tests.support import ROOT
from tests.support.command_server import CommandServer
from tests.support.demo_project import Demo, created_run

STOCK = "Invalid deployment name format: {}. Expected format: <FLOW_NAME>/<DEPLOYMENT_NAME>"


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


@pytest.fixture(scope="module")
def prefect_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    """A process in the project's root that has imported Prefect; a file has its server's password."""
    home = tmp_path_factory.mktemp("home")
    port = 1  # no server of this project has it, so runs/.prefect holds no newer password for it
    keep(home, port, "operator:found")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "FM_"))}
    settings = {"PREFECT_HOME": str(home), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    server = CommandServer(ROOT, inherited | {"PYTHONPATH": str(ROOT)} | settings, ["prefect.main"])
    yield server
    server.close()


WORKER = """
import os, signal, subprocess, sys, time
from prefect.utilities.processutils import setup_signal_handlers_worker
setup_signal_handlers_worker(os.getpid(), "the worker", lambda text: print(text, flush=True))
environment = {**os.environ, "PREFECT__FLOW_RUN_ID": "1"}
command = [sys.executable, "-S", "-c", sys.argv[1]]
run = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE)
assert run.stdout.readline() == b"running\\n"
try:
    os.kill(os.getpid(), int(sys.argv[2]))
    while True:
        run.poll()
        time.sleep(0.1)
except KeyboardInterrupt:
    print("the run ended with", run.poll(), flush=True)
"""
RUN = """
import signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    sys.exit(5)
signal.signal(signal.SIGTERM, save)
print("running", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_ended_lets_its_runs_save_first(
    prefect_process: CommandServer, number: signal.Signals
):
    printed = prefect_process.run("python", "-c", WORKER, RUN, str(int(number))).stdout
    assert printed.startswith("asking 1 flow run(s) to save")
    assert printed.endswith("the run ended with 5\n")


def test_the_plugin_is_loaded_and_brings_nothing_heavy(prefect_process: CommandServer):
    code = (
        "import sys; print('flows.prefect_plugin' in sys.modules,"
        " sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'fm_core', 'numpy'}))"
    )
    assert prefect_process.run("python", "-c", code).stdout == "True []\n"


@pytest.mark.parametrize("missing", ["the module", "the method"])
def test_a_prefect_that_has_changed_is_left_alone(missing: str, monkeypatch: pytest.MonkeyPatch):
    name = "setup_signal_handlers_worker"
    monkeypatch.setattr(processutils, name, getattr(processutils, name))  # the stock one comes back
    method = "read_deployment_by_name"
    if missing == "the module":
        monkeypatch.setitem(sys.modules, "prefect.client.orchestration", None)
    else:
        for owner in [owner for owner in PrefectClient.__mro__ if method in vars(owner)]:
            monkeypatch.delattr(owner, method)
    before = vars(PrefectClient).get(method)
    assert setup_environment(ctx=HookContext("0", None, logging.getLogger)) is None
    assert vars(PrefectClient).get(method) is before


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


def test_prefect_sends_the_password_that_was_found(prefect_process: CommandServer):
    code = "from prefect.settings import PREFECT_API_AUTH_STRING as s; print(s.value())"
    assert prefect_process.run("python", "-c", code).stdout == "operator:found\n"


def test_a_password_that_was_set_is_preferred(homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    for part in ("_find_deployments_by_flow", "_let_runs_save"):
        monkeypatch.setattr(prefect_plugin, part, lambda ctx: None)
    keep(homes[0], 4200, "operator:found")
    context = HookContext("0", "http://127.0.0.1:4200/api", logging.getLogger)
    result = setup_environment(ctx=context)
    assert result == SetupResult(env={"PREFECT_API_AUTH_STRING": "operator:found"})
    with temporary_settings({PREFECT_API_AUTH_STRING: "me:mine"}):
        assert setup_environment(ctx=context) is None
