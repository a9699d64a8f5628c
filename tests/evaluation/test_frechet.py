import math

import numpy as np
import pytest
import scipy.linalg
import torch

from fm_core.data.sources.splits import permutation
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.metrics.frechet import (
    FEW_IMAGES,
    ORDER_SEED,
    estimate_frechet_distance,
    frechet_distance,
    frechet_distance_low_rank,
)
from fm_core.evaluation.metrics.frechet_error import (
    PAIRS_PER_IMAGE,
    FrechetInfluence,
    curvature_factors,
)
from fm_core.evaluation.metrics.sampling_error import HEAVY_TAILED, SamplingError


def features(count, dimension, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) * scale
    return (torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing + shift).float()


def reference(rows):
    return Gaussian.of(FeatureMoments.of(rows))


def distance_of(a, b):
    return frechet_distance(FeatureMoments.of(a), reference(b))


def by_square_root(a, b):
    """Fréchet distance by the published formula, with scipy's matrix square root."""
    a, b = (rows.double().numpy() for rows in (a, b))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + np.trace(first + second - 2 * root)


@pytest.mark.parametrize("dimension", [2, 16, 64])
def test_it_is_the_formula_with_scipys_square_root(dimension):
    a, b = features(500, dimension, 1), features(300, dimension, 2, scale=0.7, shift=0.3)
    ours = distance_of(a, b)
    assert ours == pytest.approx(by_square_root(a, b), rel=1e-6)
    assert distance_of(b, a) == pytest.approx(ours, rel=1e-9)


def moments_of_gaussian(mean, covariance, count=10**6):
    """Moments with exactly this mean and unbiased covariance."""
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    return FeatureMoments(count, count * mean, (count - 1) * covariance + count * torch.outer(mean, mean))


def test_known_gaussians():
    # For covariances that commute, the distance is |m1 - m2|^2 + sum (s1 - s2)^2.
    a = moments_of_gaussian([1.0, 2.0, 3.0], np.diag([1.0, 4.0, 9.0]))
    b = moments_of_gaussian([1.0, 0.0, 3.5], np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, Gaussian.of(b)) == pytest.approx(4 + 0.25 + 1 + 0 + 4, rel=1e-9)
    # With S1 = I, the trace equals the trace of the square root of S2.
    rotation = np.array([[0.8, -0.6], [0.6, 0.8]])
    c = moments_of_gaussian([0, 0], np.eye(2))
    d = moments_of_gaussian([0, 0], rotation @ np.diag([9.0, 0.25]) @ rotation.T)
    assert frechet_distance(c, Gaussian.of(d)) == pytest.approx((3 - 1) ** 2 + (0.5 - 1) ** 2, rel=1e-9)


def test_a_shift_is_its_square():
    a = features(400, 8, 3)
    assert distance_of(a, a + 2) == pytest.approx(8 * 4, rel=1e-5)


@pytest.mark.parametrize(("count", "dimension"), [(1000, 8), (10, 64)])
def test_identical_sets_have_distance_zero(count, dimension):
    """The cases include ten images with 64 features, whose covariance is singular."""
    rows = features(count, dimension, 4)
    trace = FeatureMoments.of(rows).covariance.trace().item()
    assert 0 <= distance_of(rows, rows) <= 1e-9 * trace
    assert 0 <= frechet_distance_low_rank(rows, reference(rows)) <= 1e-9 * trace


@pytest.mark.parametrize("count", [2, 5, 32, 64, 200])
def test_few_images_are_exact(count):
    """Compare the distances from features and from moments with the published formula in 40 digits."""
    import mpmath

    few, many = features(count, 8, 11), features(500, 8, 12, scale=0.8)
    with mpmath.workdps(40):
        centered = [mpmath.matrix((rows.double() - rows.double().mean(0)).tolist()) for rows in (few, many)]
        first, second = (rows.T * rows / (rows.rows - 1) for rows in centered)
        values = mpmath.eig(first * second, left=False, right=False)
        cross = sum(mpmath.sqrt(abs(mpmath.re(value))) for value in values if abs(value) > 1e-12)
    difference = few.double().mean(0) - many.double().mean(0)
    traces = sum(np.trace(np.cov(rows.double().numpy(), rowvar=False)) for rows in (few, many))
    expected = (difference @ difference).item() + traces - 2 * float(cross)
    assert frechet_distance_low_rank(few, reference(many)) == pytest.approx(expected, rel=1e-9)
    assert distance_of(few, many) == pytest.approx(expected, rel=1e-6)


def test_few_images_use_the_exact_form_and_are_flagged():
    few, many = features(20, 32, 13), reference(features(400, 32, 14))
    estimate = estimate_frechet_distance(few, many)
    assert estimate.singular
    assert estimate.infinity is None
    assert estimate.value == pytest.approx(frechet_distance_low_rank(few, many), rel=1e-12)
    assert not estimate_frechet_distance(features(200, 32, 13), many).singular


