"""`prefect deployment run train-digits` means train-digits/default, and nothing else changes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.demo_project import Demo, created_run

STOCK = "Invalid deployment name format: {}. Expected format: <FLOW_NAME>/<DEPLOYMENT_NAME>"


def python(code: str, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
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


def test_a_name_that_is_no_flow_gets_prefects_own_message(demo: Demo):
    result = demo.prefect("deployment", "run", "train-nothing")
    assert result.returncode == 1
    assert STOCK.format("train-nothing") in result.stdout + result.stderr


def test_without_the_plugin_prefect_is_as_it_was(demo: Demo):
    result = demo.prefect("deployment", "run", "train-digits", PREFECT_PLUGINS_ENABLED="false")
    assert result.returncode == 1
    assert STOCK.format("train-digits") in result.stdout + result.stderr


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
