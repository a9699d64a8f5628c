import pytest
import torch
from torch import nn

from fm_core.models.blocks import Attention, ResidualBlock
from fm_core.models.flops import flops_per_image, parameter_count
from fm_core.models.layers import Conv2d, Linear
from fm_core.models.mlp import MLP
from fm_core.models.unet import UNet


class OnImages(nn.Module):
    """A block as a network."""

    def __init__(self, block, conditioning=None):
        super().__init__()
        self.block, self.conditioning = block, conditioning

    def forward(self, t, x, label=None):
        if self.conditioning is None:
            return self.block(x)
        return self.block(x, x.new_zeros(len(x), self.conditioning))


@pytest.mark.parametrize(
    ("network", "shape", "products"),
    [
        (OnImages(Conv2d(3, 5)), (3, 8, 6), 8 * 6 * 3 * 5 * 9),
        (OnImages(Conv2d(3, 5, stride=2)), (3, 8, 6), 4 * 3 * 3 * 5 * 9),
        (OnImages(Linear(7, 4)), (7,), 7 * 4),
        # queries, keys and values; two products of pixels with pixels; projection
        (OnImages(Attention(8, 4), 1), (8, 4, 4), 16 * 8 * 24 + 2 * 16 * 16 * 8 + 16 * 8 * 8),
        (
            OnImages(ResidualBlock(4, 6, 10, 0.1, True, "down"), 10),
            (4, 8, 8),
            16 * 9 * (4 * 6 + 6 * 6) + 10 * 12 + 16 * 4 * 6,
        ),
        (MLP(width=16, layers=3), (2,), 3 * 16 + 2 * 16 * 16 + 16 * 2),
    ],
    ids=["convolution", "strided", "dense", "attention", "residual", "mlp"],
)
def test_counts_are_those_by_hand(network, shape, products):
    assert flops_per_image(network, shape) == 2 * products


def test_the_count_does_not_depend_on_the_device_of_the_network_and_does_not_change_it():
    sizes = (8, 1, 8, (1, 2), 1, (4,), 8, 0.1, True, True)
    network = UNet(*sizes, classes=3, gradient_checkpointing=True)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    with torch.device("meta"):
        elsewhere = UNet(*sizes, classes=3)
    assert flops_per_image(network, (1, 8, 8)) == flops_per_image(elsewhere, (1, 8, 8)) > 0
    assert network.training
    assert all(torch.equal(before[name], weight) for name, weight in network.state_dict().items())
    assert parameter_count(network) == parameter_count(elsewhere)


def test_the_imagenet_network_of_the_reference_takes_219_gigaflops():
    # Its class-conditional ImageNet-64 network, counted independently: 295.9 M parameters, 219.3 GFLOPs.
    with torch.device("meta"):
        network = UNet(64, 3, 192, (1, 2, 3, 4), 3, (32, 16, 8), 64, 0.0, True, True, classes=1000)
    assert round(parameter_count(network) / 1e6, 1) == 295.9
    assert flops_per_image(network, (3, 64, 64)) == pytest.approx(219.3e9, rel=1e-3)
