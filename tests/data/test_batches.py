import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_core.config.data import DataSection
from fm_core.data.batches import Batches, BufferPool
from fm_core.data.dataset_builder import write_dataset
from fm_core.data.loader_factories import block_sizes
from fm_core.data.reader import ImageReader
from fm_core.data.sampler import BlockShuffleSampler, GlobalShuffleSampler
from fm_core.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    write_dataset(DataSection(root=str(folder), block_bytes=6400, shard_blocks=3))
    return str(folder)


@pytest.fixture(scope="module")
def manifest(root):
    from fm_core.data.manifest import load_manifest

    return load_manifest(root, "digits")


def full(manifest):
    return GlobalShuffleSampler(5, manifest.splits["train"].images)


def in_blocks(manifest):
    """Twelve virtual ranks, which all the numbers of processes here divide."""
    return BlockShuffleSampler(5, block_sizes(manifest, "train"), virtual_ranks=12, run=1, window=150)


def take(root, manifest, count, order=full, **options):
    with (
        ImageReader(root, manifest, "train") as reader,
        Batches(reader, order(manifest), **options) as batches,
    ):
        return [next(batches) for _ in range(count)]


def stream(root, manifest, position, count, order=full):
    with ImageReader(root, manifest, "train") as reader:
        return reader.read(order(manifest).ids(position, count))


@pytest.mark.parametrize("order", [full, in_blocks])
@settings(max_examples=12, deadline=None)
@given(
    position=st.integers(0, 5000),
    ranks=st.sampled_from([1, 2, 3, 4]),
    micro=st.sampled_from([1, 4]),
    micros=st.integers(1, 3),
)
def test_the_ranks_slices_joined_are_the_stream(root, manifest, order, position, ranks, micro, micros):
    """Equally many batches on every rank, no image left out, whatever the world and micro-batch."""
    share, steps = micro * micros, 3
    got = {}
    for rank in range(ranks):
        options = {"global_batch": share * ranks, "rank": rank, "ranks": ranks, "micro_batch": micro}
        for batch in take(root, manifest, steps * micros, order, position=position, **options):
            got |= dict(zip(batch.positions, zip(batch.images, batch.labels, strict=True), strict=True))
    images, labels = stream(root, manifest, position, share * ranks * steps, order)
    assert sorted(got) == list(range(position, position + len(images)))
    assert torch.equal(torch.stack([got[p][0] for p in sorted(got)]), images)
    assert torch.equal(torch.stack([got[p][1] for p in sorted(got)]), labels)


@pytest.mark.parametrize("order", [full, in_blocks])
def test_a_resumed_stream_goes_on_where_it_ended_on_any_number_of_ranks(root, manifest, order):
    """Two steps of two processes, then two of three; the epoch ends among them."""
    position, expected = 1290, stream(root, manifest, 1290, 48, order)[0]
    parts = [
        take(root, manifest, 2, order, position=first, global_batch=12, rank=rank, ranks=ranks)
        for first, ranks in ((position, 2), (position + 24, 3))
        for rank in range(ranks)
    ]
    got = {batch.first: batch.images for part in parts for batch in part}
    assert torch.equal(torch.cat([got[first] for first in sorted(got)]), expected)


def test_a_batch_holds_what_is_sent_to_the_device_and_nothing_else(root, manifest):
    """Of each image its pixels, and 16 bytes: its label, and the position of its noise."""
    (batch,) = take(root, manifest, 1, position=60, global_batch=8)
    parts, sizes = [], {"images": 64, "labels": 8, "noise_positions": 8}
    batch.map(lambda part: parts.append(part) or part)
    assert sum(part.nbytes for part in parts) == 8 * sum(sizes.values())
    assert {name: getattr(batch, name).nbytes // 8 for name in sizes} == sizes
    assert batch.images.dtype == torch.uint8
    assert batch.endpoints is None
    assert batch.noise_positions.tolist() == list(batch.positions) == list(range(60, 68))


def test_sizes_that_do_not_divide_are_refused(root, manifest):
    for sizes in ({"global_batch": 10, "ranks": 3}, {"global_batch": 12, "ranks": 3, "micro_batch": 3}):
        with pytest.raises(UserError, match=r"train\.global_batch"):
            take(root, manifest, 1, position=0, **sizes)


def test_what_goes_wrong_while_reading_ahead_is_raised_here(root, manifest):
    class Broken:
        def ids(self, position, count):
            return np.arange(count) if position < 20 else np.array([10**6])

    with ImageReader(root, manifest, "train") as reader:
        batches = Batches(reader, Broken(), position=0, global_batch=10, ahead=2)
        assert [next(batches).first for _ in range(2)] == [0, 10]
        for _ in range(2):  # and again: a consumer that swallows it does not hang
            with pytest.raises(IndexError):
                next(batches)
        batches.close()


def test_memory_is_reused_only_when_the_batch_is_released():
    buffers = BufferPool()
    first = buffers.take((4, 3))
    second = buffers.take((4, 3))
    assert first.data_ptr() != second.data_ptr()
    view, place = first[1:], first.data_ptr()
    del first
    third = buffers.take((2, 6))
    assert third.data_ptr() not in (place, second.data_ptr())
    assert view.numpy() is not None
    del view
    assert buffers.take((4, 3)).data_ptr() == place


def test_retained_batches_keep_their_images(root, manifest):
    batches = take(root, manifest, 60, position=0, global_batch=16)
    images, _ = stream(root, manifest, 0, 960)
    assert torch.equal(torch.cat([batch.images for batch in batches]), images)


def test_closing_ends_the_thread_while_it_waits(root, manifest):
    with ImageReader(root, manifest, "train") as reader:
        batches = Batches(reader, GlobalShuffleSampler(0, len(reader)), position=0, global_batch=8, ahead=1)
        next(batches)
        batches.close()
        assert not batches._thread.is_alive()
