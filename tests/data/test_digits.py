import numpy as np
import pytest
from sklearn.datasets import load_digits

from fm_core.config.data import DataSection
from fm_core.data.dataset_builder import check_source, write_dataset
from fm_core.data.manifest import load_manifest
from fm_core.data.reader import ImageReader
from fm_core.errors import UserError


def read_all(root, split):
    manifest = load_manifest(str(root), "digits")
    with ImageReader(str(root), manifest, split) as reader:
        images, labels = reader.read(np.arange(len(reader)))
    return images.numpy(), labels.numpy()


def test_the_splits_are_disjoint_and_hold_every_digit(tmp_path):
    manifest = write_dataset(DataSection(root=str(tmp_path), validation_images=300))
    assert manifest.levels == 17
    assert manifest.image_shape == (1, 8, 8)
    assert (manifest.splits["train"].images, manifest.splits["val"].images) == (1497, 300)
    train, train_labels = read_all(tmp_path, "train")
    val, val_labels = read_all(tmp_path, "val")
    got = sorted(
        (*image.ravel(), label)
        for image, label in zip([*train, *val], [*train_labels, *val_labels], strict=True)
    )
    digits = load_digits()
    real = sorted(
        (*image.astype(int).ravel(), label) for image, label in zip(digits.images, digits.target, strict=True)
    )
    assert got == real


def test_the_split_depends_only_on_its_seed(tmp_path):
    section = DataSection(root=str(tmp_path / "a"), split_seed=3)
    write_dataset(section)
    write_dataset(section.model_copy(update={"root": str(tmp_path / "b")}))
    write_dataset(section.model_copy(update={"root": str(tmp_path / "c"), "split_seed": 4}))
    first = read_all(tmp_path / "a", "val")[0]
    assert np.array_equal(first, read_all(tmp_path / "b", "val")[0])
    assert not np.array_equal(first, read_all(tmp_path / "c", "val")[0])


def test_the_manifest_has_the_moments_of_the_images(tmp_path):
    manifest = write_dataset(DataSection(root=str(tmp_path), block_bytes=2048, shard_blocks=3))
    images, labels = read_all(tmp_path, "train")
    split = manifest.splits["train"]
    assert split.channel_mean == pytest.approx((images.mean(),), rel=1e-12)
    assert split.channel_std == pytest.approx((images.std(),), rel=1e-12)
    assert split.class_histogram == tuple(np.bincount(labels, minlength=10))


def test_more_validation_images_than_digits_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.validation_images: 1797"):
        check_source(DataSection(root=str(tmp_path), validation_images=1797))
