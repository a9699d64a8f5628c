import numpy as np
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data import parallel_sharding
from fm_core.data.dataset_builder import write_dataset
from fm_core.data.loader_factories import check_streams, make_cache, make_order
from fm_core.data.parallel_sharding import begin_dataset, finish_dataset, write_piece
from fm_core.data.sampler import GlobalShuffleSampler
from fm_core.data.shard_plan import make_plan
from fm_core.errors import UserError
from tests.support.photographs import NpzFiles


@pytest.fixture
def config(tmp_path):
    folder = NpzFiles(size=8, batches=3, rows=60).write_folder(tmp_path / "source")
    source = SourceSection(format="imagenet-npz", url=str(folder), image_size=8, allow_partial=True)
    return DataSection(root=str(tmp_path), name="a", source=source, block_bytes=4096, shard_blocks=2)


def test_pieces_written_anywhere_in_any_order_make_the_same_data_set(config):
    work = begin_dataset(config)
    assert [piece.images for piece in work.pieces] == [61, 62, 63, 20]  # batches are read from the beginning
    assert work.images == 206
    with pytest.raises(UserError, match="shards are not written"):
        finish_dataset(config)
    seen = []
    assert write_piece(config, work.pieces[2].shards, seen.append) == 63
    assert seen[-1] == 63
    assert work.written() == 63
    assert begin_dataset(config).pieces == [work.pieces[0], work.pieces[1], work.pieces[3]]
    for piece in reversed(work.pieces):
        write_piece(config, piece.shards)
    assert write_piece(config, work.pieces[2].shards) == 0
    assert work.written() == work.images
    manifest = finish_dataset(config)
    assert begin_dataset(config) is None
    assert finish_dataset(config) == manifest
    assert manifest.version == write_dataset(config.model_copy(update={"name": "b"})).version


def test_a_part_with_random_access_is_distributed_by_shards(tmp_path, monkeypatch):
    """As the plain stage does it: images in folders are one part, and not the work of one process."""
    monkeypatch.setattr(parallel_sharding, "MAX_PIECES", 3)
    config = DataSection(root=str(tmp_path), block_bytes=6400, shard_blocks=3)  # five shards and two
    pieces = begin_dataset(config).pieces
    assert [piece.name for piece in pieces] == [
        "train-000000 to train-000002",
        "train-000003 to val-000000",
        "val-000001",
    ]
    monkeypatch.setattr(parallel_sharding, "MAX_PIECES", 256)
    assert [piece.images for piece in begin_dataset(config).pieces] == [300, 300, 300, 300, 97, 300, 200]


def test_a_piece_skips_what_another_one_wrote_meanwhile(tmp_path, monkeypatch):
    config = DataSection(root=str(tmp_path), block_bytes=6400, shard_blocks=3)
    shards = begin_dataset(config).pieces[0].shards + begin_dataset(config).pieces[1].shards
    meanwhile = []

    def on_images(done):
        if not meanwhile:
            meanwhile.append(write_piece(config, shards[1:]))

    assert write_piece(config, shards, on_images) == 300
    assert meanwhile == [300]


def test_a_process_lists_the_source_once_for_all_its_pieces(config, monkeypatch):
    plans = []
    monkeypatch.setattr(parallel_sharding, "make_plan", lambda data: plans.append(data) or make_plan(data))
    pieces = begin_dataset(config).pieces
    plans.clear()
    for piece in pieces:
        write_piece(config, piece.shards)
    assert len(plans) == 1


def test_the_configuration_chooses_the_order(config):
    manifest = write_dataset(config)
    full = make_order(config, manifest, "train", seed=3, global_batch=8, ranks=2)
    images = manifest.splits["train"].images
    assert np.array_equal(full.ids(5, 20), GlobalShuffleSampler(3, images).ids(5, 20))
    blocks = config.model_copy(update={"order": "blocks", "virtual_ranks": 4, "window_blocks": 1})
    order = make_order(blocks, manifest, "train", seed=3, global_batch=8, ranks=2)
    assert np.array_equal(np.sort(order.ids(0, images)), np.arange(images))
    with pytest.raises(UserError, match=r"data\.virtual_ranks"):
        make_order(blocks, manifest, "train", seed=3, global_batch=8, ranks=3)
    with pytest.raises(UserError, match=r"train\.global_batch 6 is not a multiple of 4"):
        make_order(blocks, manifest, "train", seed=3, global_batch=6, ranks=1)


def test_a_cache_too_small_for_a_full_permutation_is_refused(config):
    remote = config.model_copy(update={"root": "memory://streams", "cache_bytes": 2**20})
    manifest = write_dataset(remote)
    big = manifest.model_copy(
        update={"shards": tuple(s.model_copy(update={"bytes": 2**20}) for s in manifest.shards)}
    )
    with pytest.raises(UserError, match=r"data\.cache_bytes.*data\.order blocks"):
        make_cache(remote, big)
    twice = big.model_copy(update={"shards": big.shards[:1] * 2})
    assert make_cache(remote, twice).limit_bytes == 2**20
    blocks = remote.model_copy(update={"order": "blocks"})
    assert make_cache(blocks, big).limit_bytes == 2**20
    with pytest.raises(UserError, match=r"data\.cache_bytes: 1048575 bytes do not hold one shard"):
        make_cache(blocks.model_copy(update={"cache_bytes": 2**20 - 1}), big)


def test_a_cache_too_small_for_the_windows_of_a_host_is_refused_before_a_process_starts(config):
    """Four virtual ranks, two windows of one block each: fewer on each host, the more hosts there are."""
    remote = config.model_copy(
        update={"root": "memory://windows", "order": "blocks", "virtual_ranks": 4, "window_blocks": 1}
    )
    manifest = write_dataset(remote.model_copy(update={"shard_blocks": 1}))
    shards = manifest.split_shards("train")
    everything = sum(shard.bytes for shard in shards)

    def check(limit, here):
        limited = remote.model_copy(update={"cache_bytes": limit, "shard_blocks": 1})
        check_streams(limited, manifest, seed=0, global_batch=8, ranks=4, ranks_here=here)

    check(everything, 4)
    with pytest.raises(UserError, match=r"data\.cache_bytes: .* that 4 processes of a host read at a time"):
        check(everything - 1, 4)
    check(5 * max(shard.bytes for shard in shards), 1)
    with pytest.raises(UserError, match=r"data\.virtual_ranks"):
        check_streams(remote, manifest, seed=0, global_batch=8, ranks=3, ranks_here=3)
