"""sample.store: floats beside the intensity levels, as complete, verified and resumable as those."""

import json

import pytest
import torch

from fm_core.data.sample_shard import SampleShard
from fm_core.method.dequantization import Quantizer
from fm_core.sampling.checkpoint_source import load_model, weights_file
from fm_core.sampling.generate import generate
from fm_core.sampling.sample_protocol import draw_of, protocol_of, sample_key
from tests.support.random_checkpoint import CPU, SHAPE, checkpoint, config_at, make, pixels, samples_of


@pytest.fixture
def float_config(tmp_path):
    config = config_at(tmp_path, store="float32")
    checkpoint(config)
    return config


def floats(samples, number):
    """The stored floats of a batch, [n, C, H, W]."""
    record = samples.shard(number).floats
    start = record.block.x_offset
    content = samples.store.read_range(record.name, start, start + record.block.x_bytes)
    return torch.frombuffer(bytearray(content), dtype=getattr(torch, record.dtype)).view(-1, *SHAPE)


def test_without_the_key_protocol_key_and_sidecar_are_those_of_earlier_versions(config):
    samples = make(config)
    assert "store" not in samples.protocol
    # As computed by commit 177aabd for this protocol.
    protocol = protocol_of(config, "0" * 64, "philox-v1")
    assert sample_key(config, protocol) == "ema-euler-3-da574c"
    record = json.loads(samples.store.read_bytes("samples-000000.json"))
    assert "floats" not in record
    assert set(SampleShard.model_fields) - set(record) == {"floats"}
    assert not [name for name in samples.store.sizes() if name.startswith("floats")]


def test_the_floats_are_the_ends_of_the_trajectories_and_the_pixels_their_levels(float_config):
    samples = make(float_config)
    assert samples.key != samples_of(config_at(float_config.run.root)).key
    model = load_model(weights_file(float_config, 7), CPU)
    for number in range(samples.batches):
        first, count = samples.extent(number)
        stored = floats(samples, number)
        assert torch.equal(stored, generate(model, draw_of(float_config), first, count, CPU).ends)
        assert torch.equal(Quantizer(17).quantize(stored), samples.read_batch(number, SHAPE))
        assert not torch.equal(Quantizer(17).scale(samples.read_batch(number, SHAPE)), stored)


def test_the_pixels_are_those_of_a_set_without_floats(float_config):
    assert torch.equal(pixels(make(float_config)), pixels(make(config_at(float_config.run.root))))


def test_float16_rounds_them(float_config):
    half = make(config_at(float_config.run.root, store="float16"))
    assert torch.equal(floats(half, 0), floats(make(float_config), 0).half())


def test_two_ranks_write_the_same_bytes(float_config):
    samples = make(float_config)
    alone = hashes(samples)
    for name in alone:
        samples.store.remove(name)
    make(float_config, ranks=2)
    assert hashes(samples) == alone
    assert [name for name in alone if name.startswith("floats")]


def hashes(samples):
    return {name: samples.store.sha256(name) for name in samples.store.sizes() if name != "status.json"}


def damage(samples, name):
    content = bytearray(samples.store.read_bytes(name))
    content[2000] ^= 1
    samples.store.write_bytes(name, bytes(content))


@pytest.mark.parametrize(
    "harm",
    [
        lambda samples: samples.store.remove("floats-000001.tar"),
        lambda samples: samples.store.write_bytes("floats-000001.tar", b"short"),
        lambda samples: damage(samples, "floats-000001.tar"),
    ],
    ids=["missing", "truncated", "damaged"],
)
def test_a_batch_without_its_floats_is_generated_again(float_config, harm):
    samples = make(float_config)
    before = samples.store.sha256("floats-000001.tar")
    harm(samples)
    assert samples_of(float_config).problems() == [1]
    again = samples_of(float_config)
    for number in again.problems():
        again.remove(number)
    assert not make(float_config).problems()
    assert samples.store.sha256("floats-000001.tar") == before


def test_a_sidecar_without_the_floats_of_the_request_does_not_count(float_config):
    samples = make(float_config)
    record = json.loads(samples.store.read_bytes("samples-000002.json"))
    del record["floats"]
    samples.store.write_bytes("samples-000002.json", json.dumps(record).encode())
    assert samples_of(float_config).problems() == [2]
