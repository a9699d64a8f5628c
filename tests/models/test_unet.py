import math

import pytest
import torch
import torch.nn.functional as F

from fm_core.models.blocks import Attention, ResidualBlock
from fm_core.models.layers import Conv2d, GroupNorm32, group_count, timestep_embedding
from fm_core.models.unet import UNet
from tests.support.gradient_checkpointing import backward

PAPER = {
    "cifar10": (32, 256, (1, 2, 2, 2), 2, (16,)),
    "imagenet32": (32, 256, (1, 2, 2, 2), 3, (16, 8)),
    "imagenet64": (64, 192, (1, 2, 3, 4), 3, (32, 16, 8)),
    "imagenet128": (128, 256, (1, 1, 2, 3, 4), 3, (32, 16, 8)),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small_unet(**changes):
    options = {
        "image_size": 8,
        "image_channels": 1,
        "channels": 8,
        "channel_multipliers": (1, 2),
        "residual_blocks": 1,
        "attention_resolutions": (4,),
        "head_channels": 8,
        "dropout": 0.0,
        "scale_shift": True,
        "resample_with_residual_blocks": True,
        "classes": 0,
    }
    return UNet(**(options | changes))


def awake(network, seed=0):
    """The network with every parameter random, so that no zero layer hides the layers before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def batch(n=3, channels=1, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator), torch.randn(n, channels, size, size, generator=generator)


@pytest.mark.parametrize(
    ("name", "flags", "millions"),
    [
        ("cifar10", True, 171.3),
        ("imagenet32", True, 228.1),
        ("imagenet64", True, 295.1),
        ("imagenet128", True, 542.8),
        ("cifar10", False, 142.9),
        ("imagenet32", False, 196.1),
        ("imagenet64", False, 264.9),
        ("imagenet128", False, 485.0),
    ],
)
def test_paper_sizes_have_the_paper_parameter_counts(name, flags, millions):
    size, channels, multipliers, blocks, attention = PAPER[name]
    with torch.device("meta"):
        network = UNet(size, 3, channels, multipliers, blocks, attention, 64, 0.0, flags, flags)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_the_largest_paper_network_runs_from_end_to_end_in_shape():
    size, channels, multipliers, blocks, attention = PAPER["imagenet128"]
    with torch.device("meta"):
        network = UNet(size, 3, channels, multipliers, blocks, attention, 64, 0.0, True, True)
        y = network(torch.zeros(2), torch.zeros(2, 3, size, size))
    assert y.shape == (2, 3, size, size)


def test_an_untrained_network_returns_zeros_and_its_blocks_are_the_identity():
    t, x = batch()
    assert torch.equal(small_unet()(t, x), torch.zeros_like(x))
    h, vector = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    assert torch.equal(ResidualBlock(8, 8, 32, 0.0, True)(h, vector), h)
    assert torch.equal(Attention(8, 4)(h, vector), h)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resample_with_residual_blocks", [True, False])
def test_every_parameter_and_every_input_pixel_and_time_matter(scale_shift, resample_with_residual_blocks):
    network = awake(
        small_unet(
            scale_shift=scale_shift,
            resample_with_residual_blocks=resample_with_residual_blocks,
            channel_multipliers=(1, 2, 2),
        )
    )
    t, x = batch()
    x.requires_grad_()
    t.requires_grad_()
    network(t, x).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.abs().min() > 0
    assert t.grad.abs().min() > 0


def test_skip_connections_carry_detail_around_the_middle():
    network = awake(small_unet(residual_blocks=2))
    network.middle.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))
    t, x = batch()
    assert (network(t, x) - network(t, x + 0.1)).abs().amin(dim=(1, 2, 3)).min() > 1e-4


def test_images_of_a_batch_do_not_influence_one_another():
    network = awake(small_unet())
    t, x = batch(n=4)
    assert torch.allclose(network(t, x)[1:2], network(t[1:2], x[1:2]), atol=1e-5)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_has_the_shape_and_dtype_of_the_images(size, channels):
    network = awake(small_unet(image_size=size, image_channels=channels, attention_resolutions=(size // 2,)))
    t, x = batch(channels=channels, size=size)
    y = network(t, x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype


def test_none_is_the_null_label_and_labels_change_the_output():
    network = awake(small_unet(classes=10))
    t, x = batch()
    null = network(t, x, torch.full((3,), 10))
    assert torch.equal(network(t, x, None), null)
    assert not torch.allclose(network(t, x, torch.tensor([0, 1, 2])), null, atol=1e-3)


def test_labels_for_a_network_without_classes_are_refused():
    t, x = batch()
    with pytest.raises(ValueError, match="without classes"):
        small_unet()(t, x, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 12, "channel_multipliers": (1, 1, 1, 1)}, "multiple of 8"),
        ({"attention_resolutions": (5,)}, r"\[5\] are not among"),
        ({"head_channels": 7}, "must divide 16"),
        ({"channel_multipliers": ()}, "at least one resolution"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_unet(**changes)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"images \(1, 8, 8\), these are \(3, 8, 8\)"):
        small_unet()(*batch(channels=3))


def test_checkpointing_changes_memory_and_not_gradients():
    def build(checkpointing):
        return awake(small_unet(gradient_checkpointing=checkpointing, dropout=0.3))

    given = batch()
    (plain_saved, plain), (saved, checkpointed) = (backward(build, each, given) for each in (False, True))
    assert saved < plain_saved / 2
    torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_only():
    network = awake(small_unet(dropout=0.5))
    t, x = batch()
    assert not torch.equal(network.train()(t, x), network(t, x))
    assert torch.equal(network.eval()(t, x), network(t, x))


def test_bfloat16_weights_keep_time_exact_and_the_output_close():
    network = awake(small_unet(channels=16)).eval()
    t, x = batch(n=8)
    expected = network(t, x)
    got = network.to(torch.bfloat16)(t, x)
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < 0.05
    # Two times that are equal in bfloat16.
    near = network(torch.tensor([0.9985]), x[:1]), network(torch.tensor([0.9995]), x[:1])
    assert not torch.equal(*near)


def test_normalization_rounds_once_under_bfloat16():
    norm, scale, shift = GroupNorm32(8).to(torch.bfloat16), torch.randn(2, 8), torch.randn(2, 8)
    x = (100 + torch.randn(2, 8, 16, 16)).to(torch.bfloat16)
    y = norm(x, scale, shift, activate=True)
    exact = F.group_norm(x.double(), 2) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    assert y.dtype == torch.bfloat16
    assert (y == F.silu(exact).to(torch.bfloat16)).float().mean() > 0.99


def test_scale_and_shift_follow_the_normalization():
    norm, x = GroupNorm32(8), torch.randn(2, 8, 4, 4)
    scale, shift = torch.randn(2, 8), torch.randn(2, 8)
    expected = F.group_norm(x, 2) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    assert torch.allclose(norm(x, scale, shift), expected, atol=1e-5)
    assert torch.allclose(norm(x, scale, shift, activate=True), F.silu(expected), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 20, 32, 48, 96, 192, 576, 1024])
def test_group_count_divides_the_channels(channels):
    groups = group_count(channels)
    assert channels % groups == 0
    assert 1 <= groups <= 32
    assert groups == 1 or channels // groups >= 4


def test_group_count_is_32_at_the_paper_widths():
    assert {group_count(192 * n) for n in range(1, 9)} | {group_count(256 * n) for n in range(1, 9)} == {32}


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_convolution_is_torchs_with_its_weight_stored_channels_last(kernel, stride):
    ours = Conv2d(5, 7, kernel=kernel, stride=stride)
    assert ours.weight.shape == (7, kernel, kernel, 5)
    assert ours.weight.is_contiguous()
    theirs = torch.nn.Conv2d(5, 7, kernel, stride=stride, padding=kernel // 2)
    bound = 1 / math.sqrt(5 * kernel * kernel)
    assert 0.9 * bound < ours.weight.abs().max() <= bound
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.permute(0, 3, 1, 2))
        theirs.bias.copy_(ours.bias)
    x = torch.randn(2, 5, 8, 8)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_attention_is_the_softmax_formula():
    block = awake(Attention(8, 4))
    x = torch.randn(2, 8, 3, 5)
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    query, key, value = block.queries_keys_values(tokens).chunk(3, dim=2)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        weights = (query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(4)).softmax(dim=2)
        heads.append(weights @ value[..., part])
    expected = x + block.projection(torch.cat(heads, dim=2)).transpose(1, 2).reshape(x.shape)
    assert torch.allclose(block(x, torch.zeros(2, 1)), expected, atol=1e-5)


def test_the_time_embedding_scales_t_by_a_thousand():
    features = timestep_embedding(torch.tensor([0.25]), 8)[0]
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    assert torch.allclose(features[:4], torch.cos(250 * frequencies), atol=1e-5)
    assert torch.allclose(features[4:], torch.sin(250 * frequencies), atol=1e-5)
    assert timestep_embedding(torch.tensor([0.25]), 7).shape == (1, 7)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_is_one_graph_forward_and_backward(compiler, dtype, checkpointing):
    # torch.compile's tracing without its code generation, which takes minutes and adds little here.
    network = awake(small_unet(classes=3, gradient_checkpointing=checkpointing)).to(dtype).train()
    t, x = batch()
    traced = torch.compile(network, fullgraph=True, backend="aot_eager")
    y = traced(t, x, None)
    plain = network(t, x, None)
    assert (y - plain).norm() / plain.norm() < (1e-5 if dtype == torch.float32 else 0.05)
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
