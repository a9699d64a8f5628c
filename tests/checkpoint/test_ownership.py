"""Ownership of a checkpoint root on a disk, in a store, and on a disk that is not mounted."""

import os
import threading

import pytest
import torch

from fm_core.checkpoint import catalog as catalog_module
from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import complete_steps, stored_steps
from fm_core.checkpoint.ownership import (
    OWNER,
    RunIdentity,
    WriteAccess,
    begin_history,
    check_owner,
    identity_of,
    is_shared,
    owner_of,
    staging_folder,
)
from fm_core.checkpoint.retention import Retention
from fm_core.checkpoint.train_state import TrainState
from fm_core.config import RunConfig
from fm_core.errors import ForeignCheckpointsError, UnreachableError
from fm_core.storage.store import Store

ONE, OTHER = RunIdentity("1" * 32, "one", "/runs/one"), RunIdentity("2" * 32, "other")


def at(url, identity, folder="/none", last=2):
    return CheckpointCatalog(
        str(url), folder, Retention(last), access=WriteAccess(Store.at(str(url)), identity)
    )


def write(checkpoints, step):
    problem = checkpoints.begin(step)
    problem = problem or checkpoints.write(step, "raw", {"a": torch.ones(3)}, {"recipe": "{}"})
    return problem or checkpoints.finish(TrainState(step=step))


def test_a_place_belongs_to_the_first_run_that_writes_there(tmp_path):
    assert write(at(tmp_path, ONE), 10) is None
    assert owner_of(Store.at(str(tmp_path))) == ONE.id
    for action in (lambda other: other.begin(5), lambda other: other.newest()):
        with pytest.raises(
            ForeignCheckpointsError, match=r"another run, one \(/runs/one\): choose another train"
        ):
            action(at(tmp_path, OTHER))
    assert write(at(tmp_path, ONE), 20) is None
    assert complete_steps(tmp_path) == [10, 20]


