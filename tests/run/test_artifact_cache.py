import os
import time

import psutil
import pytest
import torch

from fm_core.errors import LeaseLostError, StopRequested, UserError
from fm_core.run import artifact_cache
from fm_core.run import lease as lease_module
from fm_core.run.artifact_cache import ArtifactCache, exclusive_lock
from fm_core.run.lease import Lease
from fm_core.run.stop_file import was_stopped
from fm_core.storage.atomic_files import read_json, write_json

CONTENT = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1])}


def until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def cache(tmp_path):
    return ArtifactCache(tmp_path / "reproduce" / "fm-ot")


def test_a_part_is_read_as_it_was_written(cache):
    assert cache.read("training", "weights") is None
    written = cache.write("training", "weights", {"recipe": {"steps": 3}}, CONTENT)
    part = cache.read("training", "weights")
    assert part.tensors_sha256 == written.tensors_sha256
    assert part.record["recipe"] == {"steps": 3}
    assert torch.equal(cache.tensors("weights")["a"], CONTENT["a"])
    assert {path.name for path in cache.directory.iterdir()} == {"weights.safetensors", "training.json"}


def test_a_part_without_record_or_with_other_tensors_does_not_count(cache):
    cache.write("training", "weights", {"recipe": {}}, CONTENT)
    file = cache.directory / "weights.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert cache.read("training", "weights") is None
    file.unlink()
    assert cache.read("training", "weights") is None
    file.write_bytes(content)
    assert cache.read("training", "weights") is not None
    (cache.directory / "training.json").unlink()
    assert cache.read("training", "weights") is None


def test_tensors_are_on_the_disk_before_the_record_that_names_them(cache, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda self, target: (order.append(target.name), replace(self, target))[1]
    )
    cache.write("training", "weights", {}, CONTENT)
    assert order == ["weights.safetensors", "training.json"]


def test_another_recipe_is_refused_by_its_differences(cache):
    cache.refuse_another("training", {"steps": 3})
    cache.write("training", "weights", {"recipe": {"steps": 3, "seed": 0}}, CONTENT)
    cache.refuse_another("training", {"steps": 3, "seed": 0})
    with pytest.raises(UserError, match=r"steps was 3 and is now 4; choose another run\.name") as caught:
        cache.refuse_another("training", {"steps": 4, "seed": 0})
    assert "seed" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_one_process_works_in_a_directory(tmp_path):
    with exclusive_lock(tmp_path) as check:
        check()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), exclusive_lock(tmp_path):
            pass
    with exclusive_lock(tmp_path):
        pass


def test_the_directory_is_free_again_after_a_failure_and_after_a_kill(tmp_path):
    with pytest.raises(ArithmeticError), exclusive_lock(tmp_path):
        raise ArithmeticError
    assert not (tmp_path / "lock").exists()
    gone = {"host": os.uname().nodename, "pid": 2**22 + 1, "created": 1.0, "heartbeat": 1.0}
    write_json(tmp_path / "lock", gone)  # by an earlier version
    with exclusive_lock(tmp_path):
        assert read_json(tmp_path / "lock")["epoch"] == 2


@pytest.mark.parametrize("place", ["", "reproduce"])
def test_the_holder_of_the_lock_notices_a_stop_file(tmp_path, place):
    """In the run directory or in that of the comparison; one of before the start ends it, once."""
    (tmp_path / "reproduce").mkdir()
    stop = tmp_path / place / "STOP"
    stop.touch()
    with pytest.raises(StopRequested, match=f"{stop} was created while nothing was running"):
        exclusive_lock(tmp_path / "reproduce").__enter__()
    with exclusive_lock(tmp_path / "reproduce") as check_stop:
        check_stop()
        stop.touch()
        with pytest.raises(StopRequested, match=f"stopped by {stop}; run it again"):
            check_stop()
        assert not stop.exists()
    assert was_stopped(tmp_path)


def test_the_lock_is_renewed_between_two_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    with exclusive_lock(tmp_path):
        first = read_json(tmp_path / "lock")["beats"]
        until(lambda: read_json(tmp_path / "lock")["beats"] > first + 1)
    assert not (tmp_path / "lock").exists()


def test_a_step_of_the_clock_lets_no_second_process_in(tmp_path, monkeypatch):
    with exclusive_lock(tmp_path):
        start = psutil.Process().create_time()
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: start - 2)
        with pytest.raises(UserError, match="is in use by"), exclusive_lock(tmp_path):
            pass


@pytest.mark.parametrize("by", ["this host", "another host"])
def test_a_holder_that_lost_the_lock_notices_and_leaves_it_alone(tmp_path, by):
    lock = Lease(tmp_path / "lock")
    with exclusive_lock(tmp_path) as check:
        check()
        with lock.guard():
            lock.take(os.getpid(), job="b2", **({"host_id": "other"} if by == "another host" else {}))
        before = read_json(lock.path)
        with pytest.raises(LeaseLostError, match="was taken over by process"):
            check()
    assert read_json(lock.path) == before


def test_a_directory_that_cannot_be_reached_for_a_moment_does_not_end_the_work(tmp_path):
    with exclusive_lock(tmp_path / "cell") as check:
        hidden = (tmp_path / "cell").rename(tmp_path / "unmounted")
        check()
        hidden.rename(tmp_path / "cell")
        check()
    assert not (tmp_path / "cell" / "lock").exists()


def take_for(lease, name):
    with lease.guard():
        lease.take_for(name, job="b2")


def test_a_holder_elsewhere_is_watched_and_then_refused_or_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(artifact_cache, "LOOK_INTERVAL_SECONDS", 0.02)
    lease, messages = Lease(tmp_path / "lock"), []

    def tell_and_beat(message):
        messages.append(message)
        lease.heartbeat(job="b2")

    take_for(lease, "Slurm job 7")
    with pytest.raises(UserError, match="is in use by Slurm job 7"), exclusive_lock(tmp_path, tell_and_beat):
        pass
    with exclusive_lock(tmp_path, messages.append) as check:
        check()
    assert [message.partition(":")[0] for message in messages] == [
        f"{tmp_path} was last used by Slurm job 7"
    ] * 2
