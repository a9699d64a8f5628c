"""Checkpoint uploads to a real S3 server on loopback that is stopped and restarted."""

import itertools
import threading
import time

import fsspec
import pytest
import torch

from fm_core.checkpoint import uploader
from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import complete_steps, recorded_files, stored_files, stored_steps, verify
from fm_core.checkpoint.retention import Retention
from fm_core.checkpoint.train_state import TrainState
from fm_core.checkpoint.uploader import upload_checkpoint
from fm_core.errors import UnreachableError, UserError
from fm_core.storage import retries
from fm_core.storage.store import Store

moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
BUCKETS = itertools.count()


class Server:
    """An S3 server that can be stopped and started again; its buckets outlive it."""

    def __init__(self):
        self.port = 0
        self.start()

    def start(self):
        self.server = moto_server.ThreadedMotoServer(port=self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self):
        self.server.stop()


@pytest.fixture(scope="module")
def object_store():
    object_store = Server()
    yield object_store
    object_store.stop()


@pytest.fixture
def url(object_store, monkeypatch):
    """An empty folder on the server; the credentials come from the environment, as everywhere."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{object_store.port}")
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(uploader, "FIRST_PAUSE_SECONDS", 0.1)
    fsspec.filesystem("s3").clear_instance_cache()
    bucket = f"checkpoints-{next(BUCKETS)}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}/run"
    fsspec.filesystem("s3").clear_instance_cache()


def write(checkpoints, step, loss=None):
    problem = checkpoints.begin(step)
    for name in ("raw", "optimizer/exp_avg"):
        problem = problem or checkpoints.write(step, name, {"a": torch.full((9,), float(step))}, {})
    state = TrainState(step=step, images_seen=step * 10, held_out_loss=loss)
    assert (problem or checkpoints.finish(state)) is None


def at(url, folder, **keys):
    return CheckpointCatalog(url, folder, Retention(2, **keys))


def test_checkpoints_go_to_the_store_and_come_back_on_another_host(tmp_path, url):
    here = at(url, tmp_path / "here")
    for step, loss in ((10, 0.9), (20, 0.1), (30, 0.5), (40, 0.4)):
        write(here, step, loss)
        assert here.wait(60) is None
    assert stored_steps(here.store) == [20, 30, 40]  # the best and the last two
    assert here.store.folders() == ["step-00000020", "step-00000030", "step-00000040"]
    assert complete_steps(tmp_path / "here") == [40]
    assert here.problem_of("step-00000040") is None
    assert "is not complete" in here.problem_of("step-00000010")
    fetched = at(url, tmp_path / "there").newest()
    assert fetched == tmp_path / "there" / "step-00000040"
    assert verify(fetched) is None
    assert (fetched / "optimizer" / "exp_avg.safetensors").exists()


def test_a_store_that_is_unavailable_stops_nothing_and_gets_the_newest_when_it_is_back(
    tmp_path, url, object_store
):
    here = at(url, tmp_path / "here")
    write(here, 10)
    assert here.wait(60) is None
    object_store.stop()
    for step in (20, 30, 40, 50):
        write(here, step)  # returns, although the store is unavailable until all are written
    assert here.wait(1.0) is not None
    # Until then the local ones are kept, as far as they are needed.
    assert complete_steps(tmp_path / "here")[-2:] == [40, 50]
    object_store.start()
    assert here.wait(60) is None
    assert stored_steps(here.store)[-1] == 50
    assert at(url, tmp_path / "there").newest().name == "step-00000050"


def test_what_waited_when_the_run_ended_is_uploaded_by_the_next(tmp_path, url, object_store):
    here = at(url, tmp_path / "here")
    object_store.stop()
    write(here, 10)
    with pytest.raises(UnreachableError, match="tried 5 times"):
        at(url, tmp_path / "here").newest()  # not silently from the local ones: there may be a newer one
    object_store.start()
    again = at(url, tmp_path / "here")
    assert again.newest().name == "step-00000010"
    assert again.wait(60) is None
    assert stored_steps(again.store) == [10]


class SlowStore:
    """Copies wait for a permit each, and are recorded."""

    def __init__(self, monkeypatch):
        self.permits, self.copied, self.began = threading.Semaphore(0), [], []
        self.copy = uploader.upload_checkpoint
        monkeypatch.setattr(uploader, "upload_checkpoint", self)

    def __call__(self, store, folder, step, *rights):
        self.began.append(step)
        self.permits.acquire()
        self.copy(store, folder, step, *rights)
        self.copied.append(step)


@pytest.fixture
def slow(monkeypatch):
    return SlowStore(monkeypatch)


def test_what_is_to_stay_for_good_reaches_a_slow_store(tmp_path, slow):
    url, folder = f"memory://slow-{next(BUCKETS)}", tmp_path / "here"
    retention = Retention(1, every_images=300)
    here = CheckpointCatalog(url, folder, retention)
    losses = {10: 0.9, 20: 0.1, 30: 0.8, 40: 0.7, 50: 0.6, 60: 0.5, 70: 0.4, 80: 0.3}
    write(here, 10, losses[10])
    while slow.began != [10]:
        time.sleep(0.01)
    for step in (20, 30, 40, 50, 60, 70, 80):
        write(here, step, losses[step])
    # The best, two for every 300 images, the newest; the one at work; and one more, as no copy is there yet.
    assert complete_steps(folder) == [10, 20, 30, 60, 70, 80]
    for _ in range(9):
        slow.permits.release()
    assert here.wait(30) is None
    assert slow.copied == [10, 80, 60, 30, 20]
    assert stored_steps(here.store) == [20, 30, 60, 80]
    assert complete_steps(folder) == [80]
    assert {step: here.problem_of(f"step-{step:08d}") for step in stored_steps(here.store)} == dict.fromkeys(
        (20, 30, 60, 80)
    )


def test_a_checkpoint_that_is_corrupt_here_does_not_hold_up_the_others(tmp_path, slow, caplog):
    url, folder = f"memory://slow-{next(BUCKETS)}", tmp_path / "here"
    here = CheckpointCatalog(url, folder, Retention(3))
    write(here, 10)
    while not slow.began:
        time.sleep(0.01)
    for step in (20, 30):
        write(here, step)
    path = folder / "step-00000020" / "raw.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    for _ in range(9):
        slow.permits.release()
    assert here.wait(30) is None
    assert stored_steps(here.store) == [10, 30]
    assert "raw.safetensors differs from its SHA-256; it is not uploaded to memory://" in caplog.text


def test_an_old_checkpoint_that_is_copied_late_removes_none_that_is_newer(tmp_path):
    """A host comes back with what it could not copy, after another had gone on."""
    url = f"memory://slow-{next(BUCKETS)}"
    late = CheckpointCatalog(f"file://{tmp_path}/late", tmp_path, Retention(None))
    for step in (30, 35):
        write(late, step)
    elsewhere = CheckpointCatalog(url, tmp_path / "elsewhere", Retention(1, every_images=300))
    for step in (40, 50):
        write(elsewhere, step)
        assert elsewhere.wait(30) is None
    again = CheckpointCatalog(url, tmp_path / "late", Retention(1, every_images=300))
    assert again.newest().name == "step-00000050"
    assert again.wait(30) is None
    assert stored_steps(again.store) == [30, 50]


def test_a_damaged_object_is_detected_and_the_checkpoint_before_is_fetched(tmp_path, url, caplog):
    here = at(url, tmp_path / "here")
    for step in (10, 20):
        write(here, step)
        assert here.wait(60) is None
    name = "step-00000020/raw.safetensors"
    content = bytearray(here.store.read_bytes(name))
    content[-1] ^= 1
    here.store.write_bytes(name, bytes(content))
    there = at(url, tmp_path / "there")
    assert there.newest().name == "step-00000010"
    assert "step-00000020" in caplog.text
    assert "differs from its SHA-256; trying an older" in caplog.text
    here.store.remove("step-00000010/state.json")
    with pytest.raises(UserError, match=r"no checkpoint under s3://.* is intact") as caught:
        at(url, tmp_path / "third").newest()
    assert "\n" not in str(caught.value)
    # The next checkpoint that counts sets the damaged ones aside behind which training went back.
    write(there, 15)
    assert there.wait(60) is None
    assert there.store.folders() == ["set-aside-step-00000020.e0-", "step-00000010", "step-00000015"]


@pytest.mark.parametrize("content", [b"", b'{"schema": 1, "fi', b"[]", b'{"schema": 1}', b"\xff"])
def test_a_complete_that_cannot_be_read_does_not_hold_up_the_upload(tmp_path, content):
    store = Store.at(f"memory://unreadable-{tmp_path.name}")
    store.write_bytes("step-00000010/COMPLETE", content)
    write(CheckpointCatalog(str(tmp_path), tmp_path / "none", Retention(2)), 10)
    upload_checkpoint(store, tmp_path, 10)
    assert stored_files(store, "step-00000010") == recorded_files(tmp_path / "step-00000010")
    assert store.read_bytes("set-aside-step-00000010.e0-/COMPLETE") == content


def test_an_upload_that_arrives_corrupt_does_not_count(tmp_path, monkeypatch):
    store = Store.at("memory://corrupt")
    put = store.filesystem.put_file

    def corrupt(source, target, **options):
        put(source, target, **options)
        if target.endswith("raw.safetensors"):
            size = store.filesystem.info(target)["size"]
            store.filesystem.pipe_file(target, b"x" * size)

    monkeypatch.setattr(store.filesystem, "put_file", corrupt)
    write(CheckpointCatalog(str(tmp_path), tmp_path / "none", Retention(2)), 10)
    with pytest.raises(OSError, match=r"raw.safetensors differs from what was sent"):
        upload_checkpoint(store, tmp_path, 10)
    assert stored_steps(store) == []
    monkeypatch.undo()
    upload_checkpoint(store, tmp_path, 10)
    assert stored_steps(store) == [10]


def test_a_closed_catalog_uploads_and_removes_nothing_more(tmp_path, monkeypatch):
    """Under launch.kind debug the next training in this process has an uploader of its own."""
    url = f"memory://closed-{next(BUCKETS)}"
    first, second = at(url, tmp_path / "first"), at(url, tmp_path / "second")
    allowed, upload = threading.Event(), uploader.upload_checkpoint

    def slow_upload(store, folder, step, *rights):
        assert allowed.wait(60)
        upload(store, folder, step, *rights)

    monkeypatch.setattr(uploader, "upload_checkpoint", slow_upload)
    write(first, 10)
    first.close()
    monkeypatch.setattr(uploader, "upload_checkpoint", upload)
    for step in (20, 30):
        write(second, step)
        assert second.wait(60) is None
    allowed.set()
    first.uploads._thread.join(60)
    assert not first.uploads._thread.is_alive()
    write(first, 40)
    assert first.wait(0.1) is not None
    assert {20, 30} <= set(stored_steps(second.store))
    assert 40 not in stored_steps(second.store)
