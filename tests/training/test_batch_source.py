import hashlib
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch

from fm_core.config import MethodSection, TrainSection
from fm_core.data.sampler import GlobalShuffleSampler
from fm_core.errors import UserError
from fm_core.method.couplings import Coupling
from fm_core.method.dequantization import Quantizer
from fm_core.models.build import build_method
from fm_core.storage.keyed_random import CURRENT, Domain, GeneratorName, KeyedRandom
from fm_core.training.batch_source import BatchSource, ambient_seed
from fm_core.training.engine import micro_batch_of
from fm_core.training.lr_schedule import crossed

CPU = torch.device("cpu")


couplings = pytest.mark.parametrize("coupling", ["independent", "minibatch-optimal-transport"])
generators = pytest.mark.parametrize("generator", get_args(GeneratorName))


class Memory:
    """Images that carry their id in their pixels, and as their label."""

    def __init__(self, count: int) -> None:
        values = torch.arange(count)
        pixels = torch.stack([values % 16, values // 16 % 16, values // 256, torch.zeros_like(values)], 1)
        self.pixels, self.labels = pixels.to(torch.uint8).view(-1, 1, 2, 2), values

    def __len__(self):
        return len(self.labels)

    image_shape = (1, 2, 2)
    remote = False

    def read(self, ids):
        index = torch.from_numpy(ids)
        return self.pixels[index], self.labels[index]

    def read_into(self, ids, images):
        images.copy_(self.read(ids)[0])
        return self.read(ids)[1]


def draw(source, first, count):
    """Points of stream positions first, first + 1, ..."""
    with source.batches(first, count, 0, 1, count) as batches:
        return source.draw(next(batches), CPU)


def source(coupling="independent", seed=3, flip=True, images=300, label_dropout=0.0, generator=CURRENT):
    method = build_method(
        MethodSection.model_validate(
            {"coupling": coupling, "coupling_options": {"block": 4} if coupling != "independent" else {}}
        )
    )
    reader = Memory(images)
    return BatchSource(
        reader=reader,
        order=GlobalShuffleSampler(seed, len(reader)),
        quantizer=Quantizer(17),
        path=method.objective.path,
        coupling=method.coupling,
        times=method.times,
        random=KeyedRandom(generator, seed, Domain.TRAINING),
        flip=flip,
        label_dropout=label_dropout,
        null_label=-7,
    )


def parts(drawn):
    sample, labels = drawn
    return [sample.x0, sample.x1, sample.x_t, sample.velocity, sample.t, labels]


def joined(draws):
    return [torch.cat(column) for column in zip(*(parts(draw) for draw in draws), strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("micro", [1, 2, None])
def test_the_batches_of_all_ranks_are_the_global_batch_in_order(ranks, micro):
    share = 24 // ranks
    micro = micro if micro and share % micro == 0 else share
    covered = []
    for rank in range(ranks):
        with source().batches(1000, 24, rank, ranks, micro) as batches:
            mine = [next(batches).positions for _ in range(share // micro)]
        assert {len(positions) for positions in mine} == {micro}
        covered += [position for positions in mine for position in positions]
    assert covered == list(range(1000, 1024))


@couplings
@generators
@pytest.mark.parametrize("cuts", [[4] * 6, [8, 4, 12], [12, 12]])
def test_draws_are_the_same_to_the_bit_however_the_batch_is_cut(coupling, cuts, generator):
    undivided = parts(draw(source(coupling, generator=generator), 280, 24))  # across an epoch's end, at 300
    pieces, first = [], 280
    for count in cuts:
        pieces.append(draw(source(coupling, generator=generator), first, count))
        first += count
    for a, b in zip(undivided, joined(pieces), strict=True):
        assert torch.equal(a, b)


RECORDED = {
    # SHA-256 of x0, x1, x_t, velocity, t and the labels, as computed by commit b4d34e4
    "independent": "49fe2e57753f6d14 f6edf4b597aeb97c fc5d7e13c51bbdcb 770b031ebc82a234 164de53514b44436 "
    "06415cc27270c55a",
    "minibatch-optimal-transport": "57b5d5473a45db79 f6edf4b597aeb97c 92e4ab7b8de1b8fc d3c4b408dbb9b428 "
    "164de53514b44436 06415cc27270c55a",
}


@couplings
def test_a_run_of_an_earlier_version_gets_the_bits_that_it_always_got(coupling):
    drawn = parts(draw(source(coupling, label_dropout=0.3, generator="numpy-v1"), 290, 24))
    digests = [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest()[:16] for part in drawn]
    assert digests == RECORDED[coupling].split()


@generators
def test_a_coupling_permutes_positions_of_noise_and_nothing_else(generator):
    independent, paired = (
        source(c, generator=generator) for c in ("independent", "minibatch-optimal-transport")
    )
    with independent.batches(8, 12, 0, 1, 12) as one, paired.batches(8, 12, 0, 1, 12) as other:
        plain, batch = next(one), next(other)
    assert sorted(batch.noise_positions.tolist()) == list(batch.positions) != batch.noise_positions.tolist()
    assert torch.equal(batch.images, plain.images)
    (unpaired, _), (sample, _) = independent.draw(plain, CPU), paired.draw(batch, CPU)
    assert torch.equal(sample.x0, unpaired.x0[batch.noise_positions - 8])
    assert torch.equal(sample.x1, unpaired.x1)
    assert torch.equal(sample.t, unpaired.t)
    distances = [(ends.x1 - ends.x0).square().sum() for ends in (sample, unpaired)]
    assert distances[0] < distances[1]


def test_only_the_earlier_generator_draws_in_the_loaders_thread():
    for generator, ahead in (("philox-v1", False), ("numpy-v1", True)):
        for coupling in ("independent", "minibatch-optimal-transport"):
            with source(coupling, generator=generator).batches(0, 8, 0, 1, 8) as batches:
                assert (next(batches).endpoints is not None) is ahead


class Reversed(Coupling):
    """As a user would write it: `pair` alone."""

    name = "reversed"

    def pair(self, x0, x1, label=None):
        return x0.flip(0), x1, label


class Shifted(Coupling):
    name = "shifted"

    def pair(self, x0, x1, label=None):
        return x0 + 1, x1, label


@generators
def test_a_coupling_of_a_user_may_reorder_noise_but_not_change_it(generator):
    user = source(generator=generator)
    plain = draw(user, 4, 6)[0]
    user.coupling = Reversed()
    assert torch.equal(draw(user, 4, 6)[0].x0, plain.x0.flip(0))
    user.coupling = Shifted()
    with pytest.raises(UserError, match=r"^shifted: .* may only reorder it$"):
        draw(user, 4, 6)


def test_held_out_images_have_other_noise_than_the_first_training_images():
    training, held_out = source(seed=0, flip=False), source(seed=0, flip=False)
    held_out.random = KeyedRandom(CURRENT, 0, Domain.HELD_OUT)
    ends, others = (draw(one, 0, 64)[0] for one in (training, held_out))
    assert not torch.isin(ends.x0, others.x0).any()
    assert not torch.isin(ends.t, others.t).any()


def test_every_epoch_draws_afresh_and_shows_every_image_once():
    one, two = (joined([draw(source(flip=False), first, 300)]) for first in (0, 300))
    for epoch in (one, two):
        assert sorted(epoch[5].tolist()) == list(range(300))
    assert not torch.equal(one[5], two[5])
    order = [torch.argsort(epoch[5]) for epoch in (one, two)]
    for column in (0, 1, 4):  # the same image has other noise, other dequantization, another time
        assert not torch.equal(one[column][order[0]], two[column][order[1]])
    # In the same bin, though.
    assert torch.equal(Quantizer(17).quantize(one[1][order[0]]), Quantizer(17).quantize(two[1][order[1]]))


def test_the_seed_moves_everything():
    one, two = (parts(draw(source(seed=seed), 0, 64)) for seed in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert not torch.equal(a, b)


def test_purposes_do_not_share_their_randomness():
    sample, _ = draw(source(flip=False), 0, 4096)
    noise = sample.x0.flatten(1)[:, 0]
    dither = (sample.x1.flatten(1)[:, 3] + 1) * 8.5
    for a, b in ((noise, sample.t), (noise, dither), (dither, sample.t)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 64


def test_labels_are_dropped_by_stream_position_and_nothing_else_moves():
    shown, hidden = (draw(source(label_dropout=share), 100, 2000) for share in (0.0, 0.2))
    for a, b in zip(parts(shown)[:-1], parts(hidden)[:-1], strict=True):
        assert torch.equal(a, b)
    dropped = hidden[1] == -7
    assert 0.17 < dropped.double().mean() < 0.23
    assert torch.equal(hidden[1][~dropped], shown[1][~dropped])
    assert torch.equal(draw(source(label_dropout=0.2), 700, 500)[1], hidden[1][600:1100])


def test_half_of_the_images_are_flipped_and_only_when_asked():
    ids = source().order.ids(0, 300)
    plain = Memory(300).read(ids)[0]
    quantized = Quantizer(17).quantize(draw(source(flip=True), 0, 300)[0].x1)
    asymmetric = (plain != plain.flip(-1)).flatten(1).any(1)
    flipped = (quantized == plain.flip(-1)).flatten(1).all(1)[asymmetric]
    assert ((quantized == plain).flatten(1).all(1)[asymmetric] | flipped).all()
    assert 0.35 < flipped.double().mean() < 0.65
    unflipped = Quantizer(17).quantize(draw(source(flip=False), 0, 300)[0].x1)
    assert torch.equal(unflipped, plain)


def test_the_ambient_seed_is_a_function_of_seed_and_position():
    seeds = {ambient_seed(seed, position) for seed in range(4) for position in range(0, 4096, 128)}
    assert len(seeds) == 4 * 32
    assert all(0 <= value < 2**63 for value in seeds)
    assert ambient_seed(1, 128) == ambient_seed(1, 128)


@pytest.mark.parametrize(
    ("keys", "ranks", "micro"),
    [
        ({"global_batch": 128}, 2, 64),
        ({"global_batch": 128, "micro_batch": 16}, 4, 16),
        ({"global_batch": 128, "micro_batch": 128}, 2, 64),
        ({"global_batch": 6}, 6, 1),
    ],
)
def test_the_micro_batch_is_the_share_unless_it_is_named(keys, ranks, micro):
    assert micro_batch_of(TrainSection.model_validate(keys), ranks) == micro


@pytest.mark.parametrize(
    ("keys", "ranks", "named"),
    [
        ({"global_batch": 128}, 3, ["train.global_batch 128", "3 processes"]),
        ({"global_batch": 2}, 4, ["train.global_batch 2", "4 processes"]),
        ({"global_batch": 128, "micro_batch": 48}, 2, ["train.micro_batch 48", "64 images"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_in_one_line(keys, ranks, named):
    with pytest.raises(UserError) as caught:
        micro_batch_of(TrainSection.model_validate(keys), ranks)
    assert "\n" not in str(caught.value)
    for text in named:
        assert text in str(caught.value)


@pytest.mark.parametrize("batch", [16, 24, 100])
@pytest.mark.parametrize("every", [1, 16, 50, 64, 1000])
def test_an_interval_is_crossed_once_for_every_multiple_that_a_step_can_see(batch, every):
    crossings = [seen for seen in range(batch, 3000, batch) if crossed(every, seen, batch)]
    steps_between = {(b - a) // batch for a, b in pairwise(crossings)}
    assert steps_between <= {max(1, every // batch), -(-every // batch)}
    assert all(
        any(multiple % every == 0 for multiple in range(seen - batch + 1, seen + 1)) for seen in crossings
    )
