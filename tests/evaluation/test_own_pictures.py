"""Images to score, read by the rules of sharding: hidden entries, links, transparency."""

import numpy as np
import pytest
import torch
from PIL import Image

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest, Packing, Split
from fm_core.errors import UserError
from fm_core.evaluation.features import classifier_features
from fm_core.evaluation.features.classifier_features import first_images
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.image_sources import external_images
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.reference import Reference
from fm_core.evaluation.scores import image_scores

SPLIT = Split(images=40, class_histogram=None, channel_mean=(0.0,), channel_std=(0.0,))


@pytest.fixture
def colors() -> Manifest:
    """Manifest of a data set of 8 x 8 color images with a black background."""
    return Manifest(
        name="colors",
        levels=256,
        image_shape=(3, 8, 8),
        class_count=None,
        label_order="none",
        packing=Packing(block_images=8, shard_blocks=1),
        recipe={"source": "folder", "background": "black"},
        splits={"train": SPLIT, "val": SPLIT},
        shards=(),
    )


def save(folder, name, array):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def read(folder, manifest):
    return external_images(str(folder), manifest).read(0)[0]


def test_transparent_pixels_are_composed_on_the_background_of_the_data_set(tmp_path, colors):
    hidden = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    hidden[..., 3] = 0
    for number in range(4):
        save(tmp_path / "a", f"{number}.png", hidden)
    assert torch.equal(read(tmp_path / "a", colors), torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    plain = colors.model_copy(update={"recipe": {"source": "imagenet-npz"}})
    assert (read(tmp_path / "a", plain) == 255).all()


def test_hidden_entries_do_not_count_and_links_do(tmp_path, colors):
    gray = np.full((8, 8), 9, np.uint8)
    for name in ("1.png", "2.png", "@eaDir/1.png", ".thumbnails/1.png", "__MACOSX/2.png"):
        save(tmp_path / "a", name, gray)
    for name in ("3.png", "4.png", "5.png"):
        save(tmp_path / "elsewhere", name, gray)
    (tmp_path / "a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/more/loop").symlink_to(tmp_path / "a")
    assert len(read(tmp_path / "a", colors)) == 5


def test_an_array_in_fortran_order_is_refused_by_that_name(tmp_path, colors):
    images = np.asfortranarray(np.zeros((10, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "a.npz", images)
    with pytest.raises(UserError, match=r"arr_0 is in Fortran order; save np\.ascontiguousarray"):
        external_images(str(tmp_path / "a.npz"), colors)


def test_the_images_in_memory_are_bounded_by_their_bytes(colors, monkeypatch):
    asked = []

    class Reader:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, ids):
            asked.append(len(ids))
            return torch.empty(0), torch.empty(0)

    monkeypatch.setattr(classifier_features, "ImageReader", Reader)
    first_images("nowhere", colors, "train", 30)
    monkeypatch.setattr(classifier_features, "MAX_BYTES", 10 * 3 * 8 * 8)
    first_images("nowhere", colors, "train", 30)
    assert asked == [30, 10]


def test_samples_that_take_their_classes_in_turn_have_the_error_of_mixed_ones():
    """Blocks assigned by image index would each contain one class, and the error would be far too large."""
    random = torch.Generator().manual_seed(0)
    classes = torch.arange(2000) % 10
    features = torch.eye(10)[classes] * 5 + torch.randn(2000, 10, generator=random)
    real = torch.eye(10)[torch.randint(10, (2000,), generator=random)] * 5 + torch.randn(
        2000, 10, generator=random
    )
    gaussian = Gaussian.of(FeatureMoments.of(real))
    extractor = Extractor("test", "0" * 64, lambda images: (images, None))
    settings = EvaluateSection(metrics=["frechet_distance"])

    def error(rows, in_turn):
        parts, reference = [{"features": rows}], Reference(gaussian, None, "test")
        held_out = [{"features": real}]
        device = torch.device("cpu")
        scores = image_scores(
            parts, held_out, reference, extractor, settings, device, classes_in_turn=in_turn
        )
        return scores["frechet_distance"]["stderr"]

    shuffled = features[torch.randperm(2000, generator=random)]
    expected = error(shuffled, False)
    for in_turn in (True, False):
        assert error(features, in_turn) == pytest.approx(expected, rel=0.1)
