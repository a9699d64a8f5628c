"""train.start_over where the checkpoints are, where they are not mounted, and next to another run's."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fm_core.checkpoint.catalog import CheckpointCatalog
from fm_core.checkpoint.format import seal
from fm_core.checkpoint.ownership import OWNER, begin_history
from fm_core.checkpoint.train_state import TrainState
from fm_core.config import RunConfig
from fm_core.errors import ForeignCheckpointsError, UnreachableError
from fm_core.run.directory import RunDirectory
from fm_core.run.fence import Unfenced
from fm_core.run.history import read_history
from fm_core.training.start_over import prepare_history


@pytest.fixture
def config(tmp_path):
    """A run that has completed a checkpoint in a place outside of its directory, and is to start over."""
    train = {"checkpoint_root": str(tmp_path / "disk"), "start_over": True}
    config = RunConfig.model_validate({"run": {"root": str(tmp_path / "runs"), "name": "a"}, "train": train})
    begin_history(config)
    checkpoints = CheckpointCatalog.of(config)
    recipe = {"recipe": json.dumps({"run": {"name": "a"}})}
    problem = checkpoints.begin(10) or checkpoints.write(10, "raw", {"a": torch.ones(3)}, recipe)
    assert (problem or checkpoints.finish(TrainState(step=10))) is None
    return config


def names(config):
    return sorted(path.name.split(".")[0] for path in CheckpointCatalog.of(config).folder.glob("*step-*"))


def test_it_sets_aside_what_is_there_once(config):
    assert prepare_history(config, Unfenced()).completed_step is None
    assert prepare_history(config, Unfenced()).start_overs == 1
    assert names(config) == ["set-aside-step-00000010"]


def test_it_waits_for_a_disk_that_is_not_mounted(config, tmp_path):
    before = read_history(RunDirectory(config).path)
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    (tmp_path / "disk").mkdir()
    with pytest.raises(UnreachableError, match="has completed step 10: check that the disk is mounted"):
        prepare_history(config, Unfenced())
    assert read_history(RunDirectory(config).path) == before
    assert list((tmp_path / "disk").iterdir()) == []


def test_in_a_place_without_an_owner_nothing_of_another_run_is_renamed(config, tmp_path):
    (tmp_path / "disk" / OWNER).unlink()
    other = tmp_path / "disk" / "step-00000020"
    other.mkdir()
    metadata = {"recipe": json.dumps({"run": {"name": "b"}})}
    save_file({"a": torch.ones(3)}, other / "raw.safetensors", metadata)
    seal(other)  # by a version that did not record the id of the run
    with pytest.raises(ForeignCheckpointsError, match="step-00000020 is of another run"):
        prepare_history(config, Unfenced())
    assert names(config) == ["step-00000010", "step-00000020"]


class LeaseOutOfSight(Unfenced):
    def check(self):
        raise FileNotFoundError(2, "No such file or directory", "lock")


def test_a_rank_makes_no_history_in_an_empty_mount_point(tmp_path):
    """The supervisor has written it before it started the ranks."""
    config = RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "a"}})
    (tmp_path / "a").mkdir()
    with pytest.raises(UnreachableError, match="run directory is mounted"):
        prepare_history(config, LeaseOutOfSight())
    assert list((tmp_path / "a").iterdir()) == []
