"""One tiny run, made by the command line, and an S3 server, for all tests of this folder."""

from collections.abc import Iterator

import fsspec
import pytest

from tests.support.s3_server import Server
from tests.support.tiny_run import STAGES, TinyRun


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyRun:
    run = TinyRun(tmp_path_factory.mktemp("tiny"))
    for stage in STAGES:
        run.first[stage] = run.fm(stage)
        assert run.first[stage].code == 0, run.first[stage].err
    return run


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
