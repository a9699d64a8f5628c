"""Models of published weights: SiT, DiT and ADM, from the files of their authors or in the same layout.

fm_core.load("SiT-XL-2-256x256.pt", published="sit")
fm_core.load("256x256_diffusion_uncond.pt", published=PublishedModel("adm", model={...}, image_size=256))
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from fm_core.config import MethodSection, ModelSection
from fm_core.errors import UserError
from fm_core.models.adm_weights import AttentionOrder
from fm_core.models.build import build_network
from fm_core.models.dit_weights import transformer_keys
from fm_core.models.published_weights import (
    DIFFUSION_STEPS,
    TIME_SCALES,
    Source,
    convert_published,
    is_published,
    read_tensors,
)
from fm_core.sampling.checkpoint_source import Model, model_of
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.keyed_random import CURRENT, generator_record

FLOW: dict[str, Any] = {
    "path": "optimal-transport",
    "path_options": {"sigma_min": 0.0},
    "objective": "flow-matching",
}
"""Of SiT: the linear path, t = 0 is noise, and the network predicts the velocity."""
DIFFUSION: dict[str, Any] = {
    "path": "variance-preserving",
    "path_options": {"steps": DIFFUSION_STEPS},
    "objective": "noise-prediction",
}
"""Of DiT and of ADM with noise_schedule linear: the marginals of DDPM's steps."""
METHODS: dict[Source, dict[str, Any]] = {"sit": FLOW, "dit": DIFFUSION, "adm": DIFFUSION}
PIXELS = (1, 3)
"""Numbers of channels of images; networks of other numbers are of latents."""


@dataclass(frozen=True)
class PublishedModel:
    """What the tensors of a published file do not determine about its network.

    source: sit, dit or adm.
    heads: attention heads, for a transformer of another width or depth than the published ones.
    model, image_size: of a U-Net, keys of the model section and the side of the images in pixels.
    attention: attention order of a U-Net, new if it was trained with use_new_attention_order.
    method: the method section in place of that of the source, for a model that was trained with another
    schedule or prediction.
    """

    source: Source
    heads: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict[str, Any])
    image_size: int | None = None
    attention: AttentionOrder = "legacy"
    method: Mapping[str, Any] | None = None


def load_published(path: Path, published: PublishedModel, device: torch.device) -> Model:
    """Read a published .pt or .safetensors file.

    Raises UserError, which names the first tensor that does not fit, or what is missing.
    """
    if published.source not in METHODS:
        raise UserError(f"published {published.source!r}: allowed: {', '.join(METHODS)}")
    _check_options(published)
    try:
        content = path.read_bytes()
        tensors = read_tensors(content, path.name)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not is_published(tensors):
        raise UserError(f"{path} has no tensors with the names of DiT, SiT or ADM's U-Net")
    try:
        recipe = _recipe(path, tensors, published)
        network = build_network(
            ModelSection.model_validate(recipe["model"]), recipe["image_shape"], recipe["classes"]
        )
        weights = convert_published(tensors, network, published.source, published.attention, "published")
    except ValidationError as error:
        message = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: published: {message}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return model_of(recipe, weights, sha256_bytes(content), device, str(path))


def _check_options(published: PublishedModel) -> None:
    """Refuse options of another source, which would be ignored. Raises UserError."""
    unet = published.source == "adm"
    default = PublishedModel(published.source)
    for name in ("heads",) if unet else ("model", "image_size", "attention"):
        if getattr(published, name) != getattr(default, name):
            kind = "a transformer (sit, dit)" if unet else "a U-Net (adm)"
            raise UserError(f"published {published.source}: {name} is an option of {kind}; leave it out")


def _recipe(path: Path, tensors: Mapping[str, Tensor], published: PublishedModel) -> dict[str, Any]:
    """What a weights file of this project records about its training, as far as it is known."""
    keys = _unet_keys(tensors, published) if published.source == "adm" else None
    keys = keys or transformer_keys(tensors, published.heads)
    keys["model"] = ModelSection.model_validate(
        {**keys["model"], "time_scale": TIME_SCALES[published.source]}
    ).model_dump(mode="json")
    method = MethodSection.model_validate(published.method or METHODS[published.source])
    return {
        **keys,
        **generator_record(CURRENT),
        "method": method.model_dump(mode="json"),
        "latent": keys["image_shape"][0] not in PIXELS,
        "levels": 256,
        "data": {"name": path.name, "version": f"published weights of {published.source}"},
        "step": 0,
        "images_seen": 0,
    }


def _unet_keys(tensors: Mapping[str, Tensor], published: PublishedModel) -> dict[str, Any]:
    if not published.image_size or not published.model:
        raise ValueError(
            "the shapes of a U-Net do not determine it: give published=PublishedModel('adm', model={...}, "
            "image_size=...) with keys of the model section"
        )
    first, labels = tensors.get("input_blocks.0.0.weight"), tensors.get("label_emb.weight")
    if first is None:
        raise ValueError("input_blocks.0.0.weight is missing")
    conditional = labels is not None
    return {
        "model": {"kind": "unet", **published.model, "class_conditional": conditional},
        "image_shape": (first.shape[1], published.image_size, published.image_size),
        "classes": len(labels) if labels is not None else 0,
        # A published U-Net has no null label.
        "train": {"label_dropout": 0.0},
    }