def test_nothing_is_claimed_before_the_first_checkpoint(tmp_path):
    assert at(tmp_path / "place", ONE).newest() is None
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_two_that_begin_together_one_is_refused(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(1, "not permitted")))
    for attempt in range(20):
        place, begun = tmp_path / str(attempt), []
        barrier = threading.Barrier(2)

        def begin(identity, place=place, begun=begun, barrier=barrier):
            checkpoints = at(place, identity)
            barrier.wait()
            try:
                checkpoints.begin(10)
                begun.append(identity)
            except ForeignCheckpointsError:
                pass

        threads = [threading.Thread(target=begin, args=(identity,)) for identity in (ONE, OTHER)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(begun) == 1
        assert owner_of(Store.at(str(place))) == begun[0].id


def test_a_place_that_is_not_mounted_is_not_written_to_until_it_is_back(tmp_path):
    checkpoints = at(tmp_path / "disk", ONE)
    assert write(checkpoints, 10) is None
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    (tmp_path / "disk").mkdir()
    problem = write(checkpoints, 20)
    assert problem.temporary
    assert f"{OWNER} is missing from" in problem.message
    assert list((tmp_path / "disk").iterdir()) == []
    (tmp_path / "disk").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    assert write(checkpoints, 30) is None
    assert complete_steps(tmp_path / "disk") == [10, 30]


def test_a_snapshot_does_not_claim_an_empty_mount_point(tmp_path):
    """The disk is unmounted when a job that has resumed from it writes its first snapshot."""
    config = configured(tmp_path, "a", checkpoint_root=str(tmp_path / "disk"))
    begin_history(config)
    assert write(CheckpointCatalog.of(config), 10) is None
    resumed, blind = CheckpointCatalog.of(config), CheckpointCatalog.of(config)
    assert resumed.newest() is not None
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    (tmp_path / "disk").mkdir()
    for catalog in (resumed.snapshots(), resumed, blind.snapshots(), blind):
        problem = write(catalog, 20)
        assert problem.temporary
        assert f"{OWNER} is missing from" in problem.message
    assert list((tmp_path / "disk").iterdir()) == []


def test_another_disk_in_its_place_is_not_written_to(tmp_path):
    checkpoints = at(tmp_path / "disk", ONE)
    assert write(checkpoints, 10) is None
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    assert write(at(tmp_path / "disk", OTHER), 5) is None
    problem = write(checkpoints, 20)
    assert problem.temporary
    assert "another run, other" in problem.message
    assert complete_steps(tmp_path / "disk") == [5]


def test_what_appears_next_to_it_is_not_removed(tmp_path):
    """Later steps, and checkpoints of another run that were copied there."""
    checkpoints = at(tmp_path / "a", ONE, last=1)
    write(checkpoints, 10)
    for step in (5, 90):
        write(at(tmp_path / "b", OTHER, last=9), step)
        (tmp_path / "b" / f"step-{step:08d}").rename(tmp_path / "a" / f"step-{step:08d}")
    write(checkpoints, 20)
    assert complete_steps(tmp_path / "a") == [5, 20, 90]


def test_a_store_has_an_owner_too(tmp_path):
    url = f"memory://owned-{tmp_path.name}"
    one = at(url, ONE, tmp_path / "one")
    assert write(one, 10) is None
    assert one.wait(30) is None
    assert owner_of(Store.at(url)) == ONE.id
    with pytest.raises(ForeignCheckpointsError, match=r"train\.checkpoint_root"):
        at(url, OTHER, tmp_path / "other").newest()
    # One that started while the store was empty detects it at its first upload, and ends at its next
    # checkpoint.
    other = at(url, OTHER, tmp_path / "other")
    assert write(other, 10) is None
    with pytest.raises(ForeignCheckpointsError):
        other.wait(30)
    with pytest.raises(ForeignCheckpointsError):
        other.begin(20)
    assert stored_steps(one.store) == [10]


def test_a_staged_checkpoint_of_another_run_is_not_uploaded(tmp_path, caplog):
    url = f"memory://mixed-{tmp_path.name}"
    assert write(at(tmp_path / "staging", OTHER), 10) is None
    one = at(url, ONE, tmp_path / "staging")
    one.catch_up()
    assert one.wait(30) is None
    assert stored_steps(one.store) == []
    assert "is of another run; check train.checkpoint_staging" in caplog.text


def configured(tmp_path, name, **train):
    tree = {"run": {"root": str(tmp_path / "runs"), "name": name}, "train": train}
    return RunConfig.model_validate(tree)


def test_runs_with_one_staging_folder_have_one_each_below_it(tmp_path):
    keys = {"checkpoint_root": "memory://bucket/x", "checkpoint_staging": str(tmp_path / "staging")}
    configs = [configured(tmp_path, name, **keys) for name in ("a", "b")]
    for config in configs:
        begin_history(config)
    folders = [staging_folder(config) for config in configs]
    assert folders[0] != folders[1]
    for config, folder in zip(configs, folders, strict=True):
        assert folder.parent == tmp_path / "staging"
        assert folder.name == f"{config.run.name}-{identity_of(config).id[:8]}"


def test_a_checkpoint_root_in_the_run_directory_belongs_to_that_run(tmp_path):
    assert not is_shared(configured(tmp_path, "a"))
    assert not is_shared(
        configured(tmp_path, "a", checkpoint_root=str(tmp_path / "runs" / "a" / "elsewhere"))
    )
    assert is_shared(configured(tmp_path, "a", checkpoint_root=str(tmp_path / "elsewhere")))
    assert is_shared(configured(tmp_path, "a", checkpoint_root="s3://bucket/a"))


def test_a_lost_history_is_restored_from_the_place_in_the_run_directory(tmp_path):
    config = configured(tmp_path, "a")
    begin_history(config)
    before = identity_of(config)
    assert write(CheckpointCatalog.of(config), 10) is None
    (tmp_path / "runs" / "a" / "train" / "history.json").unlink()
    begin_history(config)
    assert identity_of(config) == before


@pytest.mark.parametrize("back", [True, False])
def test_a_place_that_is_unmounted_while_its_checkpoints_are_verified_has_no_damage(
    tmp_path, monkeypatch, back
):
    place, unmounted = tmp_path / "place", tmp_path / "unmounted"
    for step in (10, 20):
        assert write(at(place, ONE), step) is None
    verify, left = catalog_module.verify, [1]

    def interrupted(directory, progress):
        if not left:
            return verify(directory, progress)
        left.clear()
        place.rename(unmounted)
        place.mkdir()
        problem = verify(directory, progress)
        if back:
            place.rmdir()
            unmounted.rename(place)
        return problem

    monkeypatch.setattr(catalog_module, "verify", interrupted)
    checkpoints = at(place, ONE)
    if back:
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.name == "step-00000020"
    else:
        with pytest.raises(UnreachableError, match="check that it is mounted"):
            checkpoints.newest()
    assert checkpoints.damaged == {}


def test_a_run_without_a_history_does_not_begin_where_another_has_its_checkpoints(tmp_path):
    """Its directory may be an empty mount point: nothing is written there."""
    config = configured(tmp_path, "a", checkpoint_root=str(tmp_path / "place"))
    check_owner(config)
    begin_history(config)
    assert write(CheckpointCatalog.of(config), 10) is None
    check_owner(config)
    (tmp_path / "runs").rename(tmp_path / "unmounted")
    with pytest.raises(ForeignCheckpointsError, match="holds the checkpoints of another run, a"):
        check_owner(config)
    assert not (tmp_path / "runs").exists()
