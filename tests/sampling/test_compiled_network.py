"""Compiled and bfloat16 networks give the same velocity field up to rounding."""

from functools import partial

import pytest
import torch

from fm_core.config import SampleSection
from fm_core.method.ode import Solver, solve
from fm_core.models.mlp import MLP
from fm_core.models.unet import UNet
from fm_core.sampling.compiled_network import Compiled, accelerated


def awake():
    torch.manual_seed(0)
    network = MLP(width=32)
    torch.nn.init.normal_(network.last.weight, std=0.3)
    return network.eval().requires_grad_(False)


def solved(network, n):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    return solve(lambda t, x: network(t.expand(len(x)), x), x, (0.0, 1.0), Solver("midpoint", steps=8)).x


def test_nothing_is_done_unless_it_is_asked_for():
    network = awake()
    assert accelerated(network, SampleSection()) is network
    assert network.first.weight.dtype == torch.float32


def test_bfloat16_weights_leave_the_state_float32_and_the_result_close():
    plain = solved(awake(), 16)
    fast = solved(accelerated(awake(), SampleSection(precision="bf16")), 16)
    assert fast.dtype == torch.float32
    assert not torch.equal(fast, plain)
    torch.testing.assert_close(fast, plain, rtol=0.02, atol=0.02)


@pytest.fixture
def compiled_network():
    """A network whose first call runs the C++ compiler."""
    return accelerated(awake(), SampleSection(compile=True, batch=16))


def test_a_compiled_network_gives_the_same_result_and_compiles_one_shape(compiled_network):
    network = compiled_network
    assert isinstance(network, Compiled)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(solved(network, 16), solved(awake(), 16), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(solved(network, 5), solved(awake(), 5), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_unet_with_attention_is_one_graph_in_either_precision(compiler, monkeypatch, precision):
    """The network is traced without code generation; `fullgraph` raises for any graph break."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    made = UNet(
        image_size=8,
        image_channels=1,
        channels=8,
        channel_multipliers=(1, 2),
        residual_blocks=1,
        attention_resolutions=(4,),
        head_channels=8,
        dropout=0.0,
        scale_shift=True,
        resample_with_residual_blocks=True,
    ).eval()
    for weight in made.requires_grad_(False).parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    t, x = torch.rand(2), torch.randn(2, 1, 8, 8)
    plain = made(t, x)
    fast = accelerated(made, SampleSection(compile=True, batch=2, precision=precision))
    torch._dynamo.utils.counters.clear()
    accelerated_output = fast(t, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert accelerated_output.dtype == torch.float32
    within = 1e-5 if precision == "fp32" else 0.1
    assert (accelerated_output - plain).norm() / plain.norm() < within
