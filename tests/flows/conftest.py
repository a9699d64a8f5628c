"""One demo for the tests of what it leaves: a real Prefect server and worker, nothing mocked."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.support.demo_project import SHRUNKEN, Demo, copy_of_the_tree, demo_command


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
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
    demo = Demo(root, int(port.read_text()), result=result)
    yield demo
    demo.close()
    demo_command(root, "--stop")


@pytest.fixture(scope="session")
def imagenet_without_archives(demo: Demo) -> dict[str, Any]:
    """The flow run of `prefect deployment run train-imagenet64` where its archives are missing."""
    return demo.watched("train-imagenet64")
