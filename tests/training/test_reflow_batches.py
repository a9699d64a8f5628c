"""Batches of pairs: the noise follows the image, everything else the stream position."""

import pytest
import torch

from fm_core.config import MethodSection
from fm_core.data.sampler import GlobalShuffleSampler
from fm_core.method.dequantization import Quantizer
from fm_core.models.build import build_method
from fm_core.storage.keyed_random import CURRENT, Domain, KeyedRandom, Purpose
from fm_core.training.batch_source import BatchSource, PairNoise
from fm_core.training.training_set import training_set
from tests.support.pair_sets import dataset, sample_set
from tests.support.random_checkpoint import CPU, SHAPE

SEED = 5


class Memory:
    """Samples that carry their id in their values, and as their label."""

    image_shape = (1, 2, 2)
    remote = False

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read_into(self, ids, images):
        labels = torch.from_numpy(ids)
        images.copy_(labels.view(-1, 1, 1, 1).expand_as(images))
        return labels


def source(dtype=torch.float32, pairs=True, first=0, generator=CURRENT, label_dropout=0.0, images=30):
    method = build_method(MethodSection(coupling="reflow" if pairs else "independent"))
    reader = Memory(images)
    return BatchSource(
        reader=reader,
        order=GlobalShuffleSampler(SEED, len(reader)),
        quantizer=Quantizer(200),
        path=method.objective.path,
        coupling=method.coupling,
        times=method.times,
        random=KeyedRandom(generator, SEED, Domain.TRAINING),
        flip=False,
        label_dropout=label_dropout,
        null_label=-7,
        pairs=PairNoise(KeyedRandom(generator, 9, Domain.SAMPLES), first, dtype) if pairs else None,
    )


def draw(source, first, global_batch, ranks=1, micro=None):
    """x0, x1, t and labels of a global batch, over all ranks."""
    parts, share = [], global_batch // ranks
    for rank in range(ranks):
        with source.batches(first, global_batch, rank, ranks, micro or share) as batches:
            for _ in range(share // (micro or share)):
                sample, labels = source.draw(next(batches), CPU)
                parts.append([sample.x0, sample.x1, sample.t, labels])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize("generator", ["philox-v1", "numpy-v1"])
@pytest.mark.parametrize("first_index", [0, 100])
def test_the_noise_of_a_pair_is_that_of_its_index_in_every_epoch(generator, first_index):
    noise = KeyedRandom(generator, 9, Domain.SAMPLES).normal(
        Purpose.NOISE, torch.arange(first_index, first_index + 30), (1, 2, 2)
    )
    x0, x1, _, ids = draw(source(generator=generator, first=first_index), 20, 24)  # across an epoch's end
    assert torch.equal(x1[:, 0, 0, 0].long(), ids)
    assert torch.equal(x0, noise[ids])
    assert len(set(ids.tolist())) < 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(("ranks", "micro"), [(2, None), (3, 4), (4, 1), (1, 6)])
def test_any_number_of_processes_has_the_same_pairs(dtype, ranks, micro):
    for one, many in zip(
        draw(source(dtype), 8, 24), draw(source(dtype), 8, 24, ranks=ranks, micro=micro), strict=True
    ):
        assert torch.equal(one, many)


def test_times_order_and_label_dropout_are_keyed_as_without_pairs():
    drawn, usual = (
        draw(source(torch.uint8, pairs=pairs, label_dropout=0.4), 40, 24) for pairs in (True, False)
    )
    for ours, theirs in zip(drawn[1:], usual[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(drawn[0], usual[0])
    assert -7 in drawn[3]


def test_floats_are_used_as_they_are_and_intensity_levels_dequantized():
    (_, floats, _, ids), (_, levels, _, _) = (
        draw(source(torch.float32), 0, 8),
        draw(source(torch.uint8), 0, 8),
    )
    assert torch.equal(floats[:, 0, 0, 0], ids.float())
    assert torch.equal(Quantizer(200).quantize(levels)[:, 0, 0, 0].long(), ids)
    assert levels.unique().numel() == levels.numel()


def test_the_sources_of_a_run_read_the_splits_of_its_sample_set(tmp_path):
    _, config = sample_set(tmp_path)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"global_batch": 4, "label_dropout": 0.5})}
    )
    images = training_set(config, dataset(), build_method(config.method))
    noise = images.pairs.random().normal(Purpose.NOISE, torch.arange(11), SHAPE)
    x0, x1, _, labels = draw(images.training_source(1), 0, 16)
    rows = [int((noise == row).flatten(1).all(1).nonzero()) for row in x0]
    assert sorted(set(rows)) == list(range(9))  # each of the nine training pairs in an epoch, no other
    assert 10 in labels  # the null label of ten classes
    assert x1.dtype == torch.float32
    validation = images.validation_loss(1)
    assert validation.images == 2
    x0, _, _, labels = draw(validation.source, 0, 2)
    assert torch.equal(x0, noise[9:])
    assert 10 not in labels
    assert images.record["pairs"]["validation_images"] == 2
