import math

import numpy as np
import pytest
import scipy.linalg
import torch

from fm_core.evaluation.frechet import Moments, frechet_distance, jackknife_error


def features(count, dimension, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) * scale
    return (torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing + shift).float()


def by_square_root(a, b):
    """The formula as published, with scipy's matrix square root."""
    a, b = (rows.double().numpy() for rows in (a, b))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + np.trace(first + second - 2 * root)


@pytest.mark.parametrize("dimension", [2, 16, 64])
def test_it_is_the_formula_with_scipys_square_root(dimension):
    a, b = features(500, dimension, 1), features(300, dimension, 2, scale=0.7, shift=0.3)
    ours = frechet_distance(Moments.of(a), Moments.of(b))
    assert ours == pytest.approx(by_square_root(a, b), rel=1e-6)
    assert frechet_distance(Moments.of(b), Moments.of(a)) == pytest.approx(ours, rel=1e-9)


def moments_of_gaussian(mean, covariance, count=10**6):
    """Moments whose mean and unbiased covariance are exactly these."""
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    return Moments(count, count * mean, (count - 1) * covariance + count * torch.outer(mean, mean))


def test_known_gaussians():
    # Covariances that commute: |m1 - m2|^2 + sum (s1 - s2)^2.
    a = moments_of_gaussian([1.0, 2.0, 3.0], np.diag([1.0, 4.0, 9.0]))
    b = moments_of_gaussian([1.0, 0.0, 3.5], np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(4 + 0.25 + 1 + 0 + 4, rel=1e-9)
    # And two that do not: S1 = I, so that the trace is that of the root of S2.
    rotation = np.array([[0.8, -0.6], [0.6, 0.8]])
    c = moments_of_gaussian([0, 0], np.eye(2))
    d = moments_of_gaussian([0, 0], rotation @ np.diag([9.0, 0.25]) @ rotation.T)
    assert frechet_distance(c, d) == pytest.approx((3 - 1) ** 2 + (0.5 - 1) ** 2, rel=1e-9)


def test_a_shift_is_its_square():
    a = features(400, 8, 3)
    assert frechet_distance(Moments.of(a), Moments.of(a + 2)) == pytest.approx(8 * 4, rel=1e-5)


@pytest.mark.parametrize(("count", "dimension"), [(1000, 8), (10, 64)])
def test_identical_sets_are_at_no_distance(count, dimension):
    """Ten images of 64 features, too: the covariance is singular."""
    moments = Moments.of(features(count, dimension, 4))
    assert frechet_distance(moments, moments) == pytest.approx(
        0, abs=1e-6 * moments.covariance.trace().item()
    )
    assert frechet_distance(moments, moments) >= 0


def test_dead_features_do_no_harm():
    a, b = (torch.cat([features(300, 4, seed), torch.zeros(300, 3)], 1) for seed in (5, 6))
    expected = frechet_distance(Moments.of(a[:, :4]), Moments.of(b[:, :4]))
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-9)


def test_moments_add_up_over_parts():
    rows = features(1000, 8, 7)
    parts = [Moments.of(rows[first : first + 137]) for first in range(0, 1000, 137)]
    whole = sum(parts[1:], parts[0])
    direct = Moments.of(rows)
    assert whole.count == direct.count == 1000
    assert torch.allclose(whole.mean, rows.double().mean(0), rtol=1e-12)
    assert torch.allclose(whole.covariance, torch.cov(rows.double().T), rtol=1e-10)
    rest = direct - parts[0]
    assert rest.count == 1000 - 137
    assert torch.allclose(rest.covariance, torch.cov(rows[137:].double().T), rtol=1e-10)


def test_whole_numbers_add_and_subtract_exactly():
    rows = torch.randint(-100, 100, (64, 5), generator=torch.Generator().manual_seed(0)).float()
    one, other = Moments.of(rows[:20]), Moments.of(rows[20:])
    whole = one + other
    assert torch.equal(whole.products, Moments.of(rows).products)
    back = whole - other
    assert (back.count, back.total.tolist()) == (one.count, one.total.tolist())
    assert torch.equal(back.products, one.products)


def test_moments_are_double_whatever_the_features():
    rows = (torch.ones(100_000, 1) * 0.1).half()
    assert Moments.of(rows).mean.item() == pytest.approx(rows[0].double().item(), rel=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_has_no_covariance(count):
    with pytest.raises(ValueError, match="at least two"):
        _ = Moments.of(torch.zeros(count, 3)).covariance


def test_the_jackknife_error_is_the_spread_over_independent_draws():
    reference = Moments.of(features(20_000, 6, 100))
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(100), dtype=torch.float64)
    generator = torch.Generator().manual_seed(8)
    distances, errors = [], []
    for _ in range(60):
        rows = torch.randn(400, 6, generator=generator, dtype=torch.float64) @ mixing + 0.3
        distances.append(frechet_distance(Moments.of(rows), reference))
        errors.append(jackknife_error(rows, reference))
    spread = float(np.std(distances, ddof=1))
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.3)


def test_four_images_are_enough_for_an_error():
    reference = Moments.of(features(100, 3, 9))
    assert math.isfinite(jackknife_error(features(4, 3, 10), reference))
