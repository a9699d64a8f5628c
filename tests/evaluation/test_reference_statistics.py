"""References from a split and from files, and the check that they have not changed."""

import math

import numpy as np
import pytest
import torch

from fm_core.config import EvaluateSection
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from fm_core.evaluation.features.classifier_features import first_images
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.metrics.frechet import frechet_distance_of_features
from fm_core.evaluation.reference import (
    ReferenceSplit,
    reference_check,
    reference_from_npz,
    subset_indices,
)
from fm_core.evaluation.reference_statistics import read_statistics, write_statistics

PROJECTION = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
EXTRACTOR = Extractor("projection", "1" * 64, lambda images: (images.flatten(1).float() @ PROJECTION, None))


def settings(**keys):
    return EvaluateSection.model_validate(keys)


@pytest.fixture(scope="module")
def features(digits, manifest):
    images, _ = first_images(digits.data.root, manifest, "train", 10_000)
    return EXTRACTOR(images)[0]


class TestSplit:
    def test_it_is_the_moments_of_every_training_image_and_is_stored(self, digits, manifest, features):
        split = ReferenceSplit(digits.data.root, manifest, settings(pair_images=100), EXTRACTOR)
        task = split.task("phase")
        for number in task.missing():
            task.run(number)
        result = split.read(task)
        expected = Gaussian.of(FeatureMoments.of(features))
        assert result.gaussian.count == 1497
        torch.testing.assert_close(result.gaussian.mean, expected.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(result.gaussian.covariance, expected.covariance, rtol=1e-10, atol=1e-8)
        torch.testing.assert_close(result.gaussian.root, expected.root, rtol=1e-6, atol=1e-6)
        assert torch.equal(result.rows, features[subset_indices(1497, 100)])
        assert result.name == "train, 1497 images"
        again = ReferenceSplit(digits.data.root, manifest, settings(pair_images=100), EXTRACTOR)
        assert again.task("phase") is None
        assert torch.equal(again.read(None).gaussian.mean, result.gaussian.mean)
        assert task.missing() == [0]  # intermediate results are removed

    @pytest.mark.parametrize("change", ["extractor", "split", "rows"])
    def test_statistics_of_another_kind_have_another_file(self, digits, manifest, change):
        reference = ReferenceSplit(digits.data.root, manifest, settings(), EXTRACTOR)
        other = {
            "extractor": lambda: ReferenceSplit(
                digits.data.root, manifest, settings(), Extractor("other", "2" * 64, EXTRACTOR.extract)
            ),
            "split": lambda: ReferenceSplit(digits.data.root, manifest, settings(reference="val"), EXTRACTOR),
            "rows": lambda: ReferenceSplit(digits.data.root, manifest, settings(pair_images=50), EXTRACTOR),
        }[change]()
        assert reference.file != other.file

    def test_a_subset_is_chosen_by_a_fixed_permutation(self):
        assert subset_indices(10, 4).tolist() == sorted(subset_indices(10, 4).tolist())
        assert set(subset_indices(10, 4).tolist()) < set(subset_indices(10, 5).tolist())
        assert subset_indices(3, 10).tolist() == [0, 1, 2]
        assert len(set(subset_indices(1_281_167, 10_000).tolist())) == 10_000


class TestFiles:
    def test_what_is_written_is_read_back_exactly(self, features, manifest, tmp_path):
        gaussian = Gaussian.of(FeatureMoments.of(features))
        write_statistics(tmp_path / "ours.npz", gaussian, EXTRACTOR, manifest)
        with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
            assert {"mu", "sigma", "features", "data_version"} <= set(file.files)
        gaussian_read, images = read_statistics(tmp_path / "ours.npz", EXTRACTOR, manifest)
        assert images is None
        assert torch.equal(gaussian_read.mean, gaussian.mean)
        assert torch.equal(gaussian_read.covariance, gaussian.covariance)
        assert gaussian_read.count == len(features)

    def test_statistics_of_others_are_taken_with_the_images_that_adm_adds(self, features, manifest, tmp_path):
        mu, sigma = features.double().mean(0).numpy(), torch.cov(features.double().T).numpy()
        np.savez(tmp_path / "edm.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
        assert (
            reference_from_npz(settings(reference=str(tmp_path / "edm.npz")), EXTRACTOR, manifest, False).rows
            is None
        )
        with pytest.raises(UserError, match="contains no images"):
            reference_from_npz(settings(reference=str(tmp_path / "edm.npz")), EXTRACTOR, manifest, True)
        pixels = np.random.default_rng(0).integers(0, 17, (30, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=pixels)
        reference = reference_from_npz(
            settings(reference=str(tmp_path / "adm.npz")), EXTRACTOR, manifest, True
        )
        expected = EXTRACTOR(torch.from_numpy(pixels).permute(0, 3, 1, 2))[0]
        assert torch.equal(reference.rows, expected)
        assert reference.name == "adm.npz, number of images not told"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"mu": np.zeros(20)}, "contains mu, but no mu and sigma"),
            ({"mu": np.zeros(20), "sigma": np.eye(19)}, "are not a mean and a covariance"),
            ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "has 2048 features; projection has 20"),
            (
                {"mu": np.zeros(20), "sigma": np.eye(20), "features": "classifier"},
                "has features classifier, not projection",
            ),
            (
                {"mu": np.zeros(20), "sigma": np.eye(20), "data_version": "f" * 64},
                "has data_version ffff",
            ),
            (None, "cannot be read"),
        ],
        ids=["no-sigma", "shape", "dimension", "extractor", "data", "damaged"],
    )
    def test_statistics_of_something_else_are_refused_in_one_line(self, content, message, manifest, tmp_path):
        path = tmp_path / "a.npz"
        path.write_bytes(b"no archive") if content is None else np.savez(path, **content)
        with pytest.raises(UserError, match=message) as caught:
            read_statistics(path, EXTRACTOR, manifest)
        assert "\n" not in str(caught.value)


class TestReferenceCheck:
    def test_the_distance_of_real_images_must_not_change(self, digits, features):
        manifest = load_manifest(digits.data.root, digits.data.name)
        reference = Gaussian.of(FeatureMoments.of(features))
        images, _ = first_images(digits.data.root, manifest, "val", 300)

        def check(pixels):
            apart = frechet_distance_of_features(EXTRACTOR(pixels)[0], reference)
            reference_check(digits.data.root, manifest, EXTRACTOR, "train", apart, len(pixels))
            return apart

        first = check(images)
        assert check(images) == first
        for changed in (images.roll(1, 2), 16 - images, (images // 2) * 2):  # shifted, inverted, quantized
            with pytest.raises(
                UserError, match="pixels, resizing, extractor or statistics changed"
            ) as caught:
                check(changed)
            assert "\n" not in str(caught.value)
            assert "guard-" in str(caught.value)
        assert math.isclose(check(images), first)
