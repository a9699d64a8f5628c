"""Per-index seeding of samples, and their tar files; random weights, no processes."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset

from fm_core.errors import StopRequested, UserError
from fm_core.launch.worker_main import Rank
from fm_core.method.ode import Solver
from fm_core.sampling.checkpoint_source import load_model
from fm_core.sampling.generate import Draw, generate
from fm_core.sampling.sample_protocol import draw_of, protocol_of, sample_key
from fm_core.sampling.sample_worker import sample
from fm_core.storage.keyed_random import CURRENT
from fm_core.storage.numpy_random import rows
from tests.support.random_checkpoint import CPU, SHAPE, checkpoint, config_at, make, pixels, samples_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = config_at(tmp_path_factory.mktemp("model"))
    return load_model(checkpoint(config) / "raw.safetensors", CPU)


class TestImages:
    def test_image_i_is_the_same_wherever_it_is_made(self, model):
        """Rounding depends on the batch size, and rarely changes a pixel by one intensity level."""
        solver = Solver("euler", steps=3)
        batch_of_all = generate(model, Draw(solver, 1), 0, 24, CPU)
        for size in (1, 3, 8):
            batches = [generate(model, Draw(solver, 1), first, size, CPU) for first in range(0, 24, size)]
            parts = torch.cat([batch.images for batch in batches])
            apart = (parts.int() - batch_of_all.images.int()).abs()
            assert apart.max() <= 1
            assert (apart > 0).double().mean() < 2e-3
            assert torch.equal(torch.cat([batch.labels for batch in batches]), batch_of_all.labels)

    def test_the_same_batch_is_the_same_to_the_bit(self, model):
        solver = Solver("midpoint", steps=2)
        one, two = (generate(model, Draw(solver, 1), 8, 4, CPU) for _ in range(2))
        assert torch.equal(one.images, two.images)
        assert (one.first, one.nfe) == (8, 4)

    def test_the_seed_and_the_index_change_the_image(self, model):
        solver = Solver("euler", steps=2)
        images = [
            generate(model, Draw(solver, seed), first, 1, CPU).images
            for seed, first in ((1, 0), (1, 1), (2, 0))
        ]
        assert not any(torch.equal(images[a], images[b]) for a, b in ((0, 1), (0, 2), (1, 2)))

    def test_images_of_an_export_that_names_no_generator_begin_with_the_noise_that_they_always_had(
        self, tmp_path
    ):
        config = config_at(tmp_path)
        folder = checkpoint(
            config.model_copy(update={"run": config.run.model_copy(update={"generator": "numpy-v1"})})
        )
        model = load_model(folder / "raw.safetensors", CPU)
        assert model.generator == "numpy-v1"
        earlier = rows(1, "sample-noise", "normal", torch.arange(4), SHAPE)
        draw = Draw(Solver("euler", steps=1), 1)
        assert torch.equal(draw.noise(model, range(4)), earlier)
        classes = rows(1, "sample-label", "uniform", torch.arange(4), ())
        assert torch.equal(draw.labels(model, range(4)), (classes * 10).long())

    def test_a_file_of_a_generator_that_is_not_known_is_refused(self, tmp_path):
        folder = checkpoint(config_at(tmp_path), generator="philox-v9")
        with pytest.raises(UserError, match=r"raw\.safetensors: generator 'philox-v9' of another version"):
            load_model(folder / "raw.safetensors", CPU)

    def test_products_are_of_float32_unless_tf32_is_asked_for(self, model):
        """A CPU has no TF32, so this checks torch's settings while the network is evaluated."""
        settings = []

        def look(*_):
            settings.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))

        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        hook = model.network.register_forward_pre_hook(look)
        for tf32 in (False, True):
            generate(model, Draw(Solver("euler", steps=1), 1, tf32=tf32), 0, 2, CPU)
        hook.remove()
        assert settings == [(False, "highest"), (True, "high")]
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before

    def test_images_have_the_intensity_levels_of_the_data(self, model):
        batch = generate(model, Draw(Solver("euler", steps=2), 1), 0, 16, CPU)
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (16, *SHAPE)
        assert batch.images.max() <= 16

    def test_classes_are_drawn_evenly(self, model):
        labels = generate(model, Draw(Solver("euler", steps=1), 1), 0, 1000, CPU).labels
        counts = torch.bincount(labels, minlength=10)
        assert len(counts) == 10
        assert counts.min() > 60

    def test_an_adaptive_solver_reports_its_cost(self, model):
        batch = generate(model, Draw(Solver("dopri5", rtol=0.1, atol=0.1), 1), 0, 4, CPU)
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
    def test_every_setting_that_changes_pixels_changes_the_key(self, change):
        other = config_at("/nowhere", **change)
        assert sample_key(other, protocol_of(other, "w", CURRENT)) != sample_key(
            self.base, protocol_of(self.base, "w", CURRENT)
        )

    @pytest.mark.parametrize("change", [{"rtol": 1e-4}, {"atol": 1e-4}, {"rtol": 1.1e-5}])
    def test_tolerances_change_the_key(self, change):
        adaptive = {"solver": "dopri5", "steps": None}
        one, other = config_at("/x", **adaptive), config_at("/x", **adaptive, **change)
        assert sample_key(one, protocol_of(one, "w", CURRENT)) != sample_key(
            other, protocol_of(other, "w", CURRENT)
        )

    def test_the_weights_themselves_change_the_key(self):
        assert sample_key(self.base, protocol_of(self.base, "w", CURRENT)) != sample_key(
            self.base, protocol_of(self.base, "v", CURRENT)
        )

    def test_the_generator_changes_the_key_and_files_of_the_earlier_one_keep_theirs(self):
        new, earlier = (protocol_of(self.base, "w", name) for name in ("philox-v1", "numpy-v1"))
        assert new == {**earlier, "generator": "philox-v1"}
        assert "generator" not in earlier
        assert sample_key(self.base, new) != sample_key(self.base, earlier)

    def test_where_samples_lie_does_not(self):
        other = config_at("/elsewhere")
        assert sample_key(other, protocol_of(other, "w", CURRENT)) == sample_key(
            self.base, protocol_of(self.base, "w", CURRENT)
        )

    def test_it_can_be_read_by_a_person(self):
        assert sample_key(self.base, protocol_of(self.base, "w", CURRENT)).startswith("ema-euler-3-")
        adaptive = config_at("/x", solver="dopri5", steps=None)
        assert sample_key(adaptive, protocol_of(adaptive, "w", CURRENT)).startswith("ema-dopri5-1e-05-")

    def test_the_protocol_holds_nothing_that_does_not_apply(self):
        assert None not in protocol_of(self.base, "w", CURRENT).values()
        assert "rtol" not in protocol_of(self.base, "w", CURRENT)


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
    def test_a_damaged_tar_is_detected_refused_and_made_again(self, config, how):
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
        with pytest.raises(StopRequested):
            sample(config, Rank(0, 1, 0, samples.control, "job"))
        assert samples.finished() == []


def test_the_precision_that_is_asked_for_is_drawn_with_and_recorded(tmp_path):
    settings = {}
    for precision in ("fp32", "tf32", "bf16"):
        config = config_at(tmp_path)
        config = config.model_copy(
            update={"sample": config.sample.model_copy(update={"precision": precision})}
        )
        settings[precision] = (draw_of(config).tf32, protocol_of(config, "hash", CURRENT)["dtype"])
    assert settings == {"fp32": (False, "float32"), "tf32": (True, "tf32"), "bf16": (False, "bfloat16")}
