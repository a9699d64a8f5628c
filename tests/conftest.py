"""Distribution of the tests over processes, and fixtures of several folders."""

import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist.workermanage import WorkerController

from infra.benchmarks.peers import peers_python
from tests.support.scheduling import Grouped, longest_first
from tests.support.tiers import keep_default, summary
from tests.support.virtual_environment import environment_with

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs so, and every process of a test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A thread that a test leaves behind must not start a server of Prefect's own when it asks for the API.
os.environ["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "false"

PUBLIC_METRICS = ("torch-fidelity==0.4.0", "torchmetrics==1.9.0", "lightning-utilities==0.15.3")
REMOVED = pytest.StashKey[Counter[str]]()
"""How many tests the tier leaves out, by what they need."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Grouped:
    return Grouped(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=["default", "extended", "all"],
        default="all",
        help="default: tests that use no expensive fixture (tests/support/tiers.py); extended: the others",
    )
    parser.addoption(
        "--waiting-process",
        action="store_true",
        help="the last process takes only tests that mostly wait (tests/support/scheduling.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let tests interrupt processes: a shell has its background jobs, and their children, ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what was imported out of garbage collections."""
    gc.collect()
    gc.freeze()


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
    longest_first(items)


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


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[WebDriver]":
    # Imported here, because most sessions need no browser.
    from tests.support.ui_driver import BROWSER, DRIVER, start_browser

    if not (BROWSER and DRIVER):
        pytest.skip("no chromium with chromedriver on this machine")
    with start_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def browser(window: "WebDriver") -> "Iterator[WebDriver]":
    """Empty again afterwards: the page of a run draws and asks the server all the time, for half a core."""
    yield window
    window.get("about:blank")
