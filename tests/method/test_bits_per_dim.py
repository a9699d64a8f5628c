"""Quantization of pixels, dequantization and bits per dimension."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_core.errors import UserError
from fm_core.method.bits_per_dim import bits_per_dim, summarize
from fm_core.method.dequantization import Quantizer
from fm_core.method.divergence import Exact, Hutchinson
from fm_core.method.ode import Solver
from fm_core.storage.keyed_random import CURRENT, Domain, KeyedRandom, Purpose

LEVELS = st.integers(2, 256)
RANDOM = KeyedRandom(CURRENT, 0, Domain.LIKELIHOOD)


@settings(deadline=None, max_examples=100)
@given(levels=LEVELS, u=st.floats(0, 1, exclude_max=True, width=32))
def test_quantization_inverts_dequantization_at_every_level_and_every_u(levels, u):
    quantizer = Quantizer(levels)
    pixels = torch.arange(levels, dtype=torch.uint8)
    x = quantizer.dequantize(pixels, torch.full((levels,), u))
    assert x.dtype == torch.float32
    assert torch.equal(quantizer.quantize(x), pixels)
    assert torch.equal(quantizer.quantize(quantizer.scale(pixels)), pixels)
    low, high = 2 * pixels.double() / levels - 1, 2 * (pixels.double() + 1) / levels - 1
    assert ((low < x) & (x < high)).all()


def test_the_map_is_the_papers_for_photographs():
    pixels, u = torch.tensor([0, 100, 255], dtype=torch.uint8), torch.tensor([0.25, 0.5, 0.75])
    actual = Quantizer(256).dequantize(pixels, u)
    torch.testing.assert_close(actual, (pixels + u) / 128 - 1, rtol=0, atol=2**-7 * 2**-15)
    assert Quantizer(256).bits_offset == 7
    assert Quantizer(17).bits_offset == pytest.approx(math.log2(8.5))
    assert float(Quantizer(256).scale(pixels)[0]) == -1 + 1 / 256


def test_values_outside_are_clamped_and_nans_are_not_pixels():
    assert Quantizer(17).quantize(torch.tensor([-3.0, -1.0, 1.0, 9.0])).tolist() == [0, 0, 16, 16]
    assert Quantizer().quantize(torch.tensor([0.999], dtype=torch.bfloat16)).tolist() == [255]
    with pytest.raises(ValueError, match="NaN"):
        Quantizer().quantize(torch.tensor([math.nan]))
    with pytest.raises(TypeError, match="uint8"):
        Quantizer().scale(torch.tensor([1.0]))


@pytest.mark.parametrize("levels", [1, 257])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(UserError, match="levels"):
        Quantizer(levels)


def stretch(scale):
    """The flow x1 = scale x0, whose density at x1 is N(x1 / scale) / scale."""
    return lambda t, x: math.log(scale) * x


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_bits_of_a_known_density(levels):
    pixels = torch.randint(0, levels, (3, 1, 2, 2), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    draws = RANDOM.uniform(Purpose.DEQUANTIZATION, range(2 * 3), (1, 2, 2)).reshape(2, 3, 1, 2, 2)
    quantizer, scale = Quantizer(levels), 0.6
    solver = Solver(rtol=1e-7, atol=1e-7)
    bits = bits_per_dim(stretch(scale), pixels, quantizer, draws, (0.0, 1.0), solver, Exact())
    x = torch.stack([quantizer.dequantize(pixels, u) for u in draws]).double().flatten(2)
    density = (-0.5 * (x / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)).sum(-1)
    # The probability of a pixel is density times bin width, 2 / levels in each dimension.
    probability = density + 4 * math.log(2 / levels)
    torch.testing.assert_close(bits.single_sample, -probability[0] / (4 * math.log(2)), rtol=0, atol=1e-5)
    expected = -(probability.logsumexp(0) - math.log(2)) / (4 * math.log(2))
    torch.testing.assert_close(bits.k_sample, expected, rtol=0, atol=1e-5)
    assert bits.k == 2
    assert bits.nfe > 0


NODES, WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(256))


def towards_uniform(t, x):
    """Marginal velocity of the straight path (sigma_min = 0) from noise to a uniform distribution on [-1, 1].

    u_t(x) = (E[x1 | x_t = x] - x) / (1 - t), with the mean over x1 computed by quadrature.
    """
    density = WEIGHTS * torch.exp(-0.5 * ((x[..., None].double() - t * NODES) / (1 - t)) ** 2)
    mean = (density * NODES).sum(-1) / density.sum(-1)
    return ((mean - x) / (1 - t)).to(x.dtype)


def test_a_model_that_is_uniform_over_its_range_needs_eight_bits():
    """At t = 0.98 the model is uniform on 0.98 [-1, 1], blurred only at the ends: 8 + log2 0.98 bits."""
    end, levels = 0.98, torch.tensor([13, 77, 128, 200, 242], dtype=torch.uint8)
    draws = RANDOM.uniform(Purpose.DEQUANTIZATION, range(5), (1, 1, 1))[None]
    solver = Solver(rtol=1e-7, atol=1e-7)
    actual = bits_per_dim(
        towards_uniform, levels.view(5, 1, 1, 1), Quantizer(256), draws, (0.0, end), solver, Exact()
    )
    expected = torch.full((5,), 8 + math.log2(end), dtype=torch.float64)
    torch.testing.assert_close(actual.single_sample.double(), expected, rtol=0, atol=1e-4)


def correlated(dimension):
    root = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(3)) / dimension**0.5
    generator = 0.8 * (root + root.T)
    return lambda t, x: (x.flatten(1) @ generator).reshape(x.shape)


def test_all_draws_share_the_probe_so_that_its_noise_does_not_count_as_likelihood():
    # This Jacobian does not depend on x, so with a shared probe K draws gain only from dequantization.
    dimension, images, k = 16, 20, 8
    pixels = torch.randint(100, 156, (images, dimension), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    draws = RANDOM.uniform(Purpose.DEQUANTIZATION, range(k * images), (dimension,)).reshape(
        k, images, dimension
    )
    velocity, quantizer, solver = correlated(dimension), Quantizer(), Solver("rk4", steps=8)
    probes = RANDOM.sign(Purpose.PROBE, range(images), (dimension,))[None]
    exact = bits_per_dim(velocity, pixels, quantizer, draws, (0.0, 1.0), solver, Exact())
    shared = bits_per_dim(velocity, pixels, quantizer, draws, (0.0, 1.0), solver, Hutchinson(probes))
    torch.testing.assert_close(
        shared.single_sample - shared.k_sample, exact.single_sample - exact.k_sample, rtol=1e-3, atol=1e-5
    )
    assert (shared.single_sample - exact.single_sample).abs().mean() > 0.01, (
        "the probe must be noisy for this to say anything"
    )


def test_summary_has_the_standard_error_and_the_probe_deviation():
    bits = torch.tensor([3.0, 4.0, 5.0, 4.0], dtype=torch.float64)
    per_probe = bits[:, None] + torch.tensor([[0.3, -0.3]], dtype=torch.float64)
    summary = summarize(bits, per_probe)
    assert summary.value == 4
    assert summary.stderr == pytest.approx(math.sqrt(2 / 3) / 2)
    assert summary.probe_std == pytest.approx(0.3 * math.sqrt(2))
    assert summary.images == 4
    assert summarize(bits).probe_std is None
    assert summarize(bits, per_probe[:, :1]).probe_std is None
    assert summarize(bits[:1]).stderr is None


def test_draws_and_probes_of_the_wrong_shape_are_refused():
    pixels = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="draws"):
        bits_per_dim(stretch(1.0), pixels, Quantizer(), torch.rand(2, 3), (0.0, 1.0), Solver(), Exact())
    probes = Hutchinson(torch.ones(2, 3))
    with pytest.raises(ValueError, match="probes"):
        bits_per_dim(stretch(1.1), pixels, Quantizer(), torch.rand(1, 2, 3), (0.0, 1.0), Solver(), probes)
