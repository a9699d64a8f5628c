"""Images by number, and the tars that hold them; networks with random weights, no processes."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import save_file

from fm_core.config import RunConfig
from fm_core.errors import Stopped, UserError
from fm_core.method.solve import Solver
from fm_core.models.build import build_network
from fm_core.run.files import write_json
from fm_core.run.rank import Rank
from fm_core.sampling.generate import generate
from fm_core.sampling.model import checkpoint_step, load_model, weights_file
from fm_core.sampling.rank import sample
from fm_core.sampling.store import SampleSet, protocol_of, sample_key
from fm_core.training.checkpoint import _written_out

SHAPE = (1, 8, 8)
MODEL = {"channels": 8, "channel_multipliers": [1], "attention_resolutions": [], "head_channels": 8}
CPU = torch.device("cpu")


def config_at(root, **sample_keys):
    keys = {"images": 11, "batch": 4, "solver": "euler", "steps": 3} | sample_keys
    return RunConfig.model_validate(
        {
            "run": {"root": str(root), "name": "r"},
            "model": {**MODEL, "class_conditional": True},
            "sample": {key: value for key, value in keys.items() if value is not None},
        }
    )


def checkpoint(config, step=7, seed=0, **recipe):
    """A complete checkpoint of random weights."""
    torch.manual_seed(seed)
    network = build_network(config.model, SHAPE, 10)
    weights = {name: torch.randn_like(weight) * 0.2 for name, weight in network.state_dict().items()}
    recipe = {
        "model": config.model.model_dump(mode="json"),
        "method": config.method.model_dump(mode="json"),
        "levels": 17,
        "image_shape": list(SHAPE),
        "classes": 10,
        "data": {"name": "digits", "version": "v"},
        "step": step,
        "images_seen": 5,
        **recipe,
    }
    folder = config_path(config) / "train" / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in ("raw", "ema-0.999"):
        save_file(weights, folder / f"{name}.safetensors", {"recipe": json.dumps(recipe)})
    write_json(folder / "COMPLETE", {"files": _written_out(folder)})
    return folder


def config_path(config):
    from fm_core.run.directory import RunDirectory

    return RunDirectory(config).path


def samples_of(config):
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), CPU)
    return SampleSet(config, step, protocol_of(config, model.weights_sha256))


def make(config, ranks=1):
    samples = samples_of(config)
    samples.control.mkdir(parents=True, exist_ok=True)
    for number in range(ranks):
        sample(config, Rank(number, ranks, number, samples.control, "job"))
    return samples


def pixels(samples):
    return torch.cat(list(samples.read(SHAPE)))


@pytest.fixture
def config(tmp_path):
    config = config_at(tmp_path)
    checkpoint(config)
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = config_at(tmp_path_factory.mktemp("model"))
    return load_model(checkpoint(config) / "raw.safetensors", CPU)


class TestImages:
    def test_image_number_i_is_the_same_wherever_it_is_made(self, model):
        """To the bit but for the rounding of sums that depend on the batch's size: one grey level, rarely."""
        solver = Solver("euler", steps=3)
        whole = generate(model, solver, 1, 0, 24, CPU)
        for size in (1, 3, 8):
            batches = [generate(model, solver, 1, first, size, CPU) for first in range(0, 24, size)]
            parts = torch.cat([batch.images for batch in batches])
            apart = (parts.int() - whole.images.int()).abs()
            assert apart.max() <= 1
            assert (apart > 0).double().mean() < 2e-3
            assert torch.equal(torch.cat([batch.labels for batch in batches]), whole.labels)

    def test_the_same_batch_is_the_same_to_the_bit(self, model):
        solver = Solver("midpoint", steps=2)
        one, two = (generate(model, solver, 1, 8, 4, CPU) for _ in range(2))
        assert torch.equal(one.images, two.images)
        assert (one.first, one.nfe) == (8, 4)

    def test_the_seed_and_the_number_move_the_image(self, model):
        solver = Solver("euler", steps=2)
        images = [
            generate(model, solver, seed, first, 1, CPU).images for seed, first in ((1, 0), (1, 1), (2, 0))
        ]
        assert not any(torch.equal(images[a], images[b]) for a, b in ((0, 1), (0, 2), (1, 2)))

    def test_images_are_grey_levels_of_the_data(self, model):
        batch = generate(model, Solver("euler", steps=2), 1, 0, 16, CPU)
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (16, *SHAPE)
        assert batch.images.max() <= 16

    def test_classes_are_drawn_evenly(self, model):
        labels = generate(model, Solver("euler", steps=1), 1, 0, 1000, CPU).labels
        counts = torch.bincount(labels, minlength=10)
        assert len(counts) == 10
        assert counts.min() > 60

    def test_an_adaptive_solver_says_what_it_cost(self, model):
        batch = generate(model, Solver("dopri5", rtol=0.1, atol=0.1), 1, 0, 4, CPU)
        assert batch.nfe >= 6 * batch.accepted
        assert batch.rejected is not None


