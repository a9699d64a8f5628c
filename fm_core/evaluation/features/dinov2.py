"""Features of DINOv2 (Oquab et al. 2023), on which Stein et al. (2023) compute a Fréchet distance.

The network is a plain vision transformer. It loads weights files published by facebookresearch/dinov2 or by
timm, which use the same tensor names, and takes its sizes from the tensors. Nothing is downloaded.
"""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor, extract_in_batches
from fm_core.evaluation.features.extractor_weights import verified_weights

NO_WEIGHTS = (
    "evaluate.features dinov2 needs evaluate.weights: path or URL of dinov2_vitl14_pretrain.pth "
    "(facebookresearch/dinov2), or of timm's model.safetensors of vit_large_patch14_dinov2.lvd142m"
)
SIDE = 224
"""Height and width of the input, as in Stein et al. (2023)."""
BATCH = 64
HEAD_CHANNELS = 64
"""Channels of an attention head, the same for every published size."""
POSITION_OFFSET = 0.1
"""Offset that the published code adds to the number of patches when it interpolates position embeddings."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {384: "vits14", 768: "vitb14", 1024: "vitl14"}
UNUSED = {"mask_token"}


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, width] -> [N, tokens, width]."""
        count, tokens, width = x.shape
        qkv = self.qkv(x).view(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(count, tokens, width))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, width] -> [N, tokens, width]."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel."""
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width, heads), _Mlp(width, inner)
        self.ls1, self.ls2 = _LayerScale(width), _LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, tokens, width] -> [N, tokens, width]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, patches, width]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2's network: uint8 [N, 3, H, W] -> the normalized class token, float32 [N, width]."""

    def __init__(
        self, width: int, depth: int, heads: int, inner: int, patch: int, positions: int, side: int = SIDE
    ) -> None:
        """Build the network with random weights.

        `positions` is the number of position embeddings in the file without the class token; it is a square.
        """
        super().__init__()
        self.side, self.patch = side, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + positions, width))
        self.patch_embed = _PatchEmbed(width, patch)
        self.blocks = nn.ModuleList(_Block(width, heads, inner) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Resize images of any size and return their features."""
        x = self.patch_embed(preprocess(images, self.side))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._positions()
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def _positions(self) -> Tensor:
        """Position embeddings for the patches of the input, interpolated as the published code does."""
        of_class, of_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        old, new = math.isqrt(of_patches.shape[1]), self.side // self.patch
        if old == new:
            return self.pos_embed
        grid = of_patches.view(1, old, old, -1).permute(0, 3, 1, 2)
        scale = (new + POSITION_OFFSET) / old
        grid = interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([of_class, grid.flatten(2).transpose(1, 2)], dim=1)


def preprocess(images: Tensor, side: int) -> Tensor:
    """Resize with Pillow's bicubic filter in 8 bits and normalize, as in Stein et al. (2023).

    uint8 [N, 3, H, W] -> float32 [N, 3, side, side], normalized by ImageNet's mean and standard deviation.
    """
    rows = list[Tensor]()
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        resized = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        rows.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((torch.stack(rows).float() / 255 - mean) / std).to(images.device)


def dinov2_extractor(
    settings: EvaluateSection, root: str, manifest: Manifest, device: torch.device
) -> Extractor:
    """Build the extractor of class tokens [N, width], and record the hash of the weights.

    Raises:
        UserError: the weights are missing, have another hash, or are not of DINOv2 without registers.
    """
    if not settings.weights:
        raise UserError(NO_WEIGHTS)
    path, digest = verified_weights(settings.weights, settings.weights_sha256, root, manifest.name)
    network = dinov2_network(path).to(device).eval()
    width = network.cls_token.shape[-1]
    return Extractor(
        name=f"dinov2-{SIZES.get(width, f'width-{width}')}",
        sha256=digest,
        extract=extract_in_batches(network, manifest.levels, device, BATCH),
        protocol={"resize": f"Pillow bicubic to {SIDE} in 8 bits"},
    )


def dinov2_network(path: Path) -> VisionTransformer:
    """Load the network from a weights file. Raises UserError if the file contains another network."""
    try:
        weights: Mapping[str, Tensor] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        return _network_of({name: tensor for name, tensor in weights.items() if name not in UNUSED})
    except (
        *(SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError),
        *(KeyError, ValueError, TypeError, AttributeError),
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"evaluate.weights: {path} does not contain DINOv2 weights without registers: {reason}"
        ) from None


def _network_of(weights: Mapping[str, Any]) -> VisionTransformer:
    width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    positions = weights["pos_embed"].shape[1] - 1
    if math.isqrt(positions) ** 2 != positions:
        raise ValueError(f"{positions} position embeddings are no square")
    network = VisionTransformer(
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        heads=max(1, width // HEAD_CHANNELS),
        inner=weights["blocks.0.mlp.fc1.weight"].shape[0],
        patch=patch,
        positions=positions,
    )
    network.load_state_dict(weights)
    return network
