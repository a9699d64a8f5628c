import numpy as np
import pytest
import torch

from fm_core.config.data import DataSection
from fm_core.data.cache import NodeCache
from fm_core.data.dataset_builder import write_dataset
from fm_core.data.manifest import load_manifest
from fm_core.data.reader import ImageReader
from fm_core.data.sampler import GlobalShuffleSampler
from fm_core.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(DataSection(root=str(tmp_path), block_bytes=6400, shard_blocks=3))


def test_images_come_in_the_order_of_the_ids(tmp_path, dataset):
    with ImageReader(str(tmp_path), dataset, "train") as reader:
        images, labels = reader.read(np.arange(len(reader)))
        ids = GlobalShuffleSampler(0, len(reader)).ids(1000, 700)
        shuffled, shuffled_labels = reader.read(ids)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.equal(shuffled, images[ids])
    assert torch.equal(shuffled_labels, labels[ids])


def test_an_id_out_of_range_is_refused(tmp_path, dataset):
    with ImageReader(str(tmp_path), dataset, "val") as reader:
        for wrong in (-1, len(reader)):
            with pytest.raises(IndexError):
                reader.read(np.array([wrong]))


def test_an_unknown_split_is_refused(tmp_path, dataset):
    with pytest.raises(UserError, match="no split 'test', only train, val"):
        ImageReader(str(tmp_path), dataset, "test")


def test_a_shard_that_is_cut_short_is_named(tmp_path, dataset):
    path = tmp_path / "digits/train-000001.tar"
    with ImageReader(str(tmp_path), dataset, "train") as reader:
        reader.read(np.array([300]))
        with path.open("r+b") as file:
            file.truncate(dataset.shards[1].blocks[2].x_offset + 10)
        with pytest.raises(UserError, match=r"train-000001\.tar: shorter"):
            reader.read(np.array([599]))


def test_a_flipped_bit_is_detected_on_reading(tmp_path, dataset):
    path = tmp_path / "digits/train-000001.tar"
    offset = dataset.shards[1].blocks[0].x_offset + 2 * 64 + 5
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with ImageReader(str(tmp_path), dataset, "train") as reader:
        reader.read(np.array([300, 301, 303]))
        with pytest.raises(UserError, match=r"train-000001\.tar: image 302 of train is damaged"):
            reader.read(np.array([302]))


def test_a_missing_shard_is_named(tmp_path, dataset):
    (tmp_path / "digits/val-000000.tar").unlink()
    with (
        ImageReader(str(tmp_path), dataset, "val") as reader,
        pytest.raises(UserError, match=r"val-000000\.tar: No such file"),
    ):
        reader.read(np.array([0]))


def test_remote_shards_are_copied_to_the_node_once_and_checked(tmp_path):
    root = "memory://reader-test"
    write_dataset(DataSection(root=root, block_bytes=6400, shard_blocks=3))
    manifest = load_manifest(root, "digits")
    cache = NodeCache(str(tmp_path))
    with ImageReader(root, manifest, "val", cache) as reader:
        images, _ = reader.read(np.arange(10))
    assert [path.name for path in tmp_path.glob("*.tar")] == [f"{manifest.split_shards('val')[0].sha256}.tar"]
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/reader-test/digits/val-000000.tar", b"overwritten")
    memory.pipe_file("/reader-test/digits/val-000001.tar", b"overwritten")
    with ImageReader(root, manifest, "val", cache) as reader:
        assert torch.equal(reader.read(np.arange(10))[0], images)
        with pytest.raises(UserError, match=r"val-000001\.tar: its SHA-256"):
            reader.read(np.array([400]))
    assert len(list(tmp_path.glob("*.tar"))) == 1
    assert not list(tmp_path.glob("*.partial"))
