"""Feature extractors: torch-fidelity's InceptionV3, TorchScript files, and modules by import path."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fm_core.config import EvaluateSection
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import as_rgb
from fm_core.evaluation.features.extractor_weights import verified_weights
from fm_core.evaluation.features.open_extractor import open_extractor
from tests.support import ROOT

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Channel means as features, and three logits."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(3, 3)

    def forward(self, images):
        features = images.float().mean((2, 3))
        return features, self.read(features)


class Broken(nn.Module):
    def forward(self, images):
        return images.float()


def seeded():
    torch.manual_seed(0)
    return Brightness()


def opened(manifest, root, **keys):
    settings = EvaluateSection.model_validate(keys)
    return open_extractor(settings, root, manifest, CPU, lambda step, steps, loss: None)


@pytest.fixture
def root(digits):
    return digits.data.root


def assert_refused(message, *arguments, **keys):
    with pytest.raises(UserError, match=message) as caught:
        opened(*arguments, **keys)
    assert "\n" not in str(caught.value)


def test_gray_images_become_rgb_of_256_levels():
    images = torch.tensor([[[[0, 8, 16]]]], dtype=torch.uint8)
    rgb = as_rgb(images, 17)
    assert rgb.shape == (1, 3, 1, 3)
    assert rgb[0, 2, 0].tolist() == [0, 128, 255]
    color = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(as_rgb(color, 256), color)


class TestCustom:
    def test_a_module_by_its_import_path(self, manifest, root):
        extractor = opened(manifest, root, features=f"{__name__}:seeded")
        images = torch.randint(0, 17, (5, 1, 8, 8), dtype=torch.uint8)
        features, probabilities = extractor(images)
        expected = as_rgb(images, 17).float().mean((2, 3))
        torch.testing.assert_close(features, expected)
        assert torch.allclose(probabilities.sum(1), torch.ones(5))
        assert extractor.name == f"{__name__}:seeded"
        assert extractor.sha256 == opened(manifest, root, features=f"{__name__}:seeded").sha256

    def test_its_weights_may_be_named_and_are_checked(self, manifest, root, tmp_path):
        torch.manual_seed(1)
        torch.save(Brightness().state_dict(), tmp_path / "a.pt")
        digest = hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
        keys = {"features": f"{__name__}:seeded", "weights": str(tmp_path / "a.pt")}
        extractor = opened(manifest, root, **keys, weights_sha256=digest)
        assert extractor.sha256 != opened(manifest, root, features=f"{__name__}:seeded").sha256
        assert_refused("was not loaded", manifest, root, **keys, weights_sha256="0" * 64)
        (tmp_path / "a.pt").write_bytes(b"nothing")
        assert_refused("does not fit the extractor", manifest, root, **keys)

    def test_a_torchscript_file(self, manifest, root, tmp_path):
        file = tmp_path / "brightness.pt"
        torch.jit.script(seeded()).save(file)
        extractor = opened(manifest, root, features=str(file))
        assert extractor.name == "torchscript-brightness"
        assert extractor.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))[0].shape == (2, 3)
        file.write_bytes(b"no script")
        assert_refused("is not a TorchScript file", manifest, root, features=str(file))

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            ("clip", "allowed are classifier, inception, dinov2, a TorchScript file"),
            ("no_such_module:Name", "No module named"),
            (f"{__name__}:Nothing", "has no attribute"),
            ("builtins:dict", "returns a dict, not a torch.nn.Module"),
        ],
    )
    def test_what_is_not_an_extractor_is_refused(self, features, message, manifest, root):
        assert_refused(message, manifest, root, features=features)

    def test_a_module_that_gives_the_pixels_gives_features(self, manifest, root):
        images = torch.randint(0, 17, (2, 1, 8, 8), dtype=torch.uint8)
        features, probabilities = opened(manifest, root, features="torch.nn:Identity")(images)
        assert torch.equal(features, as_rgb(images, 17).float().flatten(1))
        assert probabilities is None


class TestWeights:
    def test_a_url_is_fetched_once_and_checked_each_time(self, manifest, root, tmp_path):
        (tmp_path / "w.pth").write_bytes(b"weights")
        digest = hashlib.sha256(b"weights").hexdigest()
        url = (tmp_path / "w.pth").as_uri()
        cached, actual = verified_weights(url, digest, root, "digits")
        assert actual == digest
        (tmp_path / "w.pth").unlink()
        assert verified_weights(url, digest.upper(), root, "digits")[0] == cached
        cached.write_bytes(b"tampered with")
        with pytest.raises(UserError, match="is expected"):
            verified_weights(url, digest, root, "digits")
        assert not cached.exists()

    def test_a_url_that_leads_nowhere_is_one_line(self, root, tmp_path):
        with pytest.raises(UserError, match="cannot be fetched") as caught:
            verified_weights((tmp_path / "none.pth").as_uri(), None, root, "digits")
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def answers(digits, tmp_path_factory, public_environment):
    folder = tmp_path_factory.mktemp("inception")
    # Importing a torchvision that was built for another torch raises RuntimeError.
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    arguments = [
        public_environment,
        "-m",
        "tests.support.inception_probe",
        digits.data.root,
        digits.data.name,
        folder,
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        arguments, check=False, capture_output=True, text=True, timeout=400, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t", 1) for line in done.stdout.splitlines())


class TestInception:
    """Tests in a separate environment, with random weights in the exact format."""

    def test_its_features_are_those_of_torch_fidelity(self, answers):
        assert answers["features"] == "(3, 2048) (3, 1008)"
        assert answers["name"].startswith("inception-v3-")
        assert float(answers["largest difference of the features"]) == 0
        assert float(answers["largest difference of the probabilities"]) == 0
        assert float(answers["spread of the features"]) > 0
        assert answers["sha256"] == answers["sha256 of the file"]

    @pytest.mark.parametrize("protocol", ["pytorch-fid", "clean-fid"])
    def test_the_resizing_of_other_programs_replaces_its_own(self, answers, protocol):
        assert float(answers[f"largest difference with the resizing of {protocol}"]) < 1e-2
        assert float(answers[f"resizing of {protocol} matters"]) > 0.1

    def test_sfid_has_seven_channels_of_the_layer_mixed_6_conv(self, answers):
        assert answers["spatial features"] == "(3, 2023)"
        assert float(answers["largest difference of the spatial features"]) < 1e-5
        assert float(answers["largest difference of the features of adm"]) == 0

    def test_a_mismatched_torchvision_is_tolerated_or_refused_in_one_line(self, answers):
        assert answers["package"].startswith("RuntimeError")
        assert answers["broken module"].startswith(
            "evaluate.features inception: torch-fidelity does not import with torch"
        )
        assert "install the torchvision built for this torch" in answers["broken module"]

    def test_other_weights_are_not_loaded(self, answers):
        assert "is expected" in answers["published hash"]
        assert "does not contain InceptionV3" in answers["other network"]
        assert "does not contain InceptionV3" in answers["code in a pickle"]

    def test_missing_weights_are_asked_for(self, manifest, root):
        assert_refused("needs evaluate.weights: path or URL", manifest, root, features="inception")

    def test_without_the_extra_it_says_what_to_install(self, manifest, root, tmp_path):
        if "torch_fidelity" in sys.modules:
            pytest.fail("the test process must not import torch-fidelity")
        (tmp_path / "w.pth").write_bytes(b"x")
        digest = hashlib.sha256(b"x").hexdigest()
        assert_refused(
            r"No module named 'torch_fidelity'; pip install .* '\.\[inception\]'",
            manifest,
            root,
            features="inception",
            weights=str(tmp_path / "w.pth"),
            weights_sha256=digest,
        )
