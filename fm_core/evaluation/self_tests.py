"""Self-tests of sampling and evaluation against closed forms: no weights, no downloads, under a minute."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.evaluation.features.inception import torch_fidelity_module
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.metrics.frechet import (
    estimate_frechet_distance,
    frechet_distance,
    frechet_distance_low_rank,
    frechet_distance_of_features,
)
from fm_core.evaluation.metrics.inception_score import inception_score
from fm_core.evaluation.metrics.kid import kernel_distance
from fm_core.evaluation.metrics.precision_recall import precision_and_recall
from fm_core.method.bits_per_dim import bits_per_dim
from fm_core.method.dequantization import Quantizer
from fm_core.method.divergence import Exact, Hutchinson
from fm_core.method.ode import ADAPTIVE, FIXED, Solver, solve
from fm_core.run.results import Check

PIXELS = 4
"""Pixels per image in the likelihood tests, whose divergence is exact with one backward pass per pixel."""
BISECTIONS = 32
"""Number of times an interval of length 18 is halved, until it is shorter than the float32 spacing."""


def self_tests() -> list[Check]:
    """Run every check of sampling and evaluation, in a fixed order."""
    return [
        _run_check("bits/dim of a uniform model", _uniform_model),
        _run_check("bits/dim of a Gaussian model", _gaussian_model),
        _run_check("probes of the divergence", _probes),
        _run_check("quantizer", _quantizer),
        _run_check("Fréchet distance", _frechet),
        _run_check("Fréchet distance of few images", _few_images),
        _run_check("real digits against themselves", _digits),
        _run_check("order of the images", _order),
        *(_solver(method) for method in (*ADAPTIVE, *FIXED)),
        _run_check("extractor classifier", _classifier),
        _inception(),
    ]


def _run_check(name: str, test: Callable[[], str]) -> Check:
    try:
        return Check(name, True, test())
    except AssertionError as error:
        return Check(name, False, str(error))
    except Exception as error:  # any failure on this machine is reported as the result of the check
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _check_close(actual: float, expected: float, tolerance: float, what: str) -> str:
    assert abs(actual - expected) <= tolerance, f"{what}: {actual:.8g}, expected {expected:.8g}"
    return f"{what}: {actual:.6g}, as expected"


def _uniform_model() -> str:
    """Check straight paths from noise z to 2 Phi(z) - 1, uniform on [-1, 1): 8 bits for 256 levels."""

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        # Find the start of the path through x by bisection; one Newton step makes it differentiable.
        low, high = torch.full_like(x, -9.0), torch.full_like(x, 9.0)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = (1 - t) * middle + t * torch.special.ndtr(middle) * 2 - t < x
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        z = ((low + high) / 2).detach()
        slope = (1 - t) + t * 2 * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        z = z - ((1 - t) * z + t * (torch.special.ndtr(z) * 2 - 1) - x) / slope
        return torch.special.ndtr(z) * 2 - 1 - z

    pixels = torch.arange(0, 256, 17, dtype=torch.uint8).view(-1, PIXELS)
    bits = bits_per_dim(
        velocity,
        pixels,
        Quantizer(256),
        torch.full((1, *pixels.shape), 0.5),
        (0.0, 1.0),
        Solver("rk4", steps=200),
        Exact(),
    )
    worst = (bits.single_sample - 8).abs().amax().item()
    return _check_close(8 + worst, 8, 1e-3, "bits/dim of the image with the largest error")


def _gaussian_model() -> str:
    """Check the linear vector field a x, which maps N(0, 1) to N(0, exp(2 a))."""
    rate, quantizer = -0.7, Quantizer(256)
    pixels = torch.arange(0, 256, 8, dtype=torch.uint8).view(-1, PIXELS)
    draws = torch.full((1, *pixels.shape), 0.25)
    solver = Solver("dopri5", rtol=1e-6, atol=1e-6)
    bits = bits_per_dim(lambda t, x: rate * x, pixels, quantizer, draws, (0.0, 1.0), solver, Exact())
    x = quantizer.dequantize(pixels, draws[0]).double() / math.exp(rate)
    nats = 0.5 * x.square().mean(1) + rate + 0.5 * math.log(2 * math.pi)
    expected = (nats / math.log(2) + quantizer.bits_offset).mean().item()
    return _check_close(bits.single_sample.mean().item(), expected, 1e-4, "bits/dim")


def _probes() -> str:
    """Check that Rademacher probes are exact for a diagonal Jacobian."""
    x, generator = torch.linspace(-1, 1, 8).view(2, 4), torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (3, 2, 4), generator=generator) * 2.0 - 1
    _, divergence = Hutchinson(signs).with_velocity(lambda t, x: torch.sin(x), torch.tensor(0.5), x)
    expected = torch.cos(x).sum(1, keepdim=True).expand(-1, 3)
    return _check_close(
        (divergence - expected).abs().amax().item(), 0, 1e-5, "difference from the exact divergence"
    )


def _quantizer() -> str:
    for levels in (2, 17, 256):
        pixels, quantizer = torch.arange(levels, dtype=torch.uint8), Quantizer(levels)
        for u in (0.0, 0.5, 1 - 2**-24):
            back = quantizer.quantize(quantizer.dequantize(pixels, torch.full((levels,), u)))
            assert torch.equal(back, pixels), f"{levels} levels are not recovered at u = {u}"
    return "2, 17 and 256 levels are recovered from anywhere in their bins"


def _rows(count: int, dimension: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator) * scale


def _frechet() -> str:
    """Check the distance for covariances that commute: |m1 - m2|^2 + sum (s1 - s2)^2."""
    count = 10**6
    mean, variances = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 4.0, 9.0]).double()
    products = (count - 1) * torch.diag(variances) + count * torch.outer(mean, mean)
    other = Gaussian(
        torch.tensor([1.0, 0.0, 3.5]).double(), torch.diag(torch.tensor([4.0, 4, 1]).double()), None
    )
    actual = frechet_distance(FeatureMoments(count, count * mean, products), other)
    return _check_close(actual, 4 + 0.25 + 1 + 0 + 4, 1e-8, "distance of two known Gaussians")


def _few_images() -> str:
    few, many = _rows(20, 64, 0), Gaussian.of(FeatureMoments.of(_rows(400, 64, 1)))
    exact = frechet_distance_low_rank(few, many)
    return _check_close(
        frechet_distance(FeatureMoments.of(few), many), exact, 1e-6 * exact, "20 images of 64 features"
    )


def _digits() -> str:
    pixels = _digits_and_labels()[0].flatten(1).float()
    distance = frechet_distance_of_features(pixels, Gaussian.of(FeatureMoments.of(pixels)))
    pr = precision_and_recall(pixels[:500], pixels[:500])
    assert pr.precision == pr.recall == 1, f"precision {pr.precision} and recall {pr.recall}, not 1"
    trace = FeatureMoments.of(pixels).covariance.trace().item()
    return _check_close(
        distance / trace, 0, 1e-9, f"{len(pixels):,} digits, distance relative to their variance"
    )


def _digits_and_labels() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's 1,797 digits, uint8 [N, 1, 8, 8], and their classes int64 [N]."""
    from sklearn.datasets import load_digits

    bunch = cast(Any, load_digits())
    pixels = torch.from_numpy(bunch.images).to(torch.uint8)
    return pixels[:, None], torch.from_numpy(bunch.target).to(torch.int64)


