import math

import pytest
import torch
from torch import nn

from fm_core.config import LikelihoodSection, MethodSection, ModelSection
from fm_core.evaluation.dataset_likelihood import batch_bits, combine, tighter_settings
from fm_core.evaluation.resumable_parts import split_ranges
from fm_core.evaluation.scores import likelihood_record
from fm_core.method.dequantization import Quantizer
from fm_core.models.build import build_method
from fm_core.sampling.checkpoint_source import Model
from fm_core.storage.keyed_random import Domain, KeyedRandom, Purpose

CPU = torch.device("cpu")
SHAPE = (1, 4, 4)


class Linear(nn.Module):
    """Linear field u(t, x) = rate x, whose model distribution is N(0, exp(2 rate))."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, t, x, label=None):
        if label is not None:
            return (self.rate + label.view(-1, 1, 1, 1)) * x
        return self.rate * x


def model(rate=0.0, levels=17, conditional=False):
    return Model(
        network=Linear(rate),
        section=ModelSection(),
        objective=build_method(MethodSection()).objective,
        quantizer=Quantizer(levels),
        image_shape=SHAPE,
        classes=2 if conditional else 0,
        conditional=conditional,
        step=1,
        images_seen=1,
        data_version="v",
        weights_sha256="w",
    )


def score(network, pixels, labels=None, **settings):
    """Combine batches as in an evaluation, including the solver check."""
    settings = LikelihoodSection.model_validate(
        {"images": len(pixels), "rtol": 1e-6, "atol": 1e-6, **settings}
    )
    labels = torch.zeros(len(pixels), dtype=torch.int64) if labels is None else labels

    def parts(count, options):
        return [
            batch_bits(network, pixels[r.start : r.stop], labels[r.start : r.stop], r, options, 3, CPU)
            for r in split_ranges(count, options.batch)
        ]

    checks = parts(settings.check_images, tighter_settings(settings))
    return combine(parts(len(pixels), settings), checks, settings.draws)


def images(count, levels=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (count, *SHAPE), dtype=torch.uint8, generator=generator)


def gaussian_bits(pixels, levels, std, draw=0):
    """Bits/dim [N] of N(0, std^2) at the scored points, in float64."""
    random = KeyedRandom("numpy-v1", 3, Domain.LIKELIHOOD)  # default if a model's recipe names none
    dither = random.uniform(Purpose.DEQUANTIZATION, range(len(pixels)), SHAPE, index=draw)
    x = Quantizer(levels).dequantize(pixels, dither).double().flatten(1)
    nats = 0.5 * (x / std).square().mean(1) + math.log(std) + 0.5 * math.log(2 * math.pi)
    return nats / math.log(2) + math.log2(levels / 2)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_network_of_zeros_is_the_source_itself(levels):
    pixels = images(12, levels)
    result = score(model(levels=levels), pixels)
    assert result.single_sample.value == pytest.approx(
        gaussian_bits(pixels, levels, 1.0).mean().item(), abs=1e-5
    )
    assert (result.single_sample.images, result.k, result.k_sample) == (12, 1, None)
    assert result.single_sample.probe_std == pytest.approx(0, abs=1e-6)


def test_the_offset_is_that_of_the_bins():
    """Compare with the mean of -log2 N(x; 0, 1) + log2(levels / 2) over uniform x in [-1, 1)."""
    expected = (0.5 / 3 + 0.5 * math.log(2 * math.pi)) / math.log(2) + math.log2(17 / 2)
    result = score(model(), images(400))
    assert result.single_sample.value == pytest.approx(expected, abs=4 * result.single_sample.stderr)
    # A uniform density on [-1, 1) takes log2(levels) bits exactly; no model of uniform pixels takes fewer.
    assert result.single_sample.value > math.log2(17)


@pytest.mark.parametrize("rate", [-0.5, 0.7])
def test_a_linear_field_is_a_wider_or_narrower_gaussian(rate):
    pixels = images(6)
    result = score(model(rate), pixels)
    exact = gaussian_bits(pixels, 17, math.exp(rate))
    assert result.single_sample.value == pytest.approx(exact.mean().item(), abs=1e-4)
    assert result.single_sample.stderr == pytest.approx((exact.std() / math.sqrt(6)).item(), rel=1e-3)


def test_labels_reach_a_conditional_network_and_no_other():
    pixels, labels = images(4), torch.tensor([0, 1, 0, 1])
    result = score(model(0.0, conditional=True), pixels, labels)
    exact = torch.where(labels.bool(), gaussian_bits(pixels, 17, math.e), gaussian_bits(pixels, 17, 1.0))
    assert result.single_sample.value == pytest.approx(exact.mean().item(), abs=1e-4)
    assert score(model(0.0), pixels, labels).single_sample.value == pytest.approx(
        gaussian_bits(pixels, 17, 1.0).mean().item(), abs=1e-5
    )


def test_bits_do_not_depend_on_the_batch():
    pixels = images(10)
    unsplit, parts = (score(model(0.3), pixels, batch=batch, check_images=0) for batch in (10, 4))
    assert parts.single_sample.value == pytest.approx(unsplit.single_sample.value, abs=1e-5)
    assert parts.nfe == pytest.approx(unsplit.nfe, rel=0.3)
    assert (unsplit.check, parts.single_sample.images) == (None, 10)


def test_the_solver_is_checked_at_tighter_tolerances():
    pixels = images(10)
    loose = score(model(3.0), pixels, rtol=1.0, atol=1.0, check_images=6)
    exact = gaussian_bits(pixels, 17, math.exp(3.0))
    assert loose.check.images == 6
    assert loose.check.largest >= abs(loose.check.mean)
    tight = score(model(3.0), pixels, rtol=1e-6, atol=1e-6, check_images=6)
    assert tight.check.largest < loose.check.largest / 10
    assert tight.single_sample.value == pytest.approx(exact.mean().item(), abs=1e-4)


def test_more_draws_tighten_the_bound_and_do_not_change_the_single_sample_value():
    pixels = images(10)
    single, many = score(model(-0.7), pixels), score(model(-0.7), pixels, draws=8)
    assert many.single_sample == single.single_sample
    exact = torch.stack([gaussian_bits(pixels, 17, math.exp(-0.7), draw) for draw in range(8)])
    nats = -exact * 16 * math.log(2)
    expected = -(torch.logsumexp(nats, 0) - math.log(8)) / (16 * math.log(2))
    assert many.k_sample.value == pytest.approx(expected.mean().item(), abs=1e-4)
    assert many.k_sample.value < exact.mean() - 1e-4


def test_a_record_has_the_requested_quantities_and_nothing_else():
    tolerances = {"rtol": 1e-6, "atol": 1e-6}
    plain = likelihood_record(score(model(), images(2), check_images=0), tolerances)
    cost = {"nfe", "dtype", "rtol", "atol"}
    assert set(plain) == {"value", "stderr", "covers", "images", "k", "probe_std", *cost}
    assert (plain["k"], plain["dtype"]) == (1, "float32")
    tighter = likelihood_record(score(model(), images(2), draws=2, check_images=1), tolerances)
    assert tighter["solver_check"]["images"] == 1
    assert tighter["k_sample"]["k"] == 2
