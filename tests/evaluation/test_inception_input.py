"""Resizing of other programs, compared with independent implementations, and the spatial layer of sFID.

pytorch-fid and clean-fid are not installed. Their resizing is compared with the formula, implemented here,
and with Pillow, which clean-fid calls.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fm_core.evaluation.features.inception_input import (
    INPUTS,
    SIDE,
    InceptionVariant,
    pillow_bicubic,
    torch_bilinear,
)


class Branches(nn.Module):
    """Substitute for Mixed_6d."""

    def __init__(self):
        super().__init__()
        self.branch1x1 = nn.Conv2d(4, 9, 1)

    def forward(self, x):
        return self.branch1x1(x)


class SmallInception(nn.Module):
    """Network with torch-fidelity's layer names and its own resizing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.Conv2d_1a_3x3 = nn.Conv2d(3, 4, 3, stride=16)
        self.Mixed_6d = Branches()

    def forward(self, images):
        x = nn.functional.interpolate((images.float() - 128) / 128, size=(SIDE, SIDE))
        x = self.Mixed_6d(self.Conv2d_1a_3x3(x))
        return x.mean((2, 3)), x.amax((2, 3))


def pictures(height, width):
    generator = np.random.default_rng(height)
    return generator.integers(0, 256, (2, height, width, 3), dtype=np.uint8)


def as_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def bilinear_with_half_pixel_centers(channel):
    """Resize one channel [H, W] to 299 x 299, with each output pixel from four neighbors, in float64."""

    def places(size):
        at = np.clip((np.arange(SIDE) + 0.5) * size / SIDE - 0.5, 0, None)
        low = np.minimum(np.floor(at).astype(int), size - 1)
        return low, np.minimum(low + 1, size - 1), at - low

    (top, bottom, down), (left, right, across) = (places(size) for size in channel.shape)
    upper, lower = (
        channel[row][:, left] * (1 - across) + channel[row][:, right] * across for row in (top, bottom)
    )
    return upper * (1 - down)[:, None] + lower * down[:, None]


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (320, 310)])
def test_the_input_of_pytorch_fid_is_bilinear_with_half_pixel_centers(size):
    images = pictures(*size)
    expected = [[bilinear_with_half_pixel_centers(image[..., c] / 255) for c in range(3)] for image in images]
    difference = torch_bilinear(as_tensor(images)) - torch.from_numpy(2 * np.array(expected) - 1)
    assert difference.abs().max() < 1e-4  # positions are computed in float32


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (320, 310)])
def test_the_input_of_clean_fid_is_bicubic_of_pillow_on_each_channel(size):
    images = pictures(*size)
    expected = [
        [
            np.asarray(
                Image.fromarray(image[..., c].astype(np.float32)).resize(
                    (SIDE, SIDE), Image.Resampling.BICUBIC
                )
            )
            for c in range(3)
        ]
        for image in images
    ]
    ours = pillow_bicubic(as_tensor(images)) * 128 + 128
    assert np.abs(ours.numpy() - np.array(expected).clip(0, 255)).max() < 1e-4


@pytest.mark.parametrize("resize", INPUTS)
def test_only_the_input_of_the_first_layer_is_replaced(resize):
    images = as_tensor(pictures(40, 40))
    network = SmallInception()
    expected = network(images)
    if (make := INPUTS[resize]) is not None:
        x = network.Mixed_6d(network.Conv2d_1a_3x3(make(images)))
        expected = (x.mean((2, 3)), x.amax((2, 3)))
    outputs = InceptionVariant(network, resize)(images)
    assert len(outputs) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))


def test_the_spatial_features_are_seven_channels_in_the_order_of_tensorflow():
    images, network = as_tensor(pictures(40, 40)), SmallInception()
    inner = network.Mixed_6d(
        network.Conv2d_1a_3x3(nn.functional.interpolate((images.float() - 128) / 128, size=(SIDE, SIDE)))
    )
    _, _, spatial = InceptionVariant(network, "tensorflow1-bilinear", spatial=True)(images)
    assert spatial.shape == (2, *inner.shape[2:], 7)
    assert torch.equal(spatial[1, 3, 5], inner[1, :7, 3, 5])
