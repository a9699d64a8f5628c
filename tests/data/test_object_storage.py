"""Real S3 protocol on loopback, with and without faults of the connection."""

import io
import itertools
import os
from importlib.util import find_spec

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFile

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.cache import NodeCache
from fm_core.data.dataset_builder import check_source, write_dataset
from fm_core.data.manifest import load_manifest
from fm_core.data.reader import ImageReader
from fm_core.data.verify import validate_dataset
from fm_core.errors import UserError
from fm_core.storage import retries
from fm_core.storage.store import Store
from tests.support.faulty_proxy import DELAY_SECONDS, FaultyProxy
from tests.support.photographs import NpzFiles, crops, encoded, tar_of, write_tree

pytestmark = pytest.mark.skipif(
    not (find_spec("moto") and find_spec("s3fs")), reason="moto and s3fs are not installed: the test extra"
)


@pytest.fixture(scope="module")
def object_store():
    from moto import server as moto_server  # seconds of imports

    object_store = moto_server.ThreadedMotoServer(port=0, verbose=False)
    object_store.start()
    yield object_store.get_host_and_port()
    object_store.stop()


BUCKETS = itertools.count()


@pytest.fixture
def s3(object_store, monkeypatch):
    """URL of an empty bucket; the credentials come from the environment, as everywhere."""
    yield from bucket_at(object_store, object_store[1], monkeypatch)


