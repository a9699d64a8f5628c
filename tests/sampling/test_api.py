"""`fm_core.load`: models from run directories, moved runs and single files."""

import re
import shutil

import pytest
import torch

import fm_core
from fm_core.config import dump_yaml
from fm_core.errors import UserError
from fm_core.sampling import api as loaded_module
from fm_core.sampling.checkpoint_source import checkpoint_step, weights_file
from fm_core.storage.atomic_files import read_json, write_json
from tests.support import ROOT
from tests.support.random_checkpoint import CPU, SHAPE, checkpoint, config_at, config_path, make, pixels


@pytest.fixture
def run(config):
    (config_path(config) / "config.yaml").write_text(dump_yaml(config))
    return config_path(config)


def test_a_run_gives_network_objective_and_sampler(config, run):
    loaded = fm_core.load(run, device="cpu")
    assert (loaded.device, loaded.objective.name, loaded.model.step) == (CPU, "flow-matching", 7)
    x = torch.randn(2, *SHAPE)
    label = torch.tensor([1, 2])
    assert loaded.network(torch.rand(2), x, label).shape == x.shape
    # The images of a batch are those that `fm sample` writes for this batch.
    images = loaded.sample(4, first=4, solver="euler", steps=3)
    assert torch.equal(images, pixels(make(config))[4:8])


@pytest.mark.parametrize(
    ("solver", "asked"),
    [("euler", {"steps": 3}), ("dopri5", {"rtol": 0.05, "atol": 0.05})],
    ids=["fixed", "adaptive"],
)
def test_batches_are_cut_where_fm_sample_cuts_them(tmp_path, solver, asked):
    config = config_at(tmp_path, images=8, solver=solver, **{"steps": None} | asked)
    checkpoint(config)
    (config_path(config) / "config.yaml").write_text(dump_yaml(config))
    written = pixels(make(config))
    loaded = fm_core.load(config_path(config), device="cpu")
    assert torch.equal(loaded.sample(8, solver=solver, batch=4, **asked), written)
    assert torch.equal(loaded.sample(6, first=4, solver=solver, batch=4, **asked)[:4], written[4:])
    other = loaded.sample(5, first=3, solver=solver, batch=4, **asked)  # batches: image 3, then images 4 .. 7
    assert torch.equal(other[1:], written[4:])
    assert len(loaded.sample(1, first=250, solver=solver, **asked)) == 1


def test_no_batch_is_larger_than_asked(run, monkeypatch):
    solved = []
    right = loaded_module.generate
    monkeypatch.setattr(
        loaded_module,
        "generate",
        lambda model, draw, first, n, device: (
            solved.append((first, n)),
            right(model, draw, first, n, device),
        )[1],
    )
    loaded = fm_core.load(run, device="cpu")
    assert len(loaded.sample(600, first=100, solver="euler", steps=1)) == 600
    assert solved == [(100, 150), (250, 250), (500, 200)]
    with pytest.raises(ValueError, match="at least 1"):
        loaded.sample(4, solver="euler", steps=1, batch=0)


def test_a_single_file_and_a_run_that_was_moved_are_enough(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file = shutil.copy(weights_of(run), tmp_path / "elsewhere" / "ema-0.999.safetensors")
    one = fm_core.load(file, device="cpu").sample(2, solver="euler", steps=2)
    moved = shutil.move(run, tmp_path / "moved")
    other = fm_core.load(moved, weights="raw", device="cpu").sample(2, solver="euler", steps=2)
    assert torch.equal(one, other)  # raw and averaged weights are equal in this checkpoint


def weights_of(run):
    return run / "train" / "checkpoints" / "step-00000007" / "ema-0.999.safetensors"


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a run directory"):
        fm_core.load(tmp_path)
    with pytest.raises(UserError, match=r"nothing\.safetensors cannot be read"):
        fm_core.load(tmp_path / "nothing.safetensors")


class TestWhichCheckpoint:
    def of(self, config, **sample):
        return config.model_copy(update={"sample": config.sample.model_copy(update=sample)})

    def test_a_bare_file_names_its_own_step(self, config, tmp_path):
        file = shutil.copy(weights_file(config, 7), tmp_path / "shared.safetensors")
        other = self.of(config, weights=str(file))
        assert checkpoint_step(other) == 7
        assert str(weights_file(other, 7)) == str(file)

    def test_samples_of_a_bare_file_are_named_after_it_in_any_folder(self, config, tmp_path):
        keys = set()
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            file = shutil.copy(weights_file(config, 7), tmp_path / folder / "shared.safetensors")
            keys.add(make(self.of(config, weights=str(file), root=str(tmp_path / "samples"))).key)
        (key,) = keys
        assert key.startswith("shared-euler-3-")

    def test_best_is_the_lowest_validation_loss(self, config):
        with pytest.raises(UserError, match=r"no checkpoint in .* has a validation loss"):
            checkpoint_step(self.of(config, step="best"))
        for step, loss in ((9, 0.5), (11, 0.2), (13, 0.3)):
            write_json(checkpoint(config, step=step) / "state.json", {"held_out_loss": loss})
        assert read_json(config_path(config) / "train/checkpoints/step-00000011/state.json")
        assert checkpoint_step(self.of(config, step="best")) == 11
        assert checkpoint_step(config) == 13


def test_the_example_of_sampling_and_evaluation_md_runs(config, run, tmp_path, monkeypatch):
    page = (ROOT / "infra" / "docs" / "sampling-and-evaluation.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "clone" / "runs").mkdir(parents=True)
    (tmp_path / "clone" / "runs" / "digits").symlink_to(run)
    monkeypatch.chdir(tmp_path / "clone")
    names: dict = {}
    exec(compile(example, "sampling-and-evaluation.md", "exec"), names)
    assert (names["images"].dtype, len(names["images"])) == (torch.uint8, 16)
    x = torch.randn(2, *SHAPE)
    assert names["velocity"](torch.tensor(0.5), x).shape == x.shape
