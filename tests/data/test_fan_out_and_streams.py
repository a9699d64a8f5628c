import numpy as np
import pytest
from photographs import NpzFiles

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.fan_out import begin_dataset, finish_dataset, write_named_part
from fm_core.data.order import StreamOrder
from fm_core.data.shards import write_dataset
from fm_core.data.streams import make_cache, make_order
from fm_core.errors import UserError


@pytest.fixture
def config(tmp_path):
    folder = NpzFiles(size=8, batches=3, rows=60).write_folder(tmp_path / "source")
    source = SourceSection(format="imagenet-npz", url=str(folder), image_size=8, allow_partial=True)
    return DataSection(root=str(tmp_path), name="a", source=source, block_bytes=4096, shard_blocks=2)


def test_parts_written_anywhere_in_any_order_make_the_same_data_set(config):
    parts = begin_dataset(config)
    assert parts == ["train_data_batch_1", "train_data_batch_2", "train_data_batch_3", "val_data"]
    with pytest.raises(UserError, match="shards are not written"):
        finish_dataset(config)
    seen = []
    assert write_named_part(config, parts[2], seen.append) == 63
    assert seen[-1] == 63
    assert begin_dataset(config) == [parts[0], parts[1], parts[3]]
    for part in reversed(parts):
        write_named_part(config, part)
    assert write_named_part(config, parts[2]) == 0
    manifest = finish_dataset(config)
    assert begin_dataset(config) == []
    assert finish_dataset(config) == manifest
    assert manifest.version == write_dataset(config.model_copy(update={"name": "b"})).version


def test_the_configuration_chooses_the_order(config):
    manifest = write_dataset(config)
    full = make_order(config, manifest, "train", seed=3, global_batch=8, ranks=2)
    images = manifest.splits["train"].images
    assert np.array_equal(full.ids(5, 20), StreamOrder(3, images).ids(5, 20))
    blocks = config.model_copy(update={"order": "blocks", "virtual_ranks": 4, "window_blocks": 1})
    order = make_order(blocks, manifest, "train", seed=3, global_batch=8, ranks=2)
    assert np.array_equal(np.sort(order.ids(0, images)), np.arange(images))
    with pytest.raises(UserError, match=r"data\.virtual_ranks"):
        make_order(blocks, manifest, "train", seed=3, global_batch=8, ranks=3)
    with pytest.raises(UserError, match=r"train\.global_batch 6 is no multiple of 4"):
        make_order(blocks, manifest, "train", seed=3, global_batch=6, ranks=1)


def test_a_cache_too_small_for_a_full_permutation_is_refused(config):
    remote = config.model_copy(update={"root": "memory://streams", "cache_bytes": 2**20})
    manifest = write_dataset(remote)
    big = manifest.model_copy(
        update={"shards": tuple(s.model_copy(update={"bytes": 2**20}) for s in manifest.shards)}
    )
    with pytest.raises(UserError, match=r"data\.cache_bytes.*data\.order blocks"):
        make_cache(remote, big)
    assert make_cache(remote.model_copy(update={"order": "blocks"}), big).limit_bytes == 2**20
