"""Distribution of the tests over processes, and fixtures of several folders."""

import os
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from infra.benchmarks.peers import peers_python

SHARED_FOLDERS = ("tests/flows/", "tests/stages/", "tests/reproduce/", "tests/cluster/")
"""Folders whose tests share a server, a run, a comparison or a network; elsewhere the unit is a file."""
OWN_SERVER = "tests/flows/test_team_server.py"
"""Uses its own server."""


class Grouped(LoadScopeScheduling):
    """Scheduling of whole groups. (The plugin's own groups are not honored under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return file if file == OWN_SERVER else next((f for f in SHARED_FOLDERS if file.startswith(f)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Grouped:
    return Grouped(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest groups first."""
    items.sort(key=lambda item: not item.nodeid.startswith(SHARED_FOLDERS))  # stable


@pytest.fixture(scope="session")
def public_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the public packages that ours is compared with."""
    folder = tmp_path_factory.getbasetemp()
    # The processes of one session have one parent folder.
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return peers_python(shared / "public-packages")
