import math

import pytest
import torch
from torch import nn

from fm_core.config import ModelSection
from fm_core.errors import UserError
from fm_core.models.build import NETWORKS, build_network
from fm_core.models.flops import flops_per_image, parameter_count
from fm_core.models.transformer import (
    Transformer,
    TransformerBlock,
    from_patches,
    modulated_layer_norm,
    sinusoidal_positions,
    to_patches,
)
from tests.support.gradient_checkpointing import backward


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small(**changes):
    options = {"image_size": 8, "image_channels": 1, "patch": 2, "width": 32, "depth": 2, "heads": 2}
    return Transformer(**(options | changes))


def awake(network):
    """The network with every parameter random, so that no zero layer hides the layers before it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def batch(n=3, channels=1, size=8):
    return torch.rand(n), torch.randn(n, channels, size, size)


# Peebles & Xie (2023), Table 4: parameters in millions, and multiply-adds in
# billions, on their 32 x 32 x 4 latents with 1,000 classes.
@pytest.mark.parametrize(
    ("size", "millions", "billions"),
    [
        ("DiT-S/4", 33, 1.41),
        ("DiT-S/2", 33, 6.06),
        ("DiT-B/4", 130, 5.56),
        ("DiT-B/2", 130, 23.01),
        ("DiT-L/4", 458, 19.70),
        ("DiT-L/2", 458, 80.71),
        ("DiT-XL/4", 675, 29.05),
        ("DiT-XL/2", 675, 118.64),
    ],
)
def test_published_sizes_have_the_published_parameters_and_products(size, millions, billions):
    section = ModelSection.model_validate({"size": size, "class_conditional": True})
    with torch.device("meta"):
        network = build_network(section, (4, 32, 32), 1000)
    # The published network has twice the output channels, for variances, and counts the position embedding.
    theirs = section.patch**2 * 4 * (section.width + 1) + (32 // section.patch) ** 2 * section.width
    assert abs((parameter_count(network) + theirs) / 1e6 - millions) < 1
    assert flops_per_image(network, (4, 32, 32)) / 2e9 == pytest.approx(billions, rel=5e-3)


def test_patches_are_squares_in_row_order_and_can_be_inverted():
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    tokens = to_patches(x, 2)
    assert tokens.shape == (2, 4, 12)
    assert tokens[1, 1].view(2, 2, 3)[1, 0].tolist() == x[1, :, 1, 2].tolist()
    assert torch.equal(from_patches(tokens, 2, (3, 4, 4)), x)


def test_positions_distinguish_rows_from_columns():
    features = sinusoidal_positions(4, 16)
    assert features.shape == (16, 16)
    rows, columns = features.view(4, 4, 16).split(8, dim=2)
    assert torch.equal(rows[:, 0], rows[:, 3])
    assert torch.equal(columns[0], columns[3])
    assert rows[2, 0, 1] == pytest.approx(math.sin(2 * 10_000 ** (-1 / 4)))
    assert (torch.cdist(features, features) + torch.eye(16)).min() > 0.1


def test_an_untrained_network_returns_zeros_and_its_blocks_are_the_identity():
    t, x = batch()
    assert torch.equal(small()(t, x), torch.zeros_like(x))
    tokens = torch.randn(2, 4, 32)
    assert torch.equal(TransformerBlock(32, 2)(tokens, torch.randn(2, 32)), tokens)


def test_every_parameter_and_every_input_pixel_and_time_matter():
    network = awake(small(classes=3))
    t, x = batch()
    x.requires_grad_()
    t.requires_grad_()
    network(t, x, torch.tensor([0, 1, 3])).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.abs().min() > 0
    assert t.grad.abs().min() > 0
    assert "positions" not in network.state_dict()


def test_a_block_is_the_formula():
    block = awake(TransformerBlock(8, 2))
    x, conditioning = torch.randn(2, 3, 8), torch.randn(2, 8)
    vector = block.modulation.dense(torch.nn.functional.silu(conditioning))[:, None]
    shift, scale, gate, shift2, scale2, gate2 = vector.split(8, dim=2)

    def norm(h):
        return (h - h.mean(2, keepdim=True)) / (h.var(2, correction=0, keepdim=True) + 1e-6).sqrt()

    q, k, v = block.queries_keys_values(norm(x) * (1 + scale) + shift).split(8, dim=2)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(2)
        heads.append(weights @ v[..., part])
    h = x + gate * block.projection(torch.cat(heads, 2))
    inner = block.inner(norm(h) * (1 + scale2) + shift2)
    gelu = inner * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    torch.testing.assert_close(block(x, conditioning), h + gate2 * block.outer(gelu), rtol=1e-4, atol=1e-4)


def test_none_is_the_null_label_and_labels_change_the_output():
    network = awake(small(classes=10))
    t, x = batch()
    null = network(t, x, torch.full((3,), 10))
    assert torch.equal(network(t, x, None), null)
    assert not torch.allclose(network(t, x, torch.tensor([0, 1, 2])), null, atol=1e-3)
    with pytest.raises(ValueError, match="without classes"):
        small()(t, x, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"patch": 3}, "does not divide"), ({"heads": 3}, "multiple of 4 and of heads"), ({"width": 30}, "4")],
)
def test_sizes_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"images \(1, 8, 8\), these are \(3, 8, 8\)"):
        small()(*batch(channels=3))


def test_checkpointing_changes_memory_and_not_gradients():
    def build(checkpointing):
        return awake(small(gradient_checkpointing=checkpointing))

    given = batch()
    (plain_saved, plain), (saved, checkpointed) = (backward(build, each, given) for each in (False, True))
    assert saved < plain_saved / 2
    torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-5)


def test_bfloat16_weights_keep_time_exact_and_the_output_close():
    network = awake(small()).eval()
    t, x = batch(n=8)
    expected = network(t, x)
    got = network.to(torch.bfloat16)(t, x)
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < 0.05
    near = network(torch.tensor([0.9985]), x[:1]), network(torch.tensor([0.9995]), x[:1])
    assert not torch.equal(*near)


def test_normalization_rounds_once_under_bfloat16():
    x = (100 + torch.randn(2, 5, 64)).to(torch.bfloat16)
    shift, scale = torch.randn(2, 2, 1, 64).to(torch.bfloat16)
    exact = x.double()
    exact = (exact - exact.mean(2, keepdim=True)) / exact.var(2, correction=0, keepdim=True).sqrt()
    y = modulated_layer_norm(x, shift, scale)
    assert y.dtype == torch.bfloat16
    assert (y == (exact * (1 + scale.double()) + shift.double()).to(torch.bfloat16)).float().mean() > 0.99


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_is_one_graph_forward_and_backward(compiler, dtype, checkpointing):
    network = awake(small(classes=3, gradient_checkpointing=checkpointing)).to(dtype).train()
    t, x = batch()
    traced = torch.compile(network, fullgraph=True, backend="aot_eager")
    y = traced(t, x, None)
    plain = network(t, x, None)
    assert (y - plain).norm() / plain.norm() < (1e-5 if dtype == torch.float32 else 0.05)
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_network_of_ones_own_with_one_time_is_built_and_refused_for_two(monkeypatch):
    class OneTime(nn.Module):
        def __init__(self, image_size, image_channels, classes, time_scale, gradient_checkpointing, **sizes):
            super().__init__()
            self.image_size = image_size

    monkeypatch.setitem(NETWORKS, "transformer", OneTime)
    section = ModelSection(kind="transformer")
    assert build_network(section, (1, 8, 8), 0).image_size == 8
    with pytest.raises(UserError, match=r"has one time, and method\.objective needs a network with two"):
        build_network(section, (1, 8, 8), 0, two_times=True)
