"""Sampling options: guidance, classes and trajectories."""

import numpy as np
import pytest
import torch

from fm_core.errors import UserError
from fm_core.method.dequantization import Quantizer
from fm_core.method.ode import Solver
from fm_core.sampling.checkpoint_source import load_model, weights_file
from fm_core.sampling.generate import Draw, generate, time_grid
from fm_core.sampling.sample_worker import TRAJECTORY_FRAMES
from tests.support.random_checkpoint import CPU, MODEL, SHAPE, checkpoint, config_at, make, pixels, samples_of

EULER = Solver("euler", steps=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = config_at(tmp_path_factory.mktemp("model"))
    return load_model(checkpoint(config) / "raw.safetensors", CPU)


@pytest.fixture
def unconditional(tmp_path):
    config = config_at(tmp_path)
    plain = config.model.model_validate({**MODEL, "class_conditional": False})
    config = config.model_copy(update={"model": plain})
    checkpoint(config)
    return load_model(weights_file(config, 7), CPU)


class TestGuidance:
    def test_it_moves_images_and_counts_both_forwards(self, model):
        plain, guided = (generate(model, Draw(EULER, 1, guidance=scale), 0, 4, CPU) for scale in (1.0, 2.5))
        assert not torch.equal(plain.images, guided.images)
        assert (plain.nfe, plain.forwards, guided.nfe, guided.forwards) == (3, 1, 6, 2)

    def test_it_is_the_extrapolation_from_no_label(self, model):
        x, t = torch.randn(3, *SHAPE), torch.tensor(0.3)
        labels = torch.tensor([1, 2, 3])
        with_label, without = (
            model.objective.velocity(model.network, label)(t, x) for label in (labels, None)
        )
        guided = Draw(EULER, 1, guidance=2.5).velocity(model, labels)(t, x)
        torch.testing.assert_close(guided, without + 2.5 * (with_label - without))

    def test_it_is_in_the_protocol_and_the_name(self, tmp_path):
        config = config_at(tmp_path, guidance=2.5, classes=[3, 1])
        checkpoint(config)
        samples = samples_of(config)
        assert (samples.protocol["guidance"], samples.protocol["classes"]) == (2.5, [3, 1])
        assert "-guided-2.5-" in samples.key

    def test_a_model_without_classes_refuses_it(self, unconditional):
        for draw, key in (
            (Draw(EULER, 1, 2.0), "sample.guidance"),
            (Draw(EULER, 1, 1.0, [3]), "sample.classes"),
        ):
            with pytest.raises(UserError, match=rf"{key}: the model was trained without classes"):
                draw.check(unconditional)
        Draw(EULER, 1).check(unconditional)

    def test_a_model_that_never_went_without_its_label_refuses_it(self, tmp_path, model):
        Draw(EULER, 1, 2.0).check(model)  # its recipe does not record how it was trained
        for dropout in (0.0, 0.1):
            config = config_at(tmp_path / str(dropout))
            folder = checkpoint(config, train={"label_dropout": dropout})
            trained = load_model(folder / "raw.safetensors", CPU)
            Draw(EULER, 1, 1.0).check(trained)
            if dropout:
                Draw(EULER, 1, 2.0).check(trained)
                continue
            with pytest.raises(UserError, match=r"sample.guidance: .* train.label_dropout") as caught:
                Draw(EULER, 1, 2.0).check(trained)
            assert "\n" not in str(caught.value)


class TestClasses:
    def test_they_are_taken_in_turn_by_the_index_of_the_image(self, model):
        draw = Draw(EULER, 1, classes=[7, 0, 4])
        assert generate(model, draw, 0, 5, CPU).labels.tolist() == [7, 0, 4, 7, 0]
        assert generate(model, draw, 4, 3, CPU).labels.tolist() == [0, 4, 7]

    def test_a_class_that_is_not_there_is_refused(self, model):
        with pytest.raises(UserError, match=r"sample.classes: 10 is not in 0 .. 9"):
            Draw(EULER, 1, classes=[3, 10]).check(model)

    def test_the_tars_record_them(self, tmp_path):
        config = config_at(tmp_path, classes=[7, 0, 4])
        checkpoint(config)
        samples = make(config)
        assert samples.read_labels(1).tolist() == [0, 4, 7, 0]


class TestTrajectories:
    @pytest.mark.parametrize(
        "solver", [EULER, Solver("dopri5", rtol=0.05, atol=0.05)], ids=lambda s: s.method
    )
    def test_they_lead_from_the_noise_to_the_images_and_cost_nothing(self, model, solver):
        plain = generate(model, Draw(solver, 1), 0, 4, CPU)
        times = time_grid(model.objective.interval, 6)
        shown = generate(model, Draw(solver, 1), 0, 4, CPU, times)
        assert torch.equal(plain.images, shown.images)
        assert plain.nfe == shown.nfe
        assert shown.trajectory.shape == (6, 4, *SHAPE)
        assert torch.equal(shown.trajectory[-1], shown.images)
        noise = Quantizer(17).quantize(Draw(solver, 1).noise(model, range(4)))
        assert torch.equal(shown.trajectory[0], noise)

    def test_the_first_batch_keeps_them(self, config):
        samples = make(config)
        way = samples.trajectory()
        assert way.shape == (TRAJECTORY_FRAMES, 4, *SHAPE)  # 8 are requested, but a batch has 4
        assert torch.equal(way[-1], pixels(samples)[:4])

    def test_lost_ones_are_made_again_and_the_images_stay(self, config):
        samples = make(config)
        before = pixels(samples)
        (file,) = samples.store.local.glob("trajectory-*.npy")
        saved = np.load(file)
        file.unlink()
        assert samples.problems() == [0]
        again = make(config)
        assert np.array_equal(np.load(file), saved)
        assert torch.equal(pixels(again), before)

    def test_none_are_saved_where_none_are_asked_for(self, tmp_path):
        config = config_at(tmp_path, trajectories=0)
        checkpoint(config)
        samples = make(config)
        assert samples.trajectory() is None
        assert not list(samples.store.local.glob("trajectory*"))