def test_the_distance_does_not_depend_on_the_order_of_the_images():
    rows = features(600, 6, 15)
    rows[:300] += 3
    ordered, shuffled = (
        estimate_frechet_distance(part, reference(features(900, 6, 16)))
        for part in (rows, rows[torch.randperm(600, generator=torch.Generator().manual_seed(0))])
    )
    assert shuffled.value == pytest.approx(ordered.value, rel=1e-9)
    assert shuffled.stderr == pytest.approx(ordered.stderr, rel=0.05)  # estimated from other pairs


def test_constant_features_do_not_change_the_distance():
    a, b = (torch.cat([features(300, 4, seed), torch.zeros(300, 3)], 1) for seed in (5, 6))
    expected = distance_of(a[:, :4], b[:, :4])
    assert distance_of(a, b) == pytest.approx(expected, rel=1e-9)


def test_moments_add_up_over_parts():
    rows = features(1000, 8, 7)
    parts = [FeatureMoments.of(rows[first : first + 137]) for first in range(0, 1000, 137)]
    combined = sum(parts[1:], parts[0])
    direct = FeatureMoments.of(rows)
    assert combined.count == direct.count == 1000
    assert torch.allclose(combined.mean, rows.double().mean(0), rtol=1e-12)
    assert torch.allclose(combined.covariance, torch.cov(rows.double().T), rtol=1e-10)


def test_moments_of_integers_add_exactly():
    rows = torch.randint(-100, 100, (64, 5), generator=torch.Generator().manual_seed(0)).float()
    first, second = FeatureMoments.of(rows[:20]), FeatureMoments.of(rows[20:])
    combined = first + second
    assert torch.equal(combined.products, FeatureMoments.of(rows).products)


def test_moments_are_double_whatever_the_features():
    rows = (torch.ones(100_000, 1) * 0.1).half()
    assert FeatureMoments.of(rows).mean.item() == pytest.approx(rows[0].double().item(), rel=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_has_no_covariance(count):
    with pytest.raises(ValueError, match="at least two"):
        _ = FeatureMoments.of(torch.zeros(count, 3)).covariance


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 1.0), (0.0, 1.2)])
def test_the_error_is_the_spread_over_independent_draws(shift, scale):
    """Includes equal distributions, where the first-order influence vanishes, and the limit."""
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(100), dtype=torch.float64)
    generator = torch.Generator().manual_seed(8)

    def draw(count):
        rows = torch.randn(count, 6, generator=generator, dtype=torch.float64) * scale + shift
        return FeatureMoments.of(rows @ mixing), rows @ mixing

    target = Gaussian(torch.zeros(6).double(), mixing.T @ mixing, None)
    estimates = [estimate_frechet_distance(draw(400)[1], target) for _ in range(150)]
    assert not any(estimate.unreliable for estimate in estimates)

    def ratio(values, errors):
        return math.sqrt(np.mean(np.square(errors))) / float(np.std(values, ddof=1))

    assert 0.8 < ratio([e.value for e in estimates], [e.stderr for e in estimates]) < 1.25
    limits, errors = zip(*(estimate.infinity for estimate in estimates), strict=True)
    assert 0.8 < ratio(limits, errors) < 1.25
    truth = frechet_distance(draw(400_000)[0], target)
    mean = np.mean([estimate.value for estimate in estimates])
    assert abs(np.mean(limits) - truth) < 0.5 * abs(mean - truth)


