import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_core.data.sampler import BlockShuffleSampler
from fm_core.errors import UserError

orders = st.builds(
    BlockShuffleSampler,
    seed=st.integers(0, 100),
    block_images=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    virtual_ranks=st.sampled_from([1, 2, 4, 6]),
    run=st.integers(1, 4),
    window=st.integers(1, 20),
)


@settings(max_examples=60, deadline=None)
@given(order=orders, epoch=st.integers(0, 4))
def test_each_epoch_holds_every_image_once(order, epoch):
    ids = order.ids(epoch * order.images, order.images)
    assert np.array_equal(np.sort(ids), np.arange(order.images))


@settings(max_examples=50, deadline=None)
@given(order=orders, start=st.integers(0, 300), counts=st.lists(st.integers(1, 30), max_size=8))
def test_the_stream_does_not_depend_on_how_it_is_read(order, start, counts):
    expected = order.ids(start, sum(counts))
    pieces, position = [], start
    for count in counts:
        pieces.append(order.ids(position, count))
        position += count
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *pieces]), expected)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_process_needs_few_blocks_at_a_time(ranks):
    """At any time a virtual rank draws from one window: at most three blocks of 64 for a window of two."""
    order = BlockShuffleSampler(seed=0, block_images=[64] * 200, virtual_ranks=8, run=4, window=128)
    batch, share = 32, 32 // ranks
    order.check_world(ranks, batch)
    blocks = [set() for _ in range(ranks)]
    for step in range(4):  # 16 images of each virtual rank: an eighth of a window
        for rank in range(ranks):
            blocks[rank].update(order.ids(step * batch + rank * share, share) // 64)
    assert all(len(ids) <= 3 * 8 // ranks for ids in blocks)
    blocks_per_batch = [
        set(order.ids(p + r * share, share) // 64) for p in range(0, 12_800, batch) for r in [0]
    ]
    assert len(set().union(*blocks_per_batch)) <= 200 // ranks + 8 // ranks + 1


def test_the_blocks_read_at_a_time_are_those_predicted():
    order = BlockShuffleSampler(seed=0, block_images=[64] * 100, virtual_ranks=4, run=4, window=128)
    predicted = list(order.blocks_at_a_time(range(1, 3)))
    steps = np.arange(0, 6400, 16)[:, None] + np.arange(4, 12)  # positions of virtual ranks 1 and 2
    for step, positions in enumerate(steps):
        read = {int(order.ids(position, 1)[0]) // 64 for position in positions}
        assert read <= set(predicted[4 * step // 128].tolist())
    assert max(map(len, predicted)) <= 2 * (2 * 2 + 1)


def test_images_of_a_window_are_shuffled_and_epochs_differ():
    order = BlockShuffleSampler(seed=0, block_images=[64] * 20, virtual_ranks=2, run=8, window=256)
    first, second = order.ids(0, 1280), order.ids(1280, 1280)
    assert not np.array_equal(first, second)
    one_rank = first[(np.arange(1280) // 8) % 2 == 0]
    assert np.mean(np.diff(one_rank) == 1) < 0.1
    assert not np.array_equal(first, BlockShuffleSampler(1, [64] * 20, 2, 8, 256).ids(0, 1280))


def test_the_stream_never_changes_between_versions():
    assert BlockShuffleSampler(3, [4, 5, 6], 2, 2, 4).ids(10, 12).tolist() == [
        3,
        1,
        9,
        10,
        2,
        14,
        2,
        1,
        13,
        5,
        3,
        0,
    ]


def test_a_world_that_does_not_divide_is_refused():
    order = BlockShuffleSampler(seed=0, block_images=[64] * 20, virtual_ranks=8, run=4, window=128)
    for ranks, batch in ((3, 32), (2, 64)):
        with pytest.raises(UserError, match=r"data\.virtual_ranks"):
            order.check_world(ranks, batch)
