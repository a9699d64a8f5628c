"""One demo for the tests of what it leaves: a real Prefect server and worker, nothing mocked.

And the parts of a distillation without a server.
"""

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest

from fm_core.config import RunConfig, dump_yaml
from fm_core.run.results import StageResult
from tests.support.demo_project import SHRUNKEN, Demo, copy_of_the_tree, demo_command
from tests.support.scheduling import DEMO

RUNNING = pytest.StashKey[Demo]()
"""The demo whose server and worker run."""


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Demo]:
    """`infra/demo.sh --keep` on a shrunken configuration, on a machine whose port 4200 is taken."""
    root = copy_of_the_tree(tmp_path_factory.mktemp("demo"))
    with socket.socket() as squatter:
        # Connections in TIME_WAIT of a server that has just ended would block the port.
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # then another process occupies it, which serves the same purpose
            squatter.bind(("127.0.0.1", 4200))
            squatter.listen()
        result = demo_command(root, "--keep", "--", json.dumps(SHRUNKEN))
    port = root / "runs" / ".prefect" / "port"
    assert port.exists(), result.stdout + result.stderr
    demo = request.session.stash[RUNNING] = Demo(root, int(port.read_text()), result=result)
    yield demo
    _stop(request.session)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the demo's server and worker after its last test: they would be busy until the session ends."""
    if nextitem is None or nextitem.nodeid.split("::")[0] not in DEMO:
        _stop(item.session)


def _stop(session: pytest.Session) -> None:
    if running := session.stash.get(RUNNING, None):
        del session.stash[RUNNING]
        running.close()
        demo_command(running.root, "--stop")


@pytest.fixture(scope="session")
def imagenet_without_archives(demo: Demo) -> dict[str, Any]:
    """The flow run of `prefect deployment run train-imagenet64` where its archives are missing."""
    return demo.watched("train-imagenet64")


@pytest.fixture
def teacher(tmp_path) -> str:
    """A run directory with a configuration, of another place and generator than its configuration says."""
    tree = {
        "run": {"name": "first", "root": "/elsewhere", "generator": "numpy-v1"},
        "sample": {"guidance": 1.5, "steps": 9, "solver": "heun2", "images": 50},
        "model": {"class_conditional": True},
        "train": {"label_dropout": 0.1},
    }
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(RunConfig.model_validate(tree)))
    (folder / "environment.json").touch()
    return str(folder)


@pytest.fixture
def started(monkeypatch):
    """Instead of the stages, a list of what would be checked and run: (what, run.name, stages, without)."""
    import flows.distill as module
    import flows.pipeline
    import flows.train

    calls = []

    def stage(name, config, watch=None, of=""):
        calls.append((f"{name} of {of}" if of else name, config.run.name))
        return StageResult(stage=name, state="done", seconds=0.0, summary=name)

    def subflow(name, config, of=""):
        calls.append((f"deployment {name} {of}".strip(), config.run.name))
        return StageResult(stage=name, state="done", seconds=0.0, summary=name)

    for place in (module, flows.pipeline):
        monkeypatch.setattr(place, "run_stage", stage)
        monkeypatch.setattr(place, "run_subflow", subflow)
        monkeypatch.setattr(place, "resolve", lambda config: config)
        monkeypatch.setattr(place, "check_slots", lambda apart: None)
    monkeypatch.setattr(
        module,
        "preflight",
        lambda config, stages, without=(): calls.append(
            ("preflight", config.run.name, tuple(stages), tuple(without))
        ),
    )
    monkeypatch.setattr(flows.pipeline, "_tag", lambda config: None)
    monkeypatch.setattr(flows.pipeline, "CancellationWatch", nullcontext)
    monkeypatch.setattr(flows.pipeline.last_updates, "wait", lambda: None)
    monkeypatch.setattr(flows.train, "can_be_scored", lambda config: True)
    monkeypatch.setattr(flows.train, "get_run_logger", lambda: logging.getLogger("test"))
    return calls
