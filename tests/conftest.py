"""Distribution of the tests over processes, and fixtures of several folders."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from infra.benchmarks.peers import peers_python
from tests.support.tiers import keep_default, summary
from tests.support.virtual_environment import environment_with

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs so, and every process of a test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

DEMO = tuple(
    f"tests/flows/test_{name}.py"
    for name in ("demo", "flow_runs", "prefect_plugin", "readme", "operators_page", "prefect_ui")
)
"""Modules that share the server of one demo."""
SHARED = {"the demo": DEMO, "the comparison": ("tests/reproduce/",)}
"""Groups of tests that share a server or a comparison; elsewhere the unit of scheduling is a module."""
LONGEST = (
    *DEMO,
    "tests/flows/test_long_run.py",
    "tests/cluster/",
    "tests/stages/",
    "tests/training/",
    "tests/reproduce/",
    "tests/flows/",
    "tests/benchmarks/",
    "tests/launch/",
)
"""Groups that are started first, so that no long group runs alone at the end."""
PUBLIC_METRICS = ("torch-fidelity==0.4.0", "torchmetrics==1.9.0", "lightning-utilities==0.15.3")
REMOVED = pytest.StashKey[Counter[str]]()
"""How many tests the tier leaves out, by what they need."""


class Grouped(LoadScopeScheduling):
    """Scheduling of complete groups. (The plugin's own groups are not honored under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return next((group for group, paths in SHARED.items() if file.startswith(paths)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Grouped:
    return Grouped(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=["default", "extended", "all"],
        default="all",
        help="default: tests that use no expensive fixture (tests/support/tiers.py); extended: the others",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the tier, and run the longest groups first."""
    tier = config.getoption("--tier")
    if tier != "all":
        before = list(items)
        removed = keep_default(items)
        default = set(items)
        if tier == "default":
            config.stash[REMOVED] = removed
        else:
            items[:] = [item for item in before if item not in default]
        remaining = set(items)
        config.hook.pytest_deselected(items=[item for item in before if item not in remaining])
    order = {path: number for number, path in enumerate(LONGEST)}
    items.sort(  # stable
        key=lambda item: next((n for path, n in order.items() if item.nodeid.startswith(path)), len(order))
    )


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


@pytest.fixture
def compiler() -> None:
    """torch.compile, for tests that wait for it for many seconds."""
