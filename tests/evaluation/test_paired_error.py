"""Standard errors of differences of Fréchet distances whose samples share noise."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fm_core.config import EvaluateSection
from fm_core.evaluation.metrics.feature_statistics import Gaussian
from fm_core.evaluation.metrics.frechet import estimate_frechet_distance
from fm_core.evaluation.paired_error import (
    on_one_scale,
    read_terms,
    score_difference,
    share_noise,
    write_terms,
)
from fm_core.evaluation.reference import Reference
from fm_core.evaluation.scores import image_scores

PROTOCOL = {"seed": 3, "generator": "g", "images": 300, "features_sha256": "f", "reference": "train"}


def target(dimension=4):
    return Gaussian(torch.zeros(dimension).double(), torch.eye(dimension).double(), None)


def noise(seed, count=300, dimension=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def scores(estimate, **protocol):
    distance = {"value": estimate.value, "stderr": estimate.stderr}
    return {"protocol": PROTOCOL | protocol, "frechet_distance": distance}


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.1, 0.1), (1.0, 0.05), (1.6, 0.0)], ids=["near", "nearly equal", "far"]
)
def test_the_error_of_a_difference_is_its_spread_over_independent_draws(scale, shift):
    differences, paired, unpaired = [], [], []
    for seed in range(150):
        x = noise(seed)
        y = x * scale + shift + 0.1 * noise(seed + 1000)
        one, other = (estimate_frechet_distance(rows, target(), limit=False) for rows in (x, y))
        differences.append(other.value - one.value)
        paired.append(other.terms.less(one.terms).error().stderr)
        unpaired.append(math.hypot(one.stderr, other.stderr))
    spread = float(np.std(differences, ddof=1))
    assert 0.8 < math.sqrt(np.mean(np.square(paired))) / spread < 1.25
    if scale == 1:
        assert math.sqrt(np.mean(np.square(unpaired))) > 1.5 * spread


def test_equal_sets_do_not_differ_and_other_orders_are_not_paired():
    estimate = estimate_frechet_distance(noise(1), target())
    assert estimate.terms.less(estimate.terms).error().stderr == 0
    fewer = estimate_frechet_distance(noise(1, 200), target())
    assert estimate.terms.less(fewer.terms) is None


def test_terms_are_stored_beside_the_scores_and_give_the_paired_error(tmp_path):
    estimates = [estimate_frechet_distance(rows, target()) for rows in (noise(1), 1.05 * noise(1))]
    files = tmp_path / "a.json", tmp_path / "b-0.9.json"
    for file, estimate in zip(files, estimates, strict=True):
        write_terms(file, estimate.terms)
    assert (tmp_path / "b-0.9.influence.safetensors").exists()
    one, other = map(scores, estimates)
    difference = score_difference("frechet_distance", other, one, files[::-1])
    assert difference.paired
    assert difference.value == other["frechet_distance"]["value"] - one["frechet_distance"]["value"]
    exact = estimates[1].terms.less(estimates[0].terms).error().stderr
    assert difference.stderr == pytest.approx(exact, rel=1e-4)
    assert difference.stderr < estimates[0].stderr


def test_without_common_noise_or_stored_terms_both_errors_are_added(tmp_path):
    estimates = [estimate_frechet_distance(noise(seed), target()) for seed in (1, 2)]
    files = tmp_path / "a.json", tmp_path / "b.json"
    expected = math.hypot(*(estimate.stderr for estimate in estimates))
    one, other = scores(estimates[0]), scores(estimates[1])
    assert read_terms(files[0]) is None
    without_files = score_difference("frechet_distance", one, other, files)
    for file, estimate in zip(files, estimates, strict=True):
        write_terms(file, estimate.terms)
    other_seed = score_difference("frechet_distance", one, scores(estimates[1], seed=4), files)
    files[1].with_suffix(".influence.safetensors").write_bytes(b"damaged")
    damaged = score_difference("frechet_distance", one, other, files)
    for difference in (without_files, other_seed, damaged):
        assert not difference.paired
        assert difference.stderr == pytest.approx(expected)


def test_protocols_say_whether_noise_and_scale_are_shared():
    assert share_noise(PROTOCOL, dict(PROTOCOL, solver="heun2"))
    for key, value in (("seed", 4), ("generator", None), ("images", 200)):
        assert not share_noise(PROTOCOL, dict(PROTOCOL, **{key: value}))
    assert on_one_scale(PROTOCOL, dict(PROTOCOL, seed=4))
    for key, value in (("features_sha256", "g"), ("reference", "val"), ("images", 200)):
        assert not on_one_scale(PROTOCOL, dict(PROTOCOL, **{key: value}))


def test_terms_name_the_samples_also_if_these_are_shuffled_before_they_are_scored():
    rows, received = noise(5), []
    for in_turn in (False, True):
        image_scores(
            [{"features": rows}],
            (),
            Reference(target(), None, "train"),
            SimpleNamespace(name="f", validation_accuracy=None),
            EvaluateSection(metrics=("frechet_distance",)),
            torch.device("cpu"),
            classes_in_turn=in_turn,
            on_terms=received.append,
        )
    plain, shuffled = received
    assert plain.less(shuffled) is None
    by_image = [terms.first[terms.images.argsort()] for terms in received]
    assert torch.allclose(*by_image, rtol=1e-9)
