"""Memorization scores for models that copy, that generalize, and that are far from the data."""

import pytest
import torch

from fm_core.evaluation.metrics.memorization import FEW_VALIDATION, memorization, nearest_distances
from fm_core.report.memorization_table import memorization_rows, memorization_verdict


def normal(count, seed, dimension=6):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TRAINING, HELD_OUT = normal(400, 0), normal(600, 1)


def measured(samples):
    return memorization(*(nearest_distances(rows, TRAINING.split(150)) for rows in (samples, HELD_OUT)))


def test_the_nearest_of_all_blocks_is_found_and_a_copy_is_at_zero():
    pixels = torch.randint(0, 256, (300, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    distances = nearest_distances(pixels[250:], pixels[:260].split(64))
    assert (distances[:10] == 0).all()
    expected = (
        torch.cdist(pixels[260:].flatten(1).double(), pixels[:260].flatten(1).double()).amin(1) / 48**0.5
    )
    assert torch.allclose(distances[10:], expected, rtol=1e-9)


def test_samples_of_the_distribution_are_as_far_as_validation_images():
    result = measured(normal(600, 2))
    for share in (result.nearer, result.near_copies):
        assert abs(share.value - share.expected) < 3 * share.stderr
    assert result.samples[0] == pytest.approx(result.held_out[0], abs=3 * result.samples[1])


def test_copies_are_counted():
    samples = normal(600, 3)
    samples[:60] = TRAINING[:60] + 1e-3 * normal(60, 4)
    result = measured(samples)
    assert result.near_copies.value == pytest.approx(0.11, abs=0.015)
    assert result.near_copies.value - result.near_copies.expected > 5 * result.near_copies.stderr
    assert result.nearer.value > 0.5


def test_samples_far_from_all_data_are_no_copies():
    result = measured(normal(100, 5) + 9)
    assert (result.nearer.value, result.near_copies.value) == (0, 0)


def test_the_errors_are_the_spread_over_independent_sets():
    """Samples and validation images are drawn independently; the training images stay the same."""
    results = [
        memorization(*(nearest_distances(normal(300, 10 + 2 * n + side), [TRAINING]) for side in (0, 1)))
        for n in range(80)
    ]
    for name in ("nearer", "near_copies"):
        shares = [getattr(result, name) for result in results]
        spread = torch.tensor([share.value for share in shares]).std()
        stated = torch.tensor([share.stderr for share in shares]).square().mean().sqrt()
        assert 0.75 < stated / spread < 1.35, name
    assert results[0].near_copies.unreliable == FEW_VALIDATION


def test_the_table_names_both_sets_and_a_model_that_overfits():
    share = {"value": 0.7, "stderr": 0.02, "expected": 0.5}
    record = {
        "samples": {"value": 1.0, "stderr": 0.1},
        "held_out": {"value": 2.0, "stderr": 0.1},
        "nearer": share,
        "near_copies": {**share, "value": 0.05, "expected": 0.01},
        "images": 500,
        "training_images": 1_297,
        "distance": "root mean square difference",
    }
    scores = {"memorization": {"pixels": record}}
    rows = memorization_rows(scores)
    assert rows[0][1:3] == ["1.000 ± 0.100", "2.000 ± 0.100"]
    assert "1,297 training images, in pixels" in rows[0][3]
    assert "70% in pixels" in memorization_verdict(scores)
    fair = {"memorization": {"pixels": {**record, "nearer": {**share, "value": 0.52}}}}
    assert memorization_verdict(fair) == ""
    assert memorization_rows({}) == []
