import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_core.data.sampler import GlobalShuffleSampler


@given(seed=st.integers(0, 2**31 - 1), images=st.integers(1, 200), epoch=st.integers(0, 5))
def test_each_epoch_holds_every_image_once(seed, images, epoch):
    ids = GlobalShuffleSampler(seed, images).ids(epoch * images, images)
    assert np.array_equal(np.sort(ids), np.arange(images))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 100),
    images=st.integers(1, 60),
    start=st.integers(0, 500),
    batches=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 12)), min_size=1, max_size=12),
)
def test_the_stream_is_the_same_for_every_world_and_batch_size(seed, images, start, batches):
    """For any world sizes and batches, the concatenated slices of the ranks are the same stream."""
    expected = GlobalShuffleSampler(seed, images).ids(start, sum(world * local for world, local in batches))
    seen, position = [], start
    for world, local in batches:
        for rank in range(world):  # a fresh order each, as after a restart
            seen.append(GlobalShuffleSampler(seed, images).ids(position + rank * local, local))
        position += world * local
    assert np.array_equal(np.concatenate(seen), expected)


def test_epochs_and_seeds_give_different_orders():
    first = GlobalShuffleSampler(0, 1000).ids(0, 2000)
    assert not np.array_equal(first[:1000], first[1000:])
    assert not np.array_equal(first, GlobalShuffleSampler(1, 1000).ids(0, 2000))


def test_the_stream_never_changes_between_versions():
    assert GlobalShuffleSampler(7, 10).ids(5, 15).tolist() == [2, 7, 5, 9, 0, 3, 9, 1, 6, 2, 5, 4, 8, 0, 7]


def test_resuming_in_the_middle_of_imagenet_computes_one_epoch():
    sampler = GlobalShuffleSampler(0, 1_281_167)
    assert len(sampler.ids(10**11, 256)) == 256
    assert sampler._permutation.cache_info().misses == 1


@pytest.mark.parametrize(("position", "count"), [(-1, 1), (0, -1)])
def test_a_negative_position_or_count_is_refused(position, count):
    with pytest.raises(ValueError, match="must not be negative"):
        GlobalShuffleSampler(0, 5).ids(position, count)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        GlobalShuffleSampler(0, 0)
