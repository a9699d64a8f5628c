"""Retries that an operator sets for all flows and tasks do not repeat a refused configuration."""

import subprocess
import sys

from tests.support import ROOT
from tests.support.demo_project import clean_environment

CODE = """
from prefect import Flow, Task
from flows import parallel_runs, reproduce, stage_tasks, stages, train
found = {
    name: thing.with_options(name="x").retries
    for module in (parallel_runs, reproduce, stage_tasks, stages, train)
    for name, thing in vars(module).items()
    if isinstance(thing, Flow | Task)
}
print(len(found), set(found.values()))
"""


def test_flows_and_tasks_are_never_repeated_by_prefect():
    settings = {"PREFECT_FLOWS_DEFAULT_RETRIES": "2", "PREFECT_TASKS_DEFAULT_RETRIES": "2"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["15", "{0}"]
