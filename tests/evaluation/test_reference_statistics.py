"""References: from a split, from files, and the guard over them."""

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
from fm_core.evaluation.metrics.frechet import distance_alone
from fm_core.evaluation.reference import ReferenceSplit, evenly_spaced, imported, reference_check
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
    def test_it_is_the_moments_of_every_training_image_and_is_kept(self, digits, manifest, features):
        split = ReferenceSplit(digits.data.root, manifest, settings(pair_images=100), EXTRACTOR)
        work = split.work("phase")
        for number in work.missing():
            work.run(number)
        found = split.read(work)
        expected = Gaussian.of(FeatureMoments.of(features))
        assert found.gaussian.count == 1497
        torch.testing.assert_close(found.gaussian.mean, expected.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.gaussian.covariance, expected.covariance, rtol=1e-10, atol=1e-8)
        torch.testing.assert_close(found.gaussian.root, expected.root, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.rows, features[evenly_spaced(1497, 100)])
        assert found.name == "train, 1497 images"
        again = ReferenceSplit(digits.data.root, manifest, settings(pair_images=100), EXTRACTOR)
        assert again.work("phase") is None
        assert torch.equal(again.read(None).gaussian.mean, found.gaussian.mean)
        assert work.missing() == [0]  # what was on the way is gone

    @pytest.mark.parametrize("change", ["extractor", "split", "kept"])
    def test_another_one_is_not_taken_for_it(self, digits, manifest, change):
        one = ReferenceSplit(digits.data.root, manifest, settings(), EXTRACTOR)
        other = {
            "extractor": lambda: ReferenceSplit(
                digits.data.root, manifest, settings(), Extractor("other", "2" * 64, EXTRACTOR.read)
            ),
            "split": lambda: ReferenceSplit(digits.data.root, manifest, settings(reference="val"), EXTRACTOR),
            "kept": lambda: ReferenceSplit(digits.data.root, manifest, settings(pair_images=50), EXTRACTOR),
        }[change]()
        assert one.file != other.file

    def test_evenly_spaced_images_are_spread_over_all(self):
        assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
        assert evenly_spaced(3, 10).tolist() == [0, 1, 2]
        assert len(set(evenly_spaced(1_281_167, 10_000).tolist())) == 10_000


class TestFiles:
    def test_what_is_written_is_read_back_exactly(self, features, manifest, tmp_path):
        gaussian = Gaussian.of(FeatureMoments.of(features))
        write_statistics(tmp_path / "ours.npz", gaussian, EXTRACTOR, manifest)
        with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
            assert {"mu", "sigma", "features", "data_version"} <= set(file.files)
        found, images = read_statistics(tmp_path / "ours.npz", EXTRACTOR, manifest)
        assert images is None
        assert torch.equal(found.mean, gaussian.mean)
        assert torch.equal(found.covariance, gaussian.covariance)
        assert found.count == len(features)

    def test_statistics_of_others_are_taken_with_the_images_that_adm_adds(self, features, manifest, tmp_path):
        mu, sigma = features.double().mean(0).numpy(), torch.cov(features.double().T).numpy()
        np.savez(tmp_path / "edm.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
        assert (
            imported(settings(reference=str(tmp_path / "edm.npz")), EXTRACTOR, manifest, False).rows is None
        )
        with pytest.raises(UserError, match="holds no images"):
            imported(settings(reference=str(tmp_path / "edm.npz")), EXTRACTOR, manifest, True)
        pixels = np.random.default_rng(0).integers(0, 17, (30, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=pixels)
        found = imported(settings(reference=str(tmp_path / "adm.npz")), EXTRACTOR, manifest, True)
        expected = EXTRACTOR(torch.from_numpy(pixels).permute(0, 3, 1, 2))[0]
        assert torch.equal(found.rows, expected)
        assert found.name == "adm.npz, number of images not told"

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ({"mu": np.zeros(20)}, "holds mu, no mu and sigma"),
            ({"mu": np.zeros(20), "sigma": np.eye(19)}, "are no mean and covariance"),
            ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "of 2048 features; projection has 20"),
            (
                {"mu": np.zeros(20), "sigma": np.eye(20), "features": "classifier"},
                "has features classifier; this is projection",
            ),
            (
                {"mu": np.zeros(20), "sigma": np.eye(20), "data_version": "f" * 64},
                "has data_version ffff",
            ),
            (None, "cannot be read"),
        ],
        ids=["no-sigma", "shape", "dimension", "extractor", "data", "damaged"],
    )
    def test_statistics_of_something_else_are_refused_in_one_line(self, content, told, manifest, tmp_path):
        path = tmp_path / "a.npz"
        path.write_bytes(b"no archive") if content is None else np.savez(path, **content)
        with pytest.raises(UserError, match=told) as caught:
            read_statistics(path, EXTRACTOR, manifest)
        assert "\n" not in str(caught.value)


class TestGuard:
    def test_real_images_must_stay_where_they_were(self, digits, features):
        manifest = load_manifest(digits.data.root, digits.data.name)
        reference = Gaussian.of(FeatureMoments.of(features))
        images, _ = first_images(digits.data.root, manifest, "val", 300)

        def check(pixels):
            apart = distance_alone(EXTRACTOR(pixels)[0], reference)
            reference_check(digits.data.root, manifest, EXTRACTOR, "train", apart, len(pixels))
            return apart

        first = check(images)
        assert check(images) == first
        for changed in (images.roll(1, 2), 16 - images, (images // 2) * 2):  # shifted, inverted, coarser
            with pytest.raises(
                UserError, match="pixels, resizing, extractor or statistics changed"
            ) as caught:
                check(changed)
            assert "\n" not in str(caught.value)
            assert "guard-" in str(caught.value)
        assert math.isclose(check(images), first)
