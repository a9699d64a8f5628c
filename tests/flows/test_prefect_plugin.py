"""`prefect deployment run train-digits` means train-digits/default, and nothing else changes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.demo_project import Demo

STOCK = "Invalid deployment name format: {}. Expected format: <FLOW_NAME>/<DEPLOYMENT_NAME>"


def python(code: str, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train-digits", "train-digits/default", "train-imagenet64"])
def test_a_bare_name_is_the_default_deployment(demo: Demo, name: str):
    result = demo.prefect("deployment", "run", name, "--start-in", "2 hours")
    assert result.returncode == 0, result.stderr
    run_id = result.stdout.split("UUID: ")[1].split()[0]
    run = demo.run(run_id)
    deployment = demo.api(f"/deployments/{run['deployment_id']}")
    flow = demo.api(f"/flows/{run['flow_id']}")
    assert (flow["name"], deployment["name"]) == (name.split("/")[0], "default")
    assert demo.prefect("flow-run", "delete", run_id).returncode == 0


@pytest.mark.slow
def test_a_name_that_is_no_flow_gets_prefects_own_message(demo: Demo):
    result = demo.prefect("deployment", "run", "train-nothing")
    assert result.returncode == 1
    assert STOCK.format("train-nothing") in result.stdout + result.stderr


@pytest.mark.slow
def test_without_the_plugin_prefect_is_as_it_was(demo: Demo):
    result = demo.prefect("deployment", "run", "train-digits", PREFECT_PLUGINS_ENABLED="false")
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
def test_a_prefect_that_has_changed_is_left_alone(missing: str):
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
