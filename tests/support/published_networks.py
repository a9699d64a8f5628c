"""Tiny networks of this project, and of the published layouts with the same sizes."""

import torch

from fm_core.models.transformer import Transformer
from fm_core.models.unet import UNet
from tests.support.public_layouts import PublicTransformer, PublicUNet, randomized

CLASSES = 5


def transformer(time_scale=1.0, **changes):
    sizes = {"image_size": 8, "image_channels": 4, "patch": 2, "width": 32, "depth": 2, "heads": 2}
    return Transformer(**(sizes | {"classes": CLASSES, "time_scale": time_scale} | changes)).eval()


def public_transformer(variances=True, dtype=torch.float32):
    return randomized(PublicTransformer(8, 4, 2, 32, 2, 2, CLASSES, variances, dtype))


ORDERS = {"legacy": False, "new": True}


def public_unet(width, order="legacy", updown=True, dtype=torch.float32):
    sizes = {"multipliers": (1, 1), "blocks": 1, "head_channels": 32, "classes": CLASSES}
    flags = {"scale_shift": updown, "resblock_updown": updown, "new_order": order == "new"}
    network = PublicUNet(3, width, attention_levels=(1,), variances=True, **sizes, **flags)
    return randomized(network.to(dtype))


def unet(width, updown=True, **changes):
    return UNet(
        image_size=4,
        image_channels=3,
        channels=width,
        channel_multipliers=(1, 1),
        residual_blocks=1,
        attention_resolutions=(2,),
        head_channels=32,
        dropout=0.1,
        scale_shift=updown,
        resample_with_residual_blocks=updown,
        classes=CLASSES,
        **changes,
    ).eval()


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())
