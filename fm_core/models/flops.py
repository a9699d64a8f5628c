"""Floating-point operations of a network, counted and not estimated."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TRAINING_PASSES = 3
"""Operations of a training step in forward passes: the backward pass makes every product twice, once for the
inputs' gradient and once for the weights'."""


def flops_per_image(network: nn.Module, image_shape: tuple[int, ...]) -> float:
    """Operations of one forward pass for one image of `image_shape` = (channels, height, width).

    A multiplication and an addition count as two. Convolutions and matrix products are counted, those of
    attention included; normalisation, activations and sums are not. Nothing is computed: the network may be
    on any device, the meta device included, and stays as it is.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    t, x = torch.zeros(1, device="meta"), torch.zeros(1, *image_shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(network, shapes, (t, x))
    return float(counter.get_total_flops())


def parameter_count(network: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in network.parameters())
