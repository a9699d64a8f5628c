"""Flows as a worker loads them: quickly, and with settings of an operator that must not repeat them."""

from collections.abc import Iterator

import pytest

from tests.support import ROOT
from tests.support.command_server import CommandServer
from tests.support.demo_project import clean_environment

FLOWS = sorted(f"flows.{path.stem}" for path in (ROOT / "flows").glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "scipy", "numpy", "torchdiffeq", "deepspeed", "webdataset", "matplotlib"}
RETRIES = """
from prefect import Flow, Task
from flows import distill, parallel_runs, reproduce, stage_tasks, stages, sweep, train
# Of the tasks, the pipeline runs variants with other names.
found = {
    name: (thing.with_options(name="x") if isinstance(thing, Task) else thing).retries
    for module in (distill, parallel_runs, reproduce, stage_tasks, stages, sweep, train)
    for name, thing in vars(module).items()
    if isinstance(thing, Flow | Task)
}
print(len(found), set(found.values()))
"""


@pytest.fixture(scope="module")
def flow_process() -> Iterator[CommandServer]:
    """A process that has imported every module of the flows, where Prefect's default is to retry."""
    settings = {"PREFECT_FLOWS_DEFAULT_RETRIES": "2", "PREFECT_TASKS_DEFAULT_RETRIES": "2"}
    server = CommandServer(ROOT, clean_environment() | {"PYTHONPATH": str(ROOT), **settings}, FLOWS)
    yield server
    server.close()


def test_a_flow_starts_and_is_deployed_without_heavy_libraries(flow_process: CommandServer):
    """Neither directly nor through the core: each flow run and each deployment waits for its imports."""
    code = f"import sys; print(sorted({HEAVY} & set(sys.modules)))"
    done = flow_process.run("python", "-c", code)
    assert done.stdout == "[]\n", done.stderr


def test_flows_and_tasks_are_never_repeated_by_prefect(flow_process: CommandServer):
    """An operator's retries would repeat a refused configuration."""
    done = flow_process.run("python", "-c", RETRIES)
    assert done.stdout.split() == ["18", "{0}"], done.stderr