def test_classes_dealt_in_turn_do_not_change_the_error():
    """Blocks assigned by image index would each contain a single class."""
    centers = features(10, 8, 20, scale=3)
    rows = features(600, 8, 21, scale=0.3) + centers[torch.arange(600) % 10]
    target = reference(features(900, 8, 22, scale=0.3) + centers[torch.arange(900) % 10])
    shuffled = rows[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    in_turn, mixed = (estimate_frechet_distance(part, target) for part in (rows, shuffled))
    assert in_turn.value == pytest.approx(mixed.value, rel=1e-9)
    assert in_turn.stderr == pytest.approx(mixed.stderr, rel=0.05)
    assert in_turn.infinity[1] == pytest.approx(mixed.infinity[1], rel=0.05)


def test_an_error_of_few_images_or_of_heavy_tails_is_labeled():
    target = reference(features(500, 16, 17))
    assert estimate_frechet_distance(features(159, 16, 18), target).unreliable == FEW_IMAGES
    assert estimate_frechet_distance(features(160, 16, 18), target).unreliable is None
    outlier = features(400, 16, 18)
    outlier[7] *= 30
    assert estimate_frechet_distance(outlier, target).unreliable == HEAVY_TAILED


def test_the_influence_is_the_derivative_of_the_distance():
    """Compare with the numerical derivative of the distance with respect to the weight of each image."""
    rows, target = features(60, 5, 30).double(), reference(features(80, 5, 31))

    def weighted(weights):
        total = weights.sum()
        mean = weights @ rows / total
        centered = rows - mean
        covariance = (weights[:, None] * centered).T @ centered / total
        return frechet_distance(moments_of_gaussian(mean, covariance), target)

    moments = FeatureMoments.of(rows)
    covariance = moments.covariance * 59 / 60
    influence = FrechetInfluence(moments.mean, target.whiten(covariance), target)
    step, one = 1e-3, torch.ones(60).double()
    derivatives = []
    for image in range(60):
        more, less = one.clone(), one.clone()
        more[image], less[image] = 1 + step, 1 - step
        derivatives.append((weighted(more) - weighted(less)) / (2 * step) * 60)
    computed = influence.first_order(rows)
    assert torch.allclose(
        computed - computed.mean(), torch.tensor(derivatives).double(), rtol=1e-4, atol=1e-4
    )


def test_the_second_order_part_has_the_factors_of_its_curvature():
    """Compare with the matrix itself, over twelve orders of magnitude of the eigenvalues."""
    r = torch.logspace(-4, 2, 40, dtype=torch.float64)
    factors = curvature_factors(r)
    expected = 1 / (torch.outer(r, r) * (r[:, None] + r))
    torch.testing.assert_close(factors @ factors.T, expected, rtol=1e-10, atol=0)
    assert not len(curvature_factors(r[:0]))


def test_the_error_is_the_formula_for_every_pair_of_images():
    """Compare with sums over matrices A_ij of each image, written out."""
    rows, target = features(30, 4, 32).double(), reference(features(50, 4, 33, shift=0.2))
    moments = FeatureMoments.of(rows)
    influence = FrechetInfluence(moments.mean, target.whiten(moments.covariance), target)
    t, values = (rows - moments.mean) @ influence.whitening, influence.values
    r = values.sqrt()
    c = 1 / (torch.outer(r, r) * (r[:, None] + r))
    deviations = t[:, :, None] * t[:, None, :] - torch.diag(values)

    def phi(x, y):
        return 2 * (t[x] * t[y] / r).sum() + (c * deviations[x] * deviations[y]).sum()

    images, offsets = range(30), range(1, PAIRS_PER_IMAGE + 1)
    pairs = torch.stack([phi(x, (x - offset) % 30) for offset in offsets for x in images])
    linear = influence.first_order(rows) - torch.stack([phi(x, x) for x in images]) / 60
    second_order = pairs.square().mean() / (2 * 30**2)
    expected = SamplingError.of(linear.var().item() / 30, second_order.item(), None)
    error = influence.terms(rows, torch.arange(len(rows)), 30).error()
    assert error.second_order == pytest.approx(second_order.item(), rel=1e-9)
    assert error.variance == pytest.approx(expected.variance, rel=1e-9)


def test_large_products_are_computed_in_blocks_and_the_limit_from_one_half():
    rows, target = features(1_300, 520, 34), reference(features(1_400, 520, 35))
    products = rows.double().T @ rows.double()
    torch.testing.assert_close(FeatureMoments.of(rows).products, products, rtol=1e-12, atol=1e-9)
    assert torch.equal(FeatureMoments.of(rows).products, FeatureMoments.of(rows).products.T)
    estimate = estimate_frechet_distance(rows, target)
    order = torch.from_numpy(permutation(1_300, ORDER_SEED))
    half = np.mean([frechet_distance(FeatureMoments.of(rows[part]), target) for part in order.chunk(2)])
    assert estimate.infinity[0] == pytest.approx(2 * estimate.value - half, rel=1e-9)


def test_four_images_are_enough_for_an_error_and_three_are_not():
    target = reference(features(100, 3, 9))
    assert math.isfinite(estimate_frechet_distance(features(4, 3, 10), target).stderr)
    with pytest.raises(ValueError, match="at least four"):
        estimate_frechet_distance(features(3, 3, 10), target)


@pytest.mark.parametrize(("count", "limit", "roots"), [(400, True, 3), (400, False, 1), (30, True, 1)])
def test_there_is_one_decomposition_and_two_more_for_the_limit(monkeypatch, count, limit, roots):
    target = reference(features(500, 16, 17))
    _ = target.root
    taken = []
    for name in ("eigvalsh", "eigh"):
        root = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda m, root=root: (taken.append(0), root(m))[1])
    estimate = estimate_frechet_distance(features(count, 16, 18), target, limit=limit)
    assert len(taken) == roots
    assert (estimate.infinity is not None) == (limit and count > 2 * 16)


def test_value_and_error_are_the_same_without_the_limit():
    rows, target = features(400, 16, 18), reference(features(500, 16, 17))
    with_limit, without = (estimate_frechet_distance(rows, target, limit=limit) for limit in (True, False))
    assert (without.value, without.stderr) == pytest.approx((with_limit.value, with_limit.stderr), rel=1e-9)
