"""Kernel distance, Inception Score, precision and recall, and duplicates, compared with known values."""

import math

import numpy as np
import pytest
import torch

from fm_core.evaluation.image_sources import digests
from fm_core.evaluation.metrics import kid
from fm_core.evaluation.metrics import precision_recall as metrics
from fm_core.evaluation.metrics.inception_score import inception_score
from fm_core.evaluation.metrics.kid import kernel_distance, kernel_distance_of_subsets
from fm_core.evaluation.metrics.precision_recall import TOO_FEW, duplicates, precision_and_recall


def normal(count, dimension, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator) + shift


class TestKernelDistance:
    def by_hand(self, x, y):
        x, y = x.double().numpy(), y.double().numpy()

        def kernel(a, b):
            return (a @ b.T / a.shape[1] + 1) ** 3

        n, m = len(x), len(y)
        xx, yy = kernel(x, x), kernel(y, y)
        within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
        return within - 2 * kernel(x, y).mean()

    @pytest.mark.parametrize(("n", "m"), [(4, 4), (57, 91), (2100, 40)])
    def test_it_is_the_unbiased_estimate_over_all_pairs(self, n, m):
        x, y = normal(n, 5, 0), normal(m, 5, 1, shift=0.2)
        assert kernel_distance(x, y).value == pytest.approx(self.by_hand(x, y), rel=1e-9)

    @pytest.mark.parametrize("size", [7, 40])
    def test_the_parts_of_the_kernel_matrix_do_not_change_value_and_error(self, monkeypatch, size):
        x, y = normal(60, 4, 0), normal(40, 4, 1, shift=0.2)
        whole = kernel_distance(x, y)
        monkeypatch.setattr(kid, "CPU_TILE", size)
        parts = kernel_distance(x, y)
        assert (parts.value, parts.stderr) == (pytest.approx(whole.value), pytest.approx(whole.stderr))

    def test_its_error_is_the_spread_over_independent_draws_of_both_sets(self):
        results = [
            kernel_distance(normal(150, 4, seed), normal(100, 4, 10_000 + seed, shift=0.3))
            for seed in range(80)
        ]
        spread = float(np.std([result.value for result in results], ddof=1))
        assert math.sqrt(np.mean([result.stderr**2 for result in results])) == pytest.approx(spread, rel=0.25)

    def test_its_error_is_no_larger_where_the_distributions_are_equal(self):
        results = [kernel_distance(normal(150, 4, seed), normal(100, 4, 10_000 + seed)) for seed in range(80)]
        spread = float(np.std([result.value for result in results], ddof=1))
        assert math.sqrt(np.mean([result.stderr**2 for result in results])) == pytest.approx(spread, rel=0.25)

    def test_classes_dealt_in_turn_do_not_change_its_error(self):
        x, y = (normal(200, 4, seed) + 3 * torch.eye(4).repeat(50, 1) for seed in (0, 1))
        shuffled = x[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
        assert kernel_distance(x, y).stderr == pytest.approx(kernel_distance(shuffled, y).stderr, rel=1e-9)

    def test_the_mean_of_subsets_has_the_error_of_all_images_and_that_of_the_draws(self):
        x, y = normal(300, 4, 0), normal(300, 4, 1, shift=0.3)
        all_pairs, one = kernel_distance(x, y), kernel_distance_of_subsets(x, y, subsets=1, size=300)
        assert (one.value, one.stderr) == pytest.approx((all_pairs.value, all_pairs.stderr), rel=1e-9)
        subsets = kernel_distance_of_subsets(x, y, subsets=30, size=60)
        assert all_pairs.stderr < subsets.stderr < 1.5 * all_pairs.stderr
        assert subsets.value == pytest.approx(all_pairs.value, abs=3 * subsets.stderr)

    def test_equal_distributions_are_at_zero_within_its_error(self):
        results = [kernel_distance(normal(120, 4, seed), normal(120, 4, 500 + seed)) for seed in range(60)]
        mean = np.mean([result.value for result in results])
        assert abs(mean) < 3 * np.std([result.value for result in results]) / math.sqrt(60)

    def test_three_images_are_refused(self):
        with pytest.raises(ValueError, match="at least four"):
            kernel_distance(normal(3, 4, 0), normal(9, 4, 0))


class TestInceptionScore:
    def test_confident_and_balanced_images_score_the_number_of_classes_and_equal_ones_1(self):
        confident = torch.eye(10).repeat(5, 1)
        assert inception_score(confident).value == pytest.approx(10, rel=1e-12)
        assert inception_score(torch.full((40, 10), 0.1)).value == pytest.approx(1, rel=1e-6)

    def test_it_does_not_depend_on_the_order_of_images(self):
        probabilities = normal(500, 7, 0).mul(3).softmax(1)
        by_class = probabilities[probabilities.argmax(1).argsort()]
        assert inception_score(by_class).value == pytest.approx(
            inception_score(probabilities).value, rel=1e-12
        )

    def test_its_error_is_the_spread_over_independent_draws(self):
        results = [inception_score(normal(200, 5, seed).mul(3).softmax(1)) for seed in range(80)]
        spread = float(np.std([result.value for result in results], ddof=1))
        assert math.sqrt(np.mean([result.stderr**2 for result in results])) == pytest.approx(spread, rel=0.25)


class TestPrecisionAndRecall:
    def test_samples_of_a_part_of_the_data_are_precise_and_recall_that_part(self):
        centers = torch.eye(4) * 100
        real = torch.cat([normal(100, 4, i) + center for i, center in enumerate(centers)])
        samples = torch.cat([normal(150, 4, 10 + i) + center for i, center in enumerate(centers[:2])])
        result = precision_and_recall(samples, real)
        assert result.precision > 0.8
        assert result.recall == pytest.approx(0.5, abs=0.08)

    def test_their_errors_are_the_spread_over_independent_draws_of_both_sets(self, monkeypatch):
        """With the balls held fixed, the errors would be too small by a fifth."""
        monkeypatch.setattr(metrics, "HALVINGS", 12)
        results = [
            precision_and_recall(normal(100, 4, seed), normal(120, 4, 900 + seed, shift=0.3))
            for seed in range(80)
        ]
        for name in ("precision", "recall"):
            spread = float(np.std([getattr(result, name) for result in results], ddof=1))
            errors = [getattr(result, f"{name}_stderr") ** 2 for result in results]
            assert 0.8 < math.sqrt(np.mean(errors)) / spread < 1.25

    def test_their_values_are_those_of_all_pairs(self):
        samples, real = normal(90, 3, 0, shift=0.5), normal(70, 3, 1)
        result = precision_and_recall(samples, real)
        radii = torch.cdist(real, real).sort(1).values[:, 3]
        assert result.precision == (torch.cdist(samples, real) <= radii).any(1).double().mean()

    def test_sets_too_small_for_halves_have_binomial_errors_and_say_so(self):
        result = precision_and_recall(normal(7, 3, 0), normal(60, 3, 1))
        assert result.unreliable == TOO_FEW
        assert result.precision_stderr == pytest.approx(
            math.sqrt(result.precision * (1 - result.precision) / 7)
        )
        assert precision_and_recall(normal(8, 3, 0), normal(60, 3, 1)).unreliable is None

    def test_distant_samples_are_neither(self):
        result = precision_and_recall(normal(50, 3, 0, shift=1e3), normal(60, 3, 1))
        assert (result.precision, result.recall) == (0, 0)

    def test_real_images_against_themselves_are_both(self):
        rows = normal(80, 3, 2)
        result = precision_and_recall(rows, rows)
        assert (result.precision, result.recall) == (1, 1)

    def test_three_images_are_refused(self):
        with pytest.raises(ValueError, match="more than 3"):
            precision_and_recall(normal(3, 3, 0), normal(60, 3, 1))


class TestDuplicates:
    def test_images_that_repeat_are_counted(self):
        pixels = torch.randint(0, 256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(torch.uint8)
        assert duplicates(digests(pixels)) == 0
        assert duplicates(digests(torch.cat([pixels, pixels[:7], pixels[:2]]))) == 9

    def test_one_intensity_level_makes_another_image(self):
        pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        pixels[1, 0, 3, 3] = 1
        assert duplicates(digests(pixels)) == 0
