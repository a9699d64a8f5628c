"""One tiny run, made by the command line, and one tiny comparison, that the tests of this folder look at."""

from collections.abc import Iterator

import fsspec
import pytest
from s3_server import Server
from tiny_images import configured
from tiny_run import STAGES, Tiny

from fm_core.reproduce.reproduce import reproduce


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    run = Tiny(tmp_path_factory.mktemp("tiny"))
    for stage in STAGES:
        run.first[stage] = run.fm(stage)
        assert run.first[stage].code == 0, run.first[stage].err
    return run


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """A finished comparison on images, not to be changed: (root, its StageResult, what was observed)."""
    root, seen = tmp_path_factory.mktemp("both"), []
    return root, reproduce(configured(root), seen.append), seen


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
