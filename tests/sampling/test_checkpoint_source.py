"""Weights of a checkpoint: location, verification and refusal."""

import os

import pytest
import torch
from safetensors.torch import save_file

from fm_core.errors import UserError
from fm_core.sampling.checkpoint_source import checkpoint_step, load_model, weights_file
from fm_core.storage.hashing import sha256_file
from fm_core.storage.store import Store
from tests.support.random_checkpoint import CPU, MODEL, checkpoint, config_at, config_path


class TestWeights:
    def refused(self, path) -> str:
        with pytest.raises(UserError) as caught:
            load_model(path, CPU)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_weights_of_another_network_are_refused(self, tmp_path):
        config = config_at(tmp_path)
        wider = {**MODEL, "channels": 16, "class_conditional": True}
        folder = checkpoint(config, model=config.model.model_validate(wider).model_dump(mode="json"))
        assert "does not hold the network" in self.refused(folder / "raw.safetensors")

    def test_an_unknown_network_is_refused(self, tmp_path):
        config = config_at(tmp_path)
        folder = checkpoint(config, model={"kind": "hyper-net"})
        assert "does not hold the network" in self.refused(folder / "raw.safetensors")

    def test_a_file_without_a_recipe_is_refused(self, tmp_path):
        save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
        assert "has no recipe of its network" in self.refused(tmp_path / "a.safetensors")

    def test_a_file_that_is_none_is_refused(self, tmp_path):
        (tmp_path / "a.safetensors").write_bytes(b"not weights at all")
        self.refused(tmp_path / "a.safetensors")
        self.refused(tmp_path / "missing.safetensors")

    def test_weights_that_differ_from_the_hash_of_their_checkpoint_are_refused(self, config):
        path = weights_file(config, 7)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert "differs from the hash" in self.refused(path)

    def test_weights_that_a_checkpoint_does_not_have_are_refused_with_those_it_has(self, config):
        other = config.model_copy(update={"sample": config.sample.model_copy(update={"weights": "ema-0.5"})})
        with pytest.raises(UserError, match=r"sample.weights ema-0.5.*ema-0.999, raw"):
            weights_file(other, 7)

    def test_a_step_that_is_not_there_is_refused_with_those_that_are(self, config):
        assert checkpoint_step(config) == 7
        checkpoint(config, step=9)
        assert checkpoint_step(config) == 9
        (config_path(config) / "train" / "checkpoints" / "step-00000009" / "COMPLETE").unlink()
        assert checkpoint_step(config) == 7
        other = config.model_copy(update={"sample": config.sample.model_copy(update={"step": 8})})
        with pytest.raises(UserError, match=r"sample.step 8: .* has 7"):
            checkpoint_step(other)

    def test_no_checkpoint_is_refused_with_what_to_do(self, tmp_path):
        with pytest.raises(UserError, match="run fm train first"):
            checkpoint_step(config_at(tmp_path))

    def test_the_network_is_ready_to_use(self, config):
        model = load_model(weights_file(config, 7), CPU)
        assert not model.network.training
        assert not any(weight.requires_grad for weight in model.network.parameters())
        assert (model.step, model.classes, model.conditional, model.quantizer.levels) == (7, 10, True, 17)


class TestWeightsInAStore:
    """The content of the store is used, not files downloaded by an earlier call."""

    @pytest.fixture
    def stored(self, tmp_path):
        """A function that writes a checkpoint of random weights to a store in memory."""
        config = config_at(tmp_path / "here")
        root = f"memory://{tmp_path.name}"
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"checkpoint_root": root})}
        )

        def put(step, seed):
            made = checkpoint(config_at(tmp_path / f"{step}-{seed}"), step=step, seed=seed)
            for path in made.iterdir():
                Store.at(root, made.name).write_bytes(path.name, path.read_bytes())
            return sha256_file(made / "ema-0.999.safetensors")

        return config, put

    def test_a_step_that_was_trained_again_is_fetched_again(self, stored):
        config, put = stored
        for seed in (0, 1):
            wanted = put(7, seed)
            for _ in range(2):
                assert load_model(weights_file(config, 7), CPU).weights_sha256 == wanted

    def test_what_has_not_changed_is_not_fetched_again(self, stored, monkeypatch):
        config, put = stored
        put(7, 0)
        fetched = []
        fetch = Store.fetch
        monkeypatch.setattr(
            Store, "fetch", lambda self, name, target: (fetched.append(name), fetch(self, name, target))
        )
        weights_file(config, 7)
        weights_file(config, 7)
        assert fetched == ["COMPLETE", "ema-0.999.safetensors", "COMPLETE"]

    def test_copies_of_other_steps_are_removed_unless_they_may_be_in_use(self, stored):
        config, put = stored
        folders = []
        for step in (7, 8, 9):
            put(step, 0)
            folders.append(weights_file(config, step).parent)
            if step == 7:
                os.utime(folders[0], (0, 0))
        assert [folder.exists() for folder in folders] == [False, True, True]

    def test_one_that_is_removed_meanwhile_is_reported_in_one_line(self, stored):
        config, put = stored
        put(7, 0)
        Store.at(config.train.checkpoint_root).remove("step-00000007/COMPLETE")
        with pytest.raises(UserError, match="was removed while it was read") as caught:
            weights_file(config, 7)
        assert "\n" not in str(caught.value)