def _order() -> str:
    rows, real = _rows(400, 8, 2), _rows(300, 8, 3, 1.2)
    rows[:200] += 2
    shuffled = rows[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    reference = Gaussian.of(FeatureMoments.of(real))
    pairs = {
        "Fréchet distance": [estimate_frechet_distance(part, reference).value for part in (rows, shuffled)],
        "kernel distance": [kernel_distance(part, real).value for part in (rows, shuffled)],
        "Inception Score": [inception_score(part.softmax(1)).value for part in (rows, shuffled)],
        "precision": [precision_and_recall(part, real).precision for part in (rows, shuffled)],
    }
    for name, (ordered, reordered) in pairs.items():
        _check_close(reordered, ordered, 1e-8, name)
    return f"{', '.join(pairs)} do not depend on it"


def _solver(method: str) -> Check:
    """Check a solver on dx/dt = -x, from 1 to exp(-1)."""

    def test() -> str:
        adaptive = method in ADAPTIVE
        solver = Solver(method, 1e-6, 1e-6) if adaptive else _fixed_step_solver(method)
        solution = solve(lambda t, x: -x, torch.ones(3, 2, dtype=torch.float64), (0.0, 1.0), solver)
        tolerance = 1e-4 if adaptive else 0.01 if method == "euler" else 1e-3
        message = _check_close(solution.x.mean().item(), math.exp(-1), tolerance, "exp(-1)")
        return f"{message}, in {solution.nfe} evaluations"

    return _run_check(f"solver {method}", test)


def _fixed_step_solver(method: str) -> Solver:
    tolerances = (1e-6, 1e-6) if method == "implicit_adams" else (None, None)
    return Solver(method, *tolerances, steps=40)


def _classifier() -> str:
    from fm_core.evaluation.features.classifier import predict, train_classifier

    pixels, labels = _digits_and_labels()
    classifier = train_classifier(pixels[:64], labels[:64], 17, 10, seed=0, steps=2, batch_size=16)
    features, _ = predict(classifier, pixels[:8], 17)
    assert torch.isfinite(features).all(), "its features are not finite"
    return f"trains and returns {features.shape[1]} features (evaluate.features classifier)"


def _inception() -> Check:
    """Check torch-fidelity, an optional extra; the check passes if the package is not installed."""
    name = "extractor inception"
    try:
        torch_fidelity_module("feature_extractor_inceptionv3")
    except UserError as error:
        missing = "No module named" in str(error)
        return Check(name, missing, f"not installed ({error})" if missing else str(error))
    return Check(name, True, "torch-fidelity's module can be imported; FID also needs evaluate.weights")
