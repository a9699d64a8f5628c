"""One tiny run, made by the command line, and an S3 server, for all tests of this folder."""

import os
from collections.abc import Iterator

import fsspec
import pytest

from fm_core.stages import evaluate, sample
from fm_core.storage.file_lock import file_lock
from tests.support.forked_ranks import supervise
from tests.support.s3_server import Server
from tests.support.tiny_run import TinyRun


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyRun:
    """The run is made once per session; each process of the session has a copy of it."""
    folder = tmp_path_factory.getbasetemp()
    # The processes of one session have one parent folder.
    source = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tiny-run"
    source.mkdir(exist_ok=True)
    with file_lock(source / "guard"):
        if not (source / "outputs.json").exists():
            TinyRun.complete(source)
    return TinyRun.copied(source, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def forked_ranks(monkeypatch):
    """Jobs of the stages sample and evaluate have forked ranks (forked_ranks.py) while this is used."""
    for module in (sample, evaluate):
        monkeypatch.setattr(module, "supervise", supervise)


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    """A server with a bucket, and its variables in the environment."""
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = Server()
    variables = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)  # the server keeps those of this process
        yield server
    server.stop()
