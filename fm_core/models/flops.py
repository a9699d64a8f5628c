"""FLOP and parameter counts of a network, measured with torch's FLOP counter."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TRAINING_PASSES = 3
"""Cost of a training step in forward passes: the backward pass computes every product twice, for the
gradients of the inputs and of the weights."""


def flops_per_image(network: nn.Module, image_shape: tuple[int, ...]) -> float:
    """Count the FLOPs of one forward pass for one image of `image_shape` = (channels, height, width).

    A multiply-add counts as two. Convolutions and matrix products are counted, including those of attention;
    normalization, activations and sums are not. Nothing is computed: the network may be on any device,
    including the meta device, and is not changed.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    t, x = torch.zeros(1, device="meta"), torch.zeros(1, *image_shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(network, shapes, (t, x))
    return float(counter.get_total_flops())


def parameter_count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
