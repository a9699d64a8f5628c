"""Distribution of the tests over processes, and fixtures of several folders."""

import os
from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from infra.benchmarks.peers import peers_python
from tests.support.tiers import keep_default, summary
from tests.support.virtual_environment import environment_with

SHARED_FOLDERS = ("tests/flows/", "tests/stages/", "tests/reproduce/", "tests/cluster/")
"""Folders whose tests share a server, a run, a comparison or a network; elsewhere the unit is a file."""
OWN_SERVER = "tests/flows/test_team_server.py"
"""Uses its own server."""
PUBLIC_METRICS = ("torch-fidelity==0.4.0", "torchmetrics==1.9.0", "lightning-utilities==0.15.3")
REMOVED = pytest.StashKey[Counter[str]]()
"""How many tests the tier leaves out, by what they need."""


class Grouped(LoadScopeScheduling):
    """Scheduling of whole groups. (The plugin's own groups are not honored under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return file if file == OWN_SERVER else next((f for f in SHARED_FOLDERS if file.startswith(f)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Grouped:
    return Grouped(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=["default", "all"],
        default="all",
        help="default: only tests that use no expensive fixture (tests/support/tiers.py)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the tier, and run the longest groups first."""
    if config.getoption("--tier") == "default":
        before = list(items)
        config.stash[REMOVED] = keep_default(items)
        remaining = set(items)
        config.hook.pytest_deselected(items=[item for item in before if item not in remaining])
    items.sort(key=lambda item: not item.nodeid.startswith(SHARED_FOLDERS))  # stable


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report to the process that started this one what its tier left out."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["removed"] = dict(session.config.stash.get(REMOVED, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    """All processes collect the same tests: one report is enough."""
    node.config.stash[REMOVED] = Counter(getattr(node, "workeroutput", {}).get("removed", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    removed = config.stash.get(REMOVED, Counter())
    if removed:
        terminalreporter.write_line(summary(removed))


@pytest.fixture(scope="session")
def public_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the public packages that ours is compared with."""
    folder = tmp_path_factory.getbasetemp()
    # The processes of one session have one parent folder.
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return peers_python(shared / "public-packages")


@pytest.fixture(scope="session")
def public_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the public metrics that ours are compared with."""
    return environment_with(tmp_path_factory.mktemp("public-metrics"), *PUBLIC_METRICS)
