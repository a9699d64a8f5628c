"""Converted weights compute what independent implementations with the public layouts compute."""

import argparse
import io
import re

import pytest
import torch
from safetensors.torch import save

from fm_core.models.dit_weights import from_dit, transformer_keys
from fm_core.models.layers import timestep_embedding
from fm_core.models.published_weights import convert_published, embedding_of_steps, read_tensors
from tests.support.public_layouts import PublicTransformer
from tests.support.published_networks import (
    CLASSES,
    public_transformer,
    public_unet,
    relative,
    transformer,
    unet,
)

PRECISION = {torch.float32: 1e-5, torch.float64: 1e-11}
precisions = pytest.mark.parametrize("dtype", PRECISION, ids=str)


def exact_positions(network):
    """The network in float64 with positions of that precision; the stored ones are float32."""
    network.double()
    side, quarter = network.image_shape[1] // network.patch, network.positions.shape[1] // 4
    frequency = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    table = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = table.repeat_interleave(side, 0), table.repeat(side, 1)
    assert (torch.cat([rows, columns], 1) - network.positions).abs().max() < 1e-5
    network.positions.copy_(torch.cat([rows, columns], 1))
    return network


@precisions
@pytest.mark.parametrize("variances", [True, False], ids=["variances", "means"])
@pytest.mark.parametrize("source", ["sit", "dit"])
def test_a_transformer_computes_what_sit_and_dit_compute(source, variances, dtype):
    theirs = public_transformer(variances, dtype)
    network = transformer(1.0 if source == "sit" else 1000.0).to(dtype)
    if dtype == torch.float64:
        network = exact_positions(network)
    network.load_state_dict(convert_published(theirs.state_dict(), network, source))
    x = torch.randn(4, 4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([0, 1, 437, 999])
    t = (
        torch.tensor([0.0, 0.3, 0.97, 1.0], dtype=dtype)
        if source == "sit"
        else 1 - (steps.double() + 1) / 1000
    )
    label = torch.tensor([0, 2, 4, CLASSES])
    with torch.no_grad():
        expected = theirs(x, (t if source == "sit" else steps).to(dtype), label)[:, :4]
        actual = network(t.to(dtype), x, label)
        assert expected.std() > 0.1
        # 1000 t in float32 has an error of 3e-5, which the time embedding sees.
        assert relative(actual, expected) < PRECISION[dtype] * (5 if source == "dit" else 1)
        # A wrong direction of time, and rows taken for columns, are seen.
        assert relative(network(1 - t.to(dtype), x, label), expected) > 1e-3
        assert relative(network(t.to(dtype), x.transpose(2, 3), label), expected) > 1e-3


@pytest.mark.parametrize(
    ("order", "updown", "dtype"),
    [
        ("new", True, torch.float64),
        ("legacy", False, torch.float64),
        ("new", True, torch.float32),
    ],
)
def test_a_unet_computes_what_adm_computes(order, updown, dtype):
    theirs = public_unet(128, order, updown, dtype)
    network = unet(128, updown).to(dtype)
    network.load_state_dict(convert_published(theirs.state_dict(), network, "adm", order))
    x = torch.randn(3, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    steps, label = torch.tensor([0, 437, 999]), torch.tensor([0, 2, 4])
    with torch.no_grad():
        expected = theirs(x, steps.to(dtype), label)[:, :3]
        actual = network((1 - (steps.double() + 1) / 1000).to(dtype), x, label)
        assert relative(actual, expected) < PRECISION[dtype] * 5
        # A wrong direction of time is seen.
        assert relative(network((steps / 1000).to(dtype), x, label), expected) > 1e-3


def test_a_unet_with_other_groups_is_refused():
    # 128 channels are the least with 32 groups here, as in the public networks.
    with pytest.raises(ValueError, match="16 groups and the public networks have 32"):
        convert_published(public_unet(64).state_dict(), unet(64), "adm")


def test_features_of_ddpms_steps_are_a_rotation_of_those_of_t():
    weight = torch.randn(7, 10, dtype=torch.float64)
    steps = torch.arange(-1, 1000, 77, dtype=torch.float64)
    t = 1 - (steps.double() + 1) / 1000
    expected = timestep_embedding(steps, 10, scale=1.0) @ weight.T
    actual = timestep_embedding(t, 10, scale=1000.0) @ embedding_of_steps(weight).T
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def test_the_sizes_of_a_published_transformer_are_in_its_shapes():
    with torch.device("meta"):
        weights = PublicTransformer(8, 4, 4, 768, 12, 12, 1000, True).state_dict()
    keys = transformer_keys(weights)
    assert keys["model"] == {
        "kind": "transformer",
        "patch": 4,
        "width": 768,
        "depth": 12,
        "heads": 12,
        "class_conditional": True,
    }
    assert (keys["image_shape"], keys["classes"]) == ((4, 8, 8), 1000)
    with pytest.raises(ValueError, match="no published network has width 32 and 2 blocks; give its heads"):
        transformer_keys(public_transformer().state_dict())
    assert transformer_keys(public_transformer().state_dict(), 2)["model"]["heads"] == 2
    with pytest.raises(ValueError, match=r"^heads 6: .* width 768 and 12 blocks has 12; leave heads out$"):
        transformer_keys(weights, 6)


def changed(**tensors):
    weights = {**public_transformer().state_dict(), **tensors}
    return {name: value for name, value in weights.items() if value is not None}


@pytest.mark.parametrize(
    ("weights", "network", "message"),
    [
        (
            changed(**{"blocks.1.attn.qkv.bias": None}),
            {},
            r"^blocks\.1\.attn\.qkv\.bias is missing; it should be \[96\]$",
        ),
        (changed(extra=torch.zeros(1)), {}, r"^extra has no place in this network$"),
        (
            changed(),
            {"width": 64},
            r"^x_embedder\.proj\.weight is \[32, 4, 2, 2\], and this network needs \[64, 4, 2, 2\]$",
        ),
        (changed(), {"depth": 3}, r"^blocks\.2\.adaLN_modulation\.1\.weight is missing"),
        (changed(), {"depth": 1}, r"^blocks\.1\.adaLN_modulation\.1\.bias has no place"),
        (
            changed(),
            {"classes": 9},
            r"^y_embedder\.embedding_table\.weight is \[6, 32\], .* needs \[10, 32\]$",
        ),
        (
            changed(),
            {"image_size": 16},
            r"^pos_embed is \[1, 16, 32\], and this network needs \[1, 64, 32\]$",
        ),
        (
            changed(pos_embed=torch.zeros(1, 16, 32)),
            {},
            r"^pos_embed differs from the sinusoidal embedding by 1$",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name_and_what_was_expected(weights, network, message):
    with pytest.raises(ValueError, match=message):
        from_dit(weights, transformer(**network))


@pytest.mark.parametrize(
    ("source", "network", "message"),
    [
        (None, transformer(), "the names of DiT and SiT; train.init_source must be sit or dit, not None"),
        ("adm", transformer(), "the names of DiT and SiT; train.init_source must be sit or dit, not adm"),
        ("sit", transformer(1000.0), "sit needs model.time_scale 1, not 1000"),
        ("dit", transformer(), "dit needs model.time_scale 1000, not 1"),
        ("sit", unet(32), "its tensors are those of DiT and SiT; it needs model.kind transformer"),
    ],
)
def test_a_source_that_cannot_be_right_is_refused_with_what_would_be(source, network, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_published(public_transformer().state_dict(), network, source)


def test_dropped_variances_are_reported(caplog):
    convert_published(public_transformer(False).state_dict(), transformer(), "sit")
    assert caplog.text == ""
    convert_published(public_transformer(True).state_dict(), transformer(), "sit")
    assert "the output channels for variances were dropped" in caplog.text


def test_a_table_without_the_null_label_gets_a_row_of_zeros():
    weights = changed()
    name = "y_embedder.embedding_table.weight"
    state = from_dit({**weights, name: weights[name][:-1]}, transformer())
    label = state["conditioning.label.weight"]
    assert torch.equal(label[:-1], weights[name][:-1])
    assert torch.equal(label[-1], torch.zeros(32))


class Marker:
    """A class that a pickle must not create."""


class TestFiles:
    def content(self, value):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    def test_the_average_of_a_training_checkpoint_is_taken(self):
        stored = {
            "model": {"w": torch.zeros(1)},
            "ema": {"w": torch.ones(1)},
            "opt": {"state": {}},
            "args": argparse.Namespace(model="SiT-XL/2"),
        }
        assert read_tensors(self.content(stored), "0400000.pt") == {"w": torch.ones(1)}
        del stored["ema"]
        assert read_tensors(self.content(stored), "0400000.pt") == {"w": torch.zeros(1)}
        wrapped = {"module.w": torch.ones(1)}
        assert read_tensors(self.content(wrapped), "x.pth") == {"w": torch.ones(1)}
        assert read_tensors(save(wrapped), "x.safetensors") == wrapped

    @pytest.mark.parametrize("stored", [{"w": Marker()}, [torch.zeros(1)], {"w": 1}])
    def test_files_with_code_or_without_tensors_are_refused_in_one_line(self, stored):
        with pytest.raises(ValueError, match=r"Marker|no dictionary of tensors") as refusal:
            read_tensors(self.content(stored), "x.pt")
        assert "\n" not in str(refusal.value)

    def test_a_damaged_file_is_refused_in_one_line(self):
        content = self.content({"w": torch.zeros(100)})
        for damaged in (content[:200], b"", b"not a file of torch"):
            with pytest.raises(ValueError) as refusal:  # noqa: PT011
                read_tensors(damaged, "x.pt")
            assert "\n" not in str(refusal.value)
