"""How tests are shared out among processes, and what those of several rooms share."""

import os
import sys
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/flows/", "tests/stages/", "tests/cluster/")
"""Folders whose tests share a server, a run or a network; elsewhere those of one file stay together."""
ALONE = "tests/flows/test_team_server.py"
"""It has a server of its own."""


class Grouped(LoadScopeScheduling):
    """Whole groups to processes. (The plugin's own groups are not honoured under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return file if file == ALONE else next((f for f in TOGETHER if file.startswith(f)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Grouped:
    return Grouped(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest groups."""
    items.sort(key=lambda item: not item.nodeid.startswith(TOGETHER))  # stable


@pytest.fixture(scope="session")
def public_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the public packages that ours is held against."""
    sys.path.append(str(Path(__file__).parents[1] / "infra" / "benchmarks"))
    from peers import peers_python

    folder = tmp_path_factory.getbasetemp()
    # The processes of one session have one parent folder.
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return peers_python(shared / "public-packages")
