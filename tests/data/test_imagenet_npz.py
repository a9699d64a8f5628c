import zipfile
from pathlib import Path

import numpy as np
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import check_source, write_dataset
from fm_core.data.reader import ImageReader
from fm_core.errors import UserError
from tests.support.photographs import NpzFiles


def section(tmp_path, url, size=8, name="tiny", **source):
    chosen = {"allow_partial": True} | source
    return DataSection(
        root=str(tmp_path / "datasets"),
        name=name,
        source=SourceSection(format="imagenet-npz", url=str(url), image_size=size, **chosen),
        block_bytes=4096,
        shard_blocks=2,
    )


def read_all(config, manifest, split):
    with ImageReader(config.root, manifest, split) as reader:
        images, labels = reader.read(np.arange(len(reader)))
    return images.numpy(), labels.numpy()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("labels_last", [False, True])
@pytest.mark.parametrize("packed", ["folder", "stored zip", "deflated zip"])
def test_every_image_and_label_arrives_in_the_order_of_the_batches(tmp_path, packed, compressed, labels_last):
    files = NpzFiles(size=8, batches=10, rows=30)
    options = {"compressed": compressed, "labels_last": labels_last}
    if packed == "folder":
        url = files.write_folder(tmp_path / "source" / "Imagenet8_train_npz", **options).parent
    else:
        method = zipfile.ZIP_STORED if packed == "stored zip" else zipfile.ZIP_DEFLATED
        url = files.write_zips(tmp_path / "source", method, **options)
    config = section(tmp_path, url)
    manifest = write_dataset(config)
    images, labels = read_all(config, manifest, "train")
    expected_images, expected_labels = files.train()
    assert np.array_equal(images, expected_images)
    assert np.array_equal(labels, expected_labels)
    assert np.array_equal(read_all(config, manifest, "val")[0], files.images["val_data"])
    assert manifest.label_order == "imagenet-clsloc"
    assert manifest.splits["train"].class_histogram == tuple(np.bincount(expected_labels, minlength=1000))


def test_zips_and_folders_make_the_same_data_set(tmp_path):
    files = NpzFiles()
    first = write_dataset(section(tmp_path, files.write_folder(tmp_path / "a"), name="a"))
    second = write_dataset(section(tmp_path, files.write_zips(tmp_path / "b"), name="b"))
    assert first.version == second.version


def test_both_parts_of_size_64_are_joined(tmp_path):
    files = NpzFiles(size=64, batches=4, rows=6, val_rows=3)
    config = section(tmp_path, files.write_zips(tmp_path / "source"), size=64)
    images, labels = read_all(config, write_dataset(config), "train")
    assert np.array_equal(images, files.train()[0])
    assert np.array_equal(labels, files.train()[1])


def refusal(config):
    """The one-line error of a source that is refused before anything is written."""
    with pytest.raises(UserError) as caught:
        write_dataset(config)
    assert not (Path(config.root) / config.name / "train-000000.tar").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_error_for_an_empty_folder_says_what_to_put_where(tmp_path):
    config = section(tmp_path, tmp_path / "nothing", size=64, allow_partial=False)
    line = refusal(config)
    assert line.startswith(
        "data.source.url: no Imagenet64_train_part1_npz.zip (or train_data_batch_1.npz) "
        f"under {tmp_path}/nothing"
    )
    with pytest.raises(UserError):
        check_source(config)


def test_a_missing_batch_is_named(tmp_path):
    files = NpzFiles(batches=9)
    line = refusal(section(tmp_path, files.write_folder(tmp_path / "source"), allow_partial=False))
    assert "train_data_batch_10.npz" in line


def test_fewer_images_than_published_are_reported_with_both_counts(tmp_path):
    files = NpzFiles(batches=10, rows=10)
    line = refusal(section(tmp_path, files.write_folder(tmp_path / "source"), allow_partial=False))
    assert "155 train images" in line
    assert "1,281,167" in line


def test_the_wrong_size_is_reported_with_the_shape(tmp_path):
    files = NpzFiles(size=16)
    line = refusal(section(tmp_path, files.write_folder(tmp_path / "source"), size=8))
    assert "[51, 768]" in line
    assert "[n, 192]" in line


def test_labels_from_zero_are_refused(tmp_path):
    files = NpzFiles()
    files.labels["train_data_batch_1"][7] = -1
    line = refusal(section(tmp_path, files.write_folder(tmp_path / "source")))
    assert "labels are 0" in line


@pytest.mark.parametrize("bad_batch", ["train_data_batch_2", "val_data"])
@pytest.mark.parametrize("value", [-1, 1000])
@pytest.mark.parametrize("labels_last", [False, True])
@pytest.mark.parametrize("packed", ["folder", "stored zip", "deflated zip", "pickles"])
def test_a_wrong_label_in_the_last_batch_is_detected_before_anything_is_written(
    tmp_path, packed, labels_last, value, bad_batch
):
    files = NpzFiles()
    files.labels[bad_batch][-1] = value
    options = {"compressed": labels_last, "labels_last": labels_last}
    if packed == "folder":
        url = files.write_folder(tmp_path / "source", **options)
    elif packed == "pickles":
        url = files.write_pickles(tmp_path / "source")
    else:
        method = zipfile.ZIP_STORED if packed == "stored zip" else zipfile.ZIP_DEFLATED
        url = files.write_zips(tmp_path / "source", method, **options)
    line = refusal(section(tmp_path, url))
    assert bad_batch in line
    assert ("labels are 0" if value < 0 else ".. 1001") in line
    assert not (tmp_path / "datasets").exists()


def test_objects_in_an_array_are_never_unpickled(tmp_path):
    files = NpzFiles()
    folder = files.write_folder(tmp_path / "source")
    data = files.images["train_data_batch_1"].reshape(51, -1)
    bombs = np.array([Bomb()] * 51, dtype=object)
    np.savez(folder / "train_data_batch_1.npz", labels=bombs, data=data)
    assert "damaged" in refusal(section(tmp_path, folder))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_batch_leaves_none_of_its_shards_committed(tmp_path, compressed):
    """A zip's CRC is known at its end, when shards of the batch are written already."""
    files = NpzFiles(rows=200)
    folder = files.write_folder(tmp_path / "source", compressed=compressed)
    content = bytearray((folder / "train_data_batch_1.npz").read_bytes())
    content[-3000 if compressed else -9000] ^= 16
    (folder / "train_data_batch_1.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"train_data_batch_1\.npz: damaged or incomplete"):
        write_dataset(section(tmp_path, folder))
    assert not list((tmp_path / "datasets/tiny/commits").glob("train-*"))
