import os
import time

import pytest
import torch

from fm_core.errors import StopRequested, UserError
from fm_core.run import lease as lease_module
from fm_core.run.artifact_cache import ArtifactCache, exclusive_lock
from fm_core.run.lease import Lease
from fm_core.run.stop_file import was_stopped
from fm_core.storage.atomic_files import read_json, write_json

CONTENT = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1])}


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
    with exclusive_lock(tmp_path) as beat:
        beat()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), exclusive_lock(tmp_path):
            pass
    with exclusive_lock(tmp_path):
        pass


def test_the_directory_is_free_again_after_a_failure_and_after_a_kill(tmp_path):
    with pytest.raises(ArithmeticError), exclusive_lock(tmp_path):
        raise ArithmeticError
    with exclusive_lock(tmp_path):
        record = (tmp_path / "lock").read_text()
    assert record
    gone = {"host": os.uname().nodename, "pid": 2**22 + 1, "created": 1.0, "heartbeat": 1.0}
    write_json(tmp_path / "lock", gone)
    with exclusive_lock(tmp_path):
        pass


@pytest.mark.parametrize("place", ["", "reproduce"])
def test_the_holder_of_the_lock_notices_a_stop_file(tmp_path, place):
    """In the run directory or in that of the comparison; one of before the start ends it, once."""
    (tmp_path / "reproduce").mkdir()
    stop = tmp_path / place / "STOP"
    stop.touch()
    with pytest.raises(StopRequested, match=f"{stop} was created while nothing ran"):
        exclusive_lock(tmp_path / "reproduce").__enter__()
    with exclusive_lock(tmp_path / "reproduce") as beat:
        beat()
        stop.touch()
        with pytest.raises(StopRequested, match=f"stopped by {stop}; run it again"):
            beat()
        assert not stop.exists()
    assert was_stopped(tmp_path)


def test_the_lock_is_renewed_between_two_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    with exclusive_lock(tmp_path):
        first = read_json(tmp_path / "lock")["heartbeat"]
        deadline = time.monotonic() + 30
        while read_json(tmp_path / "lock")["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"pid": 1}, {"created": 1.0}])
def test_a_lock_that_another_process_has_taken_over_is_not_renewed(tmp_path, monkeypatch, other):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.02)
    with exclusive_lock(tmp_path):
        record = read_json(tmp_path / "lock")
        record.pop("schema")
        taken = {**record, **other, "heartbeat": 1.0}
        with Lease(tmp_path / "lock").guard():
            write_json(tmp_path / "lock", taken)
        time.sleep(0.1)
    assert read_json(tmp_path / "lock") == {"schema": 1, **taken}


def test_a_holder_without_a_process_is_named(tmp_path):
    Lease(tmp_path / "lock").take_for("Slurm job 7")
    with pytest.raises(UserError, match="is in use by Slurm job 7"), exclusive_lock(tmp_path):
        pass
