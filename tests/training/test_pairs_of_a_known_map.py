"""A teacher with a closed form, its stored samples, and the batches read from them."""

import pytest
from torch import nn

from fm_core.config import MethodSection, ModelSection
from fm_core.method.dequantization import Quantizer
from fm_core.models.build import build_method
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.generate import generate
from fm_core.sampling.sample_protocol import draw_of, protocol_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.training.training_set import training_set
from tests.support.pair_sets import dataset, finish, student
from tests.support.random_checkpoint import CPU, SHAPE, config_at

MEAN, STD = 0.1, 0.25
"""Of each pixel of the data."""
LEVELS = 17


class Teacher(nn.Module):
    """The velocity of flow matching on N(MEAN, STD^2), whose flow is x0 -> MEAN + STD x0."""

    def forward(self, t, x, label=None):
        t = t.view(-1, 1, 1, 1)
        variance = (t * STD) ** 2 + (1 - t) ** 2
        return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


class Straight(nn.Module):
    """The velocity of the straight lines between x0 and MEAN + STD x0."""

    def forward(self, t, x, label=None):
        t = t.view(-1, 1, 1, 1)
        return MEAN + (STD - 1) * (x - t * MEAN) / (1 - t + t * STD)


def model_of(network, manifest):
    method = build_method(MethodSection(path_options={"sigma_min": 0.0}))
    return Model(
        network=network,
        section=ModelSection(),
        objective=method.objective,
        quantizer=Quantizer(manifest.levels),
        image_shape=SHAPE,
        classes=0,
        conditional=False,
        step=7,
        images_seen=1,
        data_version=manifest.version,
        weights_sha256="0" * 64,
        recipe={"generator": "philox-v1"},
    )


def batch_of(root, store, network=None, steps=40, levels=LEVELS):
    """Pairs made by a network, as a training batch: path sample, and the objective of the student."""
    manifest = dataset(levels=levels)
    config = config_at(root, images=80, batch=40, solver="rk4", steps=steps, store=store, trajectories=0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"class_conditional": False})})
    model = model_of(network or Teacher(), manifest)
    samples = SampleSet(config, 7, protocol_of(config, model.weights_sha256, model.generator))
    for number in range(samples.batches):
        samples.write(number, generate(model, draw_of(config), *samples.extent(number), CPU))
    finish(samples, manifest)
    reflow = student(config, samples.store.url, method={"path_options": {"sigma_min": 0.0}})
    images = training_set(reflow, manifest, build_method(reflow.method))
    source = images.training_source(1)
    with source.batches(0, 64, 0, 1, 64) as batches:
        return source.draw(next(batches), CPU)[0], images.method.objective


def test_the_target_of_stored_floats_is_that_of_the_known_map(tmp_path):
    sample, objective = batch_of(tmp_path, "float32")
    assert (sample.x1 - (MEAN + STD * sample.x0)).abs().max() < 1e-5
    assert objective.loss(Straight(), sample).max() < 1e-9


def test_pairs_of_the_second_round_are_straight_again(tmp_path):
    sample, objective = batch_of(tmp_path, "float32", Straight(), steps=1)
    assert objective.loss(Straight(), sample).max() < 1e-9


def test_half_precision_costs_less_than_a_hundredth_of_a_level(tmp_path):
    sample, _ = batch_of(tmp_path, "float16")
    assert 0 < (sample.x1 - (MEAN + STD * sample.x0)).abs().max() < 2 / 256 / 10


@pytest.mark.parametrize("levels", [17, 256])
def test_intensity_levels_add_a_sixth_of_a_squared_bin_to_the_loss(tmp_path, levels):
    """Sample and dequantized sample are both uniform in one bin, and independent in it."""
    sample, _ = batch_of(tmp_path, "uint8", levels=levels)
    error = sample.x1 - (MEAN + STD * sample.x0)
    inside = sample.x1.abs() < 1 - 2 / levels  # values beyond the range are clamped
    assert error[inside].abs().max() < 2 / levels
    assert error[inside].square().mean() == pytest.approx((2 / levels) ** 2 / 6, rel=0.06)
