"""The epoch of a lease, and how its former holder detects that it has lost the lease."""

import os
import shutil

import pytest

from fm_core.errors import LeaseLostError, Outcome, outcome_of
from fm_core.run.fence import LeaseFence, Unfenced
from fm_core.run.lease import Lease
from fm_core.storage.atomic_files import read_json, write_json


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "lock"


def take(path, job):
    """A new holder, as another process would be."""
    lease = Lease(path)
    with lease.guard():
        return LeaseFence(lease, job, lease.take(os.getpid(), job=job))


def test_every_holder_has_a_higher_epoch_even_after_a_release(path):
    assert [take(path, job).epoch for job in ("a", "b")] == [1, 2]
    Lease(path).release(job="b")
    assert not path.exists()
    assert take(path, "c").epoch == 3
    assert read_json(path)["epoch"] == 3
    path.unlink()
    assert take(path, "d").epoch == 4


def test_a_run_that_was_copied_without_its_lock_goes_on_after_the_epoch_of_its_last_job(path):
    assert Lease(path).next_epoch(at_least=7) == 8


def test_a_job_that_is_recorded_again_keeps_its_epoch(path):
    fence = take(path, "a")
    with fence.lease.guard():
        assert fence.lease.take(os.getpid(), fence.epoch, job="a") == fence.epoch
    fence.check()


def test_the_check_notices_another_holder(path):
    first = take(path, "a")
    first.check()
    second = take(path, "b")
    with pytest.raises(LeaseLostError, match=f"was taken over by process {os.getpid()} on") as caught:
        first.check()
    assert "\n" not in str(caught.value)
    assert outcome_of(caught.value) is Outcome.LEASE_LOST
    second.check()


def test_the_check_notices_a_later_attempt_of_the_same_job(path):
    """Slurm queues a job again under its number; a node that was cut off may still run the first attempt."""
    first = take(path, "a")
    take(path, "a").check()
    with pytest.raises(LeaseLostError):
        first.check()


def test_a_former_holder_neither_renews_nor_releases(path):
    first = take(path, "a")
    take(path, "b")
    before = path.read_bytes()
    with pytest.raises(LeaseLostError):
        first.lease.heartbeat(job="a", epoch=1)
    first.lease.release(job="a", epoch=1)
    assert path.read_bytes() == before


def test_a_lock_that_was_removed_by_hand_is_written_again(path):
    fence = take(path, "a")
    fence.check()
    path.unlink()
    fence.check()
    assert read_json(path)["job"] == "a"


@pytest.mark.parametrize("later", ["released", "taken and removed"])
def test_a_lock_that_is_gone_after_another_holder_is_lost(path, later):
    fence = take(path, "a")
    fence.check()
    if later == "released":
        Lease(path).release(job="a")
    else:
        take(path, "b")
        path.unlink()
    with pytest.raises(LeaseLostError):
        fence.check()
    assert not path.exists()


@pytest.mark.parametrize("gone", ["the directory", "its content"])
def test_a_directory_out_of_reach_is_an_error_that_may_pass_and_is_not_created(path, gone):
    """A disk that is not mounted: the mount point is missing or empty."""
    fence = take(path, "a")
    fence.check()
    hidden = path.parent.rename(path.parents[1] / "unmounted")
    if gone == "its content":
        path.parent.mkdir()
    before = list(path.parents[1].rglob("*"))
    with pytest.raises(OSError, match="No such file"):
        fence.check()
    assert list(path.parents[1].rglob("*")) == before
    shutil.rmtree(path.parent, ignore_errors=True)
    hidden.rename(path.parent)
    fence.check()


def test_a_lock_that_cannot_be_read_is_an_error_that_may_pass(path):
    fence = take(path, "a")
    path.write_text("{")
    with pytest.raises(OSError, match="not JSON"):
        fence.check()


def test_a_job_of_an_earlier_version_has_no_epoch(path):
    take(path, "a")
    record = read_json(path)
    write_json(path, {key: value for key, value in record.items() if key not in ("schema", "epoch", "beats")})
    LeaseFence(Lease(path), "a", 0).check()
    with pytest.raises(LeaseLostError):
        LeaseFence(Lease(path), "b", 0).check()


def test_without_a_lease_there_is_nothing_to_check():
    fence = Unfenced()
    fence.check()
    assert (fence.job, fence.epoch) == ("", 0)
