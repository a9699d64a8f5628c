"""An interrupted removal from a store is undone or finished by a later job, never by an earlier one."""

import json
from types import SimpleNamespace

import pytest

from fm_core.checkpoint.format import COMPLETE
from fm_core.checkpoint.ownership import WriteAccess
from fm_core.checkpoint.remote_removal import REMOVING, RemoteRemoval
from fm_core.storage.store import Store

NAME = "step-00000010"
RECORD = json.dumps({"files": {"raw.safetensors": {"bytes": 3, "sha256": "0" * 64}}}).encode()


@pytest.fixture
def store(tmp_path) -> Store:
    """A store with a checkpoint of one file whose removal a job of epoch 2 has begun."""
    store = Store.at(str(tmp_path))
    store.write_bytes(f"{NAME}/raw.safetensors", b"abc")
    store.write_bytes(f"{NAME}/{REMOVING}.e2-other", RECORD)
    return store


def recover(store: Store, epoch: int) -> list[str]:
    fence = SimpleNamespace(job="this", epoch=epoch, check=lambda: None)
    RemoteRemoval(store, WriteAccess(store, fence=fence)).recover(NAME)
    return sorted(store.below(NAME).sizes())


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_removal_whose_files_are_all_there_is_undone(store, epoch):
    assert recover(store, epoch) == [COMPLETE, "raw.safetensors"]


def test_a_removal_whose_files_are_missing_is_finished(store):
    store.remove(f"{NAME}/raw.safetensors")
    assert recover(store, 3) == []


def test_a_removal_of_a_later_job_is_left_to_it(store):
    assert recover(store, 1) == [f"{REMOVING}.e2-other", "raw.safetensors"]
