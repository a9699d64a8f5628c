"""train.init_from a run: which weights are loaded, from where, and when it is ignored."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fm_core.checkpoint.format import seal
from fm_core.config import RunConfig, dump_yaml
from fm_core.errors import UserError
from fm_core.launch.worker_main import Rank
from fm_core.run.directory import RunDirectory
from fm_core.stages.train import check_initial_weights
from fm_core.storage.atomic_files import write_text
from fm_core.storage.store import Store
from fm_core.training import train_worker as rank_module
from fm_core.training.pretrained import pretrained_weights
from fm_core.training.train_worker import _has_checkpoint


def network():
    return nn.Linear(2, 1, bias=False)


@pytest.fixture
def run(tmp_path):
    """Makes a run whose averages hold their own decay as weights; the second decay sorts before the first."""

    def make(step=10, **train):
        tree = {"run": {"root": str(tmp_path / "runs"), "name": "other"}}
        config = RunConfig.model_validate({**tree, "train": {"ema_decays": (0.999, 0.5), **train}})
        directory = RunDirectory(config)
        made = tmp_path / "made" / f"step-{step:08d}"
        made.mkdir(parents=True)
        for decay in config.train.ema_decays:
            save_file({"weight": torch.full((1, 2), decay + step)}, made / f"ema-{decay:g}.safetensors")
        seal(made)
        store = Store.at(directory.checkpoints, made.name)
        for path in made.iterdir():
            store.write_bytes(path.name, path.read_bytes())
        write_text(directory.path / "config.yaml", dump_yaml(config))
        return directory

    return make


def loaded_value(where):
    return pretrained_weights(str(where), network())["weight"][0, 0].item()


def test_it_is_the_average_that_the_run_names_first(run):
    directory = run(10)
    assert loaded_value(directory.path) == pytest.approx(10.999)
    run(20)
    assert loaded_value(directory.path) == pytest.approx(20.999)


def test_a_run_that_was_moved_has_its_checkpoints_with_it(run, tmp_path):
    moved = tmp_path / "elsewhere" / "new-name"
    moved.parent.mkdir()
    run(10).path.rename(moved)
    assert loaded_value(moved) == pytest.approx(10.999)


def test_checkpoints_are_looked_for_where_the_run_keeps_them(run, tmp_path):
    assert loaded_value(run(10, checkpoint_root=f"memory://{tmp_path.name}").path) == pytest.approx(10.999)
    assert loaded_value(run(20, checkpoint_root=str(tmp_path / "kept")).path) == pytest.approx(20.999)


def test_weights_that_differ_from_their_hash_are_refused(run):
    directory = run(10)
    file = directory.path / "train" / "checkpoints" / "step-00000010" / "ema-0.999.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"train.init_from: .* differs from the hash") as caught:
        loaded_value(directory.path)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_complete_checkpoint_is_refused_with_where_it_was_looked_for(run, tmp_path):
    directory = run(10, checkpoint_root=str(tmp_path / "kept"))
    (tmp_path / "kept" / "step-00000010" / "COMPLETE").unlink()
    with pytest.raises(UserError, match=r"has no complete checkpoint.*checkpoint_root is .*kept"):
        loaded_value(directory.path)


def test_a_run_that_has_begun_does_not_need_it_any_more(run, monkeypatch):
    monkeypatch.setattr(rank_module.dist, "broadcast_object_list", lambda objects, src: None)
    config = run(10).config
    config = config.model_copy(update={"train": config.train.model_copy(update={"init_from": "gone"})})
    first = Rank(0, 1, 0, RunDirectory(config).path, "job")
    assert _has_checkpoint(config, first)
    check_initial_weights(config)
    (RunDirectory(config).path / "train" / "checkpoints" / "step-00000010" / "COMPLETE").unlink()
    assert not _has_checkpoint(config, first)
    with pytest.raises(UserError, match=r"train.init_from: gone does not exist"):
        check_initial_weights(config)