def bucket_at(object_store, port, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{object_store[1]}")
    fsspec.filesystem("s3").clear_instance_cache()
    bucket = f"bucket-{next(BUCKETS)}"
    fsspec.filesystem("s3").mkdir(bucket)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    fsspec.filesystem("s3").clear_instance_cache()
    yield f"s3://{bucket}/data"
    fsspec.filesystem("s3").clear_instance_cache()


def npz(tmp_path, root, **files):
    folder = NpzFiles(size=16, rows=40, **files).write_zips(tmp_path / "source")
    source = SourceSection(format="imagenet-npz", url=str(folder), image_size=16, allow_partial=True)
    return DataSection(root=root, name="tiny", source=source, block_bytes=8000, shard_blocks=2)


def is_complete(config, tmp_path):
    """Check every image against a data set on the local disk."""
    local = config.model_copy(update={"root": str(tmp_path / "local")})
    expected = write_dataset(local)
    manifest = load_manifest(config.root, config.name)
    assert manifest.version == expected.version
    for split in ("train", "val"):
        cache = NodeCache(str(tmp_path / "cache"))
        with (
            ImageReader(config.root, manifest, split, cache) as remote,
            ImageReader(local.root, expected, split) as there,
        ):
            ids = np.random.default_rng(0).permutation(len(remote))
            for one, other in zip(remote.read(ids), there.read(ids), strict=True):
                assert np.array_equal(one, other)
    return True


def test_shards_go_to_s3_and_come_back(tmp_path, s3):
    config = npz(tmp_path, s3)
    manifest = write_dataset(config)
    assert is_complete(config, tmp_path)
    assert write_dataset(config) == manifest
    assert validate_dataset(config, "deep").problems == {}


def test_a_source_on_s3_is_read_without_unpacking(tmp_path, s3):
    config = npz(tmp_path, str(tmp_path / "out"))
    fsspec.filesystem("s3").put(config.source.url, s3 + "/source", recursive=True)
    remote = config.model_copy(
        update={"name": "b", "source": config.source.model_copy(update={"url": s3 + "/source"})}
    )
    assert write_dataset(remote).version == write_dataset(config).version


class Flaky(MemoryFile):
    """A file of a store whose every seventh open or read fails, now and then with half of what was asked."""

    calls = itertools.count(1)
    failed = 0

    def read(self, size=-1):
        if next(self.calls) % 7 == 0:
            type(self).failed += 1
            if self.failed % 2:
                raise ConnectionResetError("the store hung up")
            return super().read(size // 2)
        return super().read(size)


@pytest.mark.parametrize("packed", ["npz in zips", "pictures in a tar", "parquet"])
def test_a_source_on_a_store_that_hangs_up_is_read_on(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    if packed == "npz in zips":
        files = {
            path.name: path.read_bytes() for path in NpzFiles(size=32).write_zips(tmp_path / "a").iterdir()
        }
    elif packed == "parquet":
        file = io.BytesIO()
        images = [encoded(image) for image in crops(60, 32)]
        pyarrow.parquet.write_table(
            pyarrow.table({"image": images, "label": [0, 1] * 30}), file, row_group_size=7
        )
        files = {"train-0.parquet": file.getvalue(), "val-0.parquet": file.getvalue()}
    else:
        members = {f"{number}.png": encoded(image) for number, image in enumerate(crops(60, 32))}
        files = {f"{split}_32x32.tar": tar_of(members) for split in ("train", "valid")}
    memory = fsspec.filesystem("memory")
    for name, content in files.items():
        memory.pipe_file(f"/{tmp_path.name}/{name}", content)
    write_tree(tmp_path / "here", files)

    def section(url, name):
        source = SourceSection(format="auto", url=url, image_size=32, allow_partial=True)
        return DataSection(root=str(tmp_path), name=name, source=source)

    expected = write_dataset(section(str(tmp_path / "here"), "here"))
    opened, failed = memory._open, Flaky.failed

    def flaky(path, mode="rb", **options):
        if mode == "rb":
            return Flaky(memory, path, opened(path, mode).getvalue())
        return opened(path, mode, **options)

    monkeypatch.setattr(memory, "_open", flaky)
    assert write_dataset(section(f"memory://{tmp_path.name}", "there")).version == expected.version
    assert Flaky.failed > failed
    memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize("fault", ["drop", "truncate", "delay", "503"])
def test_requests_that_fail_are_retried(tmp_path, object_store, monkeypatch, fault):
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.01)
    if fault == "delay":  # the client times out before the answer
        waiting = {"read_timeout": DELAY_SECONDS / 3, "retries": {"max_attempts": 0}}
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": waiting})
    proxy = FaultyProxy(object_store, fault, every=5)
    for url in bucket_at(object_store, proxy.port, monkeypatch):
        config = npz(tmp_path, url)
        write_dataset(config)
        assert is_complete(config, tmp_path)
        assert proxy.faults > 3
    proxy.close()


def test_a_truncated_object_without_commit_mark_is_written_again(tmp_path, s3):
    """What kill -9 or a failing client leaves: an object under the shard's name that is not complete."""
    config = npz(tmp_path, s3)
    fsspec.filesystem("s3").pipe_file(f"{s3}/tiny/train-000000.tar", b"x" * 700)
    write_dataset(config)
    assert is_complete(config, tmp_path)


def test_an_upload_that_arrives_short_is_made_again(tmp_path, monkeypatch):
    store = Store.at("memory://short-upload")
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    put, calls = store.filesystem.put_file, []

    def short(source, target, **options):
        calls.append(target)
        put(source, target, **options)
        if len(calls) < 3:
            store.filesystem.pipe_file(target, b"half")

    monkeypatch.setattr(store.filesystem, "put_file", short)
    store.write_bytes("a", b"whole content")
    assert len(calls) == 3
    assert store.read_bytes("a") == b"whole content"


def test_a_store_out_of_reach_is_one_line(tmp_path, object_store, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for url in bucket_at(object_store, 9, monkeypatch):  # nothing listens there
        with pytest.raises(UserError) as caught:
            check_source(DataSection(root=url))
    assert "\n" not in str(caught.value)
    assert "tried 5 times" in str(caught.value)


def test_missing_credentials_are_one_line(tmp_path, s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"(?i)credentials"):
        check_source(DataSection(root=s3))
    assert "AWS_ACCESS_KEY_ID" not in os.environ


def test_credentials_that_a_busy_metadata_service_withholds_are_asked_for_again(monkeypatch):
    withheld = pytest.importorskip("botocore.exceptions").NoCredentialsError
    store, asked = Store.at("memory://credentials"), []
    store.write_bytes("a", b"content")
    kind = type(store.filesystem)
    stock = kind.cat_file

    def cat_file(self, *arguments, **options):
        if len(asked) < 2:
            raise withheld
        return stock(self, *arguments, **options)

    monkeypatch.setattr(kind, "cat_file", cat_file)
    monkeypatch.setattr(kind, "connect", lambda self, refresh: asked.append(refresh), raising=False)
    assert store.read_bytes("a") == b"content"
    assert asked == [True, True]


def test_a_bucket_that_is_not_there_is_one_line(s3):
    with pytest.raises(UserError, match="check that the bucket exists"):
        write_dataset(DataSection(root="s3://no-such-bucket/data"))


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(UserError, match="nosuch"):
        check_source(DataSection(root="nosuch://bucket"))
