"""Sample sets as pairs: what is read, and which sets are refused before anything is spent."""

import json

import numpy as np
import pytest
import torch

from fm_core.data.loader_factories import make_order
from fm_core.data.reader import ImageReader
from fm_core.data.sample_pairs import open_pairs
from fm_core.errors import UserError
from fm_core.storage.keyed_random import Purpose
from tests.support.pair_sets import dataset, sample_set, student
from tests.support.random_checkpoint import SHAPE, config_at, pixels


@pytest.fixture
def made(tmp_path):
    return sample_set(tmp_path)


def opened(config, manifest=None, generator="philox-v1", conditional=True):
    return open_pairs(config.data, manifest or dataset(), generator, conditional)


def read(pairs, config, split):
    section = pairs.section(config.data)
    with ImageReader(section.root, pairs.manifest, split, dtype=pairs.dtype) as reader:
        return reader.read(np.arange(len(reader)))


@pytest.mark.parametrize("store", ["float32", "float16", "uint8"])
def test_both_splits_are_the_samples_in_the_order_of_their_indices(tmp_path, store):
    """11 samples in tars of 4: the boundary between the splits, at 9, is inside of the last tar."""
    samples, config = sample_set(tmp_path, store=store)
    pairs = opened(config)
    (train, train_labels), (val, val_labels) = (read(pairs, config, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (9, 2)
    assert (pairs.first_index("train"), pairs.first_index("val")) == (0, 9)
    images = torch.cat([train, val])
    assert images.dtype == getattr(torch, store)
    if store == "uint8":
        assert torch.equal(images, pixels(samples))
    else:
        levels = torch.floor((images.float() + 1) * 17 / 2).clamp(0, 16).to(torch.uint8)
        assert (levels == pixels(samples)).float().mean() > (0.999 if store == "float32" else 0.9)
    labels = torch.cat([samples.read_labels(number) for number in range(3)])
    assert torch.equal(torch.cat([train_labels, val_labels]), labels)


def test_the_noise_is_that_of_the_sampler_by_index(made):
    from fm_core.sampling.checkpoint_source import load_model, weights_file
    from fm_core.sampling.sample_protocol import draw_of

    samples, config = made
    own = config_at(config.run.root, seed=3)
    model = load_model(weights_file(own, 7), torch.device("cpu"))
    expected = draw_of(own).noise(model, [10, 2, 5])
    noise = opened(config).random().normal(Purpose.NOISE, torch.tensor([10, 2, 5]), SHAPE)
    assert torch.equal(noise, expected)
    assert opened(config).record["protocol"] == samples.protocol


def test_a_folder_above_the_only_set_will_do(made):
    samples, config = made
    for above in (samples.store.url.rpartition("/")[0], samples.store.url.rsplit("/", 2)[0]):
        assert opened(student(config, above)).store.url == samples.store.url


def test_pairs_can_be_read_in_the_order_of_blocks(made):
    _, config = made
    data = config.data.model_copy(update={"order": "blocks", "virtual_ranks": 2, "window_blocks": 1})
    order = make_order(data, opened(config).manifest, "train", 0, 4, 2)
    assert sorted(order.ids(0, 9)) == list(range(9))


def test_a_tenth_of_the_pairs_is_for_validation_by_default(made):
    _, config = made
    pairs = config.data.pairs.model_copy(update={"validation_images": None})
    data = config.data.model_copy(update={"pairs": pairs})
    splits = open_pairs(data, dataset(), "philox-v1").manifest.splits
    assert {name: split.images for name, split in splits.items()} == {"train": 7, "val": 4}


def test_without_validation_pairs_all_are_trained_on(made):
    _, config = made
    pairs = config.data.pairs.model_copy(update={"validation_images": 0})
    data = config.data.model_copy(update={"pairs": pairs})
    assert list(open_pairs(data, dataset(), "philox-v1").manifest.splits) == ["train"]


def refused(action):
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


def edit(samples, change):
    done = json.loads(samples.store.read_bytes("DONE.json"))
    change(done)
    samples.store.write_bytes("DONE.json", json.dumps(done).encode())


def flip(samples, name):
    """Change one byte of the first image."""
    content = bytearray(samples.store.read_bytes(name))
    content[700] ^= 1
    samples.store.write_bytes(name, bytes(content))


HARMS = {
    "incomplete": (lambda samples: samples.store.remove("DONE.json"), "is not complete; run fm sample first"),
    "no JSON": (lambda samples: samples.store.write_bytes("DONE.json", b"{"), "DONE.json is damaged"),
    "no batches": (lambda samples: edit(samples, lambda done: done.pop("shards")), "DONE.json is damaged"),
    "a batch is not listed": (
        lambda samples: edit(samples, lambda done: done["shards"].pop(1)),
        "lists 4 of 11 images",
    ),
    "schema": (lambda samples: edit(samples, lambda done: done.update(schema=2)), "schema 2"),
    "stochastic": (
        lambda samples: edit(
            samples, lambda done: done["protocol"].update(solver="sde", stochastic={"scale": 1})
        ),
        "of the stochastic solver sde",
    ),
    "another generator": (
        lambda samples: edit(samples, lambda done: done["protocol"].pop("generator")),
        "set run.generator: numpy-v1",
    ),
    "an unknown generator": (
        lambda samples: edit(samples, lambda done: done["protocol"].update(generator="mt19937")),
        "generator 'mt19937' of another version",
    ),
    "missing": (lambda samples: samples.store.remove("floats-000001.tar"), "floats-000001.tar is missing"),
    "truncated": (
        lambda samples: samples.store.write_bytes("floats-000002.tar", b"short"),
        "floats-000002.tar is missing or damaged",
    ),
    "damaged": (
        lambda samples: flip(samples, "floats-000000.tar"),
        "floats-000000.tar is missing or damaged",
    ),
}


@pytest.mark.parametrize(("harm", "message"), HARMS.values(), ids=HARMS)
def test_a_set_that_cannot_be_trained_on_is_refused_in_one_line(made, harm, message):
    samples, config = made
    opened(config).check_files()
    harm(samples)
    assert message in refused(lambda: opened(config).check_files())


def test_hashes_can_be_left_out_but_not_sizes(made):
    samples, config = made
    flip(samples, "floats-000000.tar")
    opened(config).check_files(hashes=False)
    samples.store.write_bytes("floats-000000.tar", b"short")
    refused(lambda: opened(config).check_files(hashes=False))


def test_the_tars_that_are_not_read_may_be_removed(made):
    samples, config = made
    samples.store.remove("samples-000000.tar")
    opened(config).check_files()


def test_another_data_set_resolution_or_missing_classes_are_refused(made):
    _, config = made
    assert "trained on version" in refused(lambda: opened(config, dataset(levels=16)))
    assert "are not of the 3 x 32 x 32 values" in refused(lambda: opened(config, dataset((3, 32, 32))))
    assert "11 pairs" in refused(
        lambda: opened(student(config, config.data.pairs.samples, data={"pairs": {"validation_images": 11}}))
    )


def test_samples_of_an_unconditional_model_have_no_classes_to_train_on(made):
    samples, config = made

    def without_labels(done):
        for shard in done["shards"]:
            for record in (shard, shard["floats"]):
                record["block"].update(y_offset=None, y_bytes=None)

    edit(samples, without_labels)
    assert "have no classes" in refused(lambda: opened(config))
    assert opened(config, conditional=False).manifest.splits["train"].images == 9


def test_two_sets_or_none_below_a_folder_are_refused(tmp_path, made):
    samples, config = made
    above = samples.store.url.rsplit("/", 2)[0]
    samples.store.below("../another").write_bytes("samples-000000.tar", b"")
    assert "there are 2 sample sets (step-00000007/" in refused(lambda: opened(student(config, above)))
    assert "there is no sample set" in refused(lambda: opened(student(config, str(tmp_path / "empty"))))


def test_damage_that_is_found_while_reading_names_the_command_that_repairs_it(made):
    samples, config = made
    pairs = opened(config)
    flip(samples, "floats-000000.tar")
    message = refused(lambda: read(pairs, config, "train"))
    assert "floats-000000.tar: image " in message
    assert message.endswith("is damaged or missing; run fm sample")
    samples.store.remove("floats-000000.tar")
    assert "run fm sample to write it again" in refused(lambda: read(pairs, config, "train"))
