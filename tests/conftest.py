"""How tests are shared out among processes."""

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/flows/", "tests/stages/", "tests/cluster/")
"""Folders whose tests share a server, a run or a network; elsewhere those of one file stay together."""


class Grouped(LoadScopeScheduling):
    """Whole groups to processes. (The plugin's own groups are not honoured under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.split("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Grouped:
    return Grouped(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest groups."""
    items.sort(key=lambda item: not item.nodeid.startswith(TOGETHER))  # stable
