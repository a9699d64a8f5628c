"""Networks with two times: JVPs against finite differences in float64, and the start from one time."""

import pytest
import torch

from fm_core.method.forward_derivative import derivative_along
from fm_core.models.mlp import MLP
from fm_core.models.transformer import Transformer
from fm_core.models.unet import UNet

UNET = {
    "image_size": 8,
    "image_channels": 1,
    "channels": 8,
    "channel_multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
    "dropout": 0.0,
    "scale_shift": True,
    "resample_with_residual_blocks": False,
}
TRANSFORMER = {"image_size": 8, "image_channels": 1, "patch": 2, "width": 16, "depth": 2, "heads": 2}
NETWORKS = {
    "unet": lambda **keys: UNet(**UNET, **keys),
    "unet with resampling blocks": lambda **keys: UNet(
        **{**UNET, "resample_with_residual_blocks": True, "scale_shift": False}, **keys
    ),
    "transformer": lambda **keys: Transformer(**TRANSFORMER, **keys),
    "mlp": lambda **keys: MLP(64, 16, 3, **keys),
}
networks = pytest.mark.parametrize("name", NETWORKS)
SHAPE = (2, 1, 8, 8)


def built(name, **keys):
    torch.manual_seed(0)
    keys = {"classes": 3, **keys} if name == "mlp" else {"classes": 3, "time_scale": 5.0, **keys}
    return NETWORKS[name](**keys)


def randomized(network):
    """Every weight random, so that no layer is initialized to zero."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x, direction = torch.randn(2, *SHAPE, dtype=dtype, generator=generator)
    t, s = torch.tensor([0.2, 0.5], dtype=dtype), torch.tensor([0.7, 0.6], dtype=dtype)
    return t, s, x, direction, torch.tensor([1, 3])


@networks
def test_the_jvp_equals_finite_differences(name):
    network = randomized(built(name, two_times=True)).double().train()
    t, s, x, direction, label = inputs()
    derivative = derivative_along(network.forward, t, s, x, direction, label)
    step = 1e-5
    with torch.no_grad():
        after = network(t + step, x + step * direction, label, s)
        before = network(t - step, x - step * direction, label, s)
    difference = (after - before) / (2 * step)
    assert difference.abs().max() > 1e-2
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-6 * float(difference.abs().max()))


@networks
def test_no_gradient_is_recorded_and_parameters_need_none(name):
    network = randomized(built(name, two_times=True))
    t, s, x, direction, label = inputs(torch.float32)
    assert not derivative_along(network.forward, t, s, x, direction, label).requires_grad
    frozen = network.requires_grad_(False)
    assert torch.isfinite(derivative_along(frozen.forward, t, s, x, direction, label)).all()


@networks
def test_a_network_started_from_one_time_is_the_same_for_every_second_time(name):
    teacher = randomized(built(name))
    student = built(name, two_times=True)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected
    assert all("second_time" in parameter for parameter in missing)
    t, s, x, _, label = inputs(torch.float32)
    expected = teacher(t, x, label)
    for second in (None, t, s):
        torch.testing.assert_close(student(t, x, label, second), expected, rtol=0, atol=0)
    # Its second time receives gradients from the first step on.
    student(t, x, label, s).square().mean().backward()
    outer = [parameter for key, parameter in student.named_parameters() if "second_time" in key][-2]
    assert outer.grad.abs().max() > 0


@networks
def test_the_second_time_matters_once_it_is_trained(name):
    network = randomized(built(name, two_times=True))
    t, s, x, _, label = inputs(torch.float32)
    assert (network(t, x, label, s) - network(t, x, label, t)).abs().max() > 1e-3
    torch.testing.assert_close(network(t, x, label), network(t, x, label, t), rtol=0, atol=0)


@networks
def test_a_second_time_for_a_network_with_one_is_refused(name):
    t, s, x, _, label = inputs(torch.float32)
    with pytest.raises(ValueError, match="one time"):
        built(name)(t, x, label, s)