class TestKey:
    base = config_at("/nowhere")

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 1},
            {"images": 12},
            {"batch": 5},
            {"solver": "midpoint"},
            {"steps": 4},
            {"weights": "raw"},
            {"solver": "dopri5", "steps": None},
        ],
        ids=str,
    )
    def test_every_setting_that_moves_pixels_moves_the_key(self, change):
        other = config_at("/nowhere", **change)
        assert sample_key(other, protocol_of(other, "w")) != sample_key(
            self.base, protocol_of(self.base, "w")
        )

    @pytest.mark.parametrize("change", [{"rtol": 1e-4}, {"atol": 1e-4}, {"rtol": 1.1e-5}])
    def test_tolerances_move_the_key(self, change):
        adaptive = {"solver": "dopri5", "steps": None}
        one, other = config_at("/x", **adaptive), config_at("/x", **adaptive, **change)
        assert sample_key(one, protocol_of(one, "w")) != sample_key(other, protocol_of(other, "w"))

    def test_the_weights_themselves_move_the_key(self):
        assert sample_key(self.base, protocol_of(self.base, "w")) != sample_key(
            self.base, protocol_of(self.base, "v")
        )

    def test_where_samples_lie_does_not(self):
        other = config_at("/elsewhere")
        assert sample_key(other, protocol_of(other, "w")) == sample_key(
            self.base, protocol_of(self.base, "w")
        )

    def test_it_can_be_read_by_a_person(self):
        assert sample_key(self.base, protocol_of(self.base, "w")).startswith("ema-euler-3-")
        adaptive = config_at("/x", solver="dopri5", steps=None)
        assert sample_key(adaptive, protocol_of(adaptive, "w")).startswith("ema-dopri5-1e-05-")

    def test_the_protocol_holds_nothing_that_does_not_apply(self):
        assert None not in protocol_of(self.base, "w").values()
        assert "rtol" not in protocol_of(self.base, "w")


class TestTars:
    def test_exactly_the_images_asked_for(self, config):
        samples = make(config)
        assert [samples.extent(number) for number in range(3)] == [(0, 4), (4, 4), (8, 3)]
        assert pixels(samples).shape == (11, *SHAPE)
        assert samples.problems() == []

    def test_the_number_of_ranks_changes_nothing(self, config, tmp_path):
        one = make(config)
        three = make(
            config.model_copy(
                update={"sample": config.sample.model_copy(update={"root": str(tmp_path / "b")})}
            ),
            ranks=3,
        )
        assert one.key == three.key
        assert [shard.sha256 for shard in one.finished()] == [shard.sha256 for shard in three.finished()]

    def test_only_what_is_missing_is_made(self, config):
        samples = make(config)
        before = {path.name: path.stat().st_mtime_ns for path in samples.store.local.glob("samples-*")}
        shards = [shard.sha256 for shard in samples.finished()]
        samples.remove(1)
        assert samples.problems() == [1]
        make(config)
        after = {path.name: path.stat().st_mtime_ns for path in samples.store.local.glob("samples-*")}
        assert {name for name in before if before[name] != after[name]} == {
            "samples-000001.tar",
            "samples-000001.json",
        }
        assert [shard.sha256 for shard in samples.finished()] == shards

    def test_a_tar_without_its_record_does_not_count(self, config):
        samples = make(config)
        (samples.store.local / "samples-000002.json").unlink()
        assert samples.problems() == [2]
        assert len(samples.finished()) == 2

    @pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
    def test_a_damaged_tar_is_found_refused_and_made_again(self, config, how):
        samples = make(config)
        good = pixels(samples)
        tar = samples.store.local / "samples-000001.tar"
        content = bytearray(tar.read_bytes())
        content[1600] ^= 1
        tar.unlink() if how == "removed" else tar.write_bytes(
            content[:-512] if how == "truncated" else content
        )
        assert samples.problems() == [1]
        with pytest.raises(UserError, match=r"samples-000001\.tar is missing or damaged"):
            pixels(samples)
        samples.remove(1)
        assert torch.equal(pixels(make(config)), good)

    def test_plain_webdataset_reads_them(self, config):
        samples = make(config)
        url = str(samples.store.local / "samples-{000000..000002}.tar")
        read = [
            {key: np.load(io.BytesIO(value)) for key, value in row.items() if key.endswith(".npy")}
            for row in webdataset.WebDataset(url, shardshuffle=False)
        ]
        assert np.array_equal(np.concatenate([row["x.npy"] for row in read]), pixels(samples).numpy())
        assert sum(len(row["y.npy"]) for row in read) == 11
        with tarfile.open(samples.store.local / "samples-000000.tar") as tar:
            assert all(member.isfile() for member in tar)

    def test_a_record_of_a_newer_version_is_refused_and_not_overwritten(self, config):
        samples = make(config)
        for name, version in (("samples-000001.json", "schema_version"), ("DONE.json", "schema")):
            path = samples.store.local / name
            path.write_text(json.dumps({version: 2, "name": "x"}))
            with pytest.raises(UserError, match="schema 2"):
                samples.problems() if name != "DONE.json" else samples.done()

    def test_done_is_written_on_request_and_read_back(self, config):
        samples = make(config)
        assert samples.done() is None
        samples.finish({"images": 11})
        done = samples.done()
        assert done["protocol"] == samples.protocol
        assert [shard["images"] for shard in done["shards"]] == [4, 4, 3]
        (samples.store.local / "DONE.json").write_text('{"schema": 1, "pro')
        assert samples.done() is None

    def test_a_request_to_stop_ends_it_between_two_batches(self, config):
        samples = samples_of(config)
        samples.control.mkdir(parents=True)
        (samples.control / "STOP").touch()
        with pytest.raises(Stopped):
            sample(config, Rank(0, 1, 0, samples.control, "job"))
        assert samples.finished() == []


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
        assert "not written by fm train" in self.refused(tmp_path / "a.safetensors")

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
        assert (model.step, model.classes, model.conditional, model.quantiser.levels) == (7, 10, True, 17)
