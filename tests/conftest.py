"""How tests are shared out among processes."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOGETHER = ("flows", "stages", "cluster")
"""Folders whose tests share a server, a run or a network; elsewhere those of one file stay together."""


@pytest.hookimpl(tryfirst=True)  # the plugin reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the group of each test, and begin with the longest groups."""

    def group(item: pytest.Item) -> str:
        place = item.path.relative_to(HERE)
        return place.parts[0] if place.parts[0] in TOGETHER else str(place)

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: group(item) not in TOGETHER)  # stable
