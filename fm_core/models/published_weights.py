"""Weights of published networks: reading their files, and the conversion to the networks of this project.

Parameter names and shapes are those of DiT and SiT (`dit_weights`) or of ADM's U-Net (`adm_weights`). What
differs between the sources is the time that they embed:

- sit: t itself, from 0 at noise to 1 at data, as here (in the code of SiT; its paper counts the other way).
  The network needs model.time_scale 1.
- dit, adm: the number i of DDPM's step, from 0 at data to 999. At the step i, alpha_t^2 is the product of
  i + 1 factors, so that i = 999 - 1000 t on the path variance-preserving with steps 1000. The sinusoidal
  features of 999 - 1000 t are a rotation of those of 1000 t, which is multiplied into the first layer of the
  time embedding. The network needs model.time_scale 1000.
"""

import argparse
import io
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from safetensors.torch import load
from torch import Tensor, nn

from fm_core.models.adm_weights import AttentionOrder, drop_variances, from_adm, is_adm
from fm_core.models.dit_weights import check_heads, from_dit, is_dit
from fm_core.models.layers import is_second_time
from fm_core.models.transformer import Transformer
from fm_core.models.unet import UNet

LOG = logging.getLogger(__name__)
Source = Literal["sit", "dit", "adm"]
DIFFUSION_STEPS = 1000
TIME_SCALES: dict[Source, float] = {"sit": 1.0, "dit": DIFFUSION_STEPS, "adm": DIFFUSION_STEPS}
"""model.time_scale that the weights of a source need."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""Names of files that torch.save writes end in one of these."""


def read_tensors(content: bytes, name: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a file that torch.save wrote.

    The latter is read without running code that it names. In a training checkpoint the weights are looked
    for under `ema`, then under `model` and `state_dict`. A prefix `module.` of all names is removed.

    Raises:
        ValueError: the file cannot be read, or holds no state dict.
        safetensors.SafetensorError: the .safetensors file is damaged.
    """
    if not name.endswith(PICKLES):
        return load(content)
    try:
        # Training checkpoints of DiT and SiT also hold their options, an inert record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the content of a damaged file decides which
        code = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        raise ValueError(
            f"it names {code[1]}, which is code and no tensor"
            if code
            else f"it is damaged, or no file of torch.save ({type(error).__name__})"
        ) from None
    for key in ("ema", "model", "state_dict"):
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
            break
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError("it holds no dictionary of tensors")
    tensors = cast(Mapping[str, Tensor], stored)
    prefix = "module." if all(key.startswith("module.") for key in tensors) else ""
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def is_published(weights: Mapping[str, Any]) -> bool:
    """Whether a state dict has parameter names of a published network."""
    return is_dit(weights) or is_adm(weights)


def convert_published(
    weights: Mapping[str, Tensor],
    network: nn.Module,
    source: Source | None,
    attention: AttentionOrder = "legacy",
    key: str = "train.init_source",
) -> dict[str, Tensor]:
    """Convert published weights to a state dict of `network`, which then computes the same function.

    The embedding of a second time, which no published network has, keeps the weights of `network`.

    Args:
        weights: the published state dict.
        network: a network of this project with the same sizes.
        source: whose weights these are. None: a U-Net that embeds its time as `network` does.
        attention: order of queries, keys and values of a U-Net.
        key: name of `source`, for messages.

    Raises:
        ValueError: a tensor is missing, superfluous or of another shape (the message names the first one), or
            `network` or `source` does not fit the weights.
    """
    layout = "DiT and SiT" if is_dit(weights) else "ADM's U-Net"
    sources = ("sit", "dit") if is_dit(weights) else ("adm",)
    if not isinstance(network, Transformer if is_dit(weights) else UNet):
        kind = "transformer" if is_dit(weights) else "unet"
        raise ValueError(f"its tensors are those of {layout}; it needs model.kind {kind}")
    if source not in sources and (source or is_dit(weights)):
        raise ValueError(
            f"its tensors have the names of {layout}; {key} must be {' or '.join(sources)}, not {source}"
        )
    scale = network.conditioning.time_scale
    if source and scale != TIME_SCALES[source]:
        raise ValueError(f"{source} needs model.time_scale {TIME_SCALES[source]:g}, not {scale:g}")
    _log_variances(weights, network)
    if isinstance(network, Transformer):
        check_heads(network)
        state = from_dit(weights, network)
    else:
        assert isinstance(network, UNet)
        state = from_adm(drop_variances(weights, network), network, attention)
    if source in ("dit", "adm"):
        name = "conditioning.inner.weight"
        state[name] = embedding_of_steps(state[name])
    return state | {name: value for name, value in network.state_dict().items() if is_second_time(name)}


def embedding_of_steps(weight: Tensor, steps: int = DIFFUSION_STEPS) -> Tensor:
    """Weight of the first layer of a time embedding, for features of steps * t in place of DDPM's step.

    The step is i = steps - 1 - steps * t. With w the frequency of a pair of features,
    cos(w i) = cos(w (steps - 1)) cos(w steps t) + sin(w (steps - 1)) sin(w steps t), and likewise sin(w i).
    `weight` is [outputs, features], the features as in `timestep_embedding`.
    """
    half = weight.shape[1] // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    angles = (steps - 1) * torch.exp(-math.log(10_000) * exponents)
    of_cos, of_sin = weight.double()[:, :half], weight.double()[:, half : 2 * half]
    cos, sin = torch.cos(angles), torch.sin(angles)
    rotated = [of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos, weight.double()[:, 2 * half :]]
    return torch.cat(rotated, dim=1).to(weight.dtype)


def _log_variances(weights: Mapping[str, Tensor], network: Transformer | UNet) -> None:
    name = "final_layer.linear.bias" if isinstance(network, Transformer) else "out.2.bias"
    if len(weights.get(name, ())) == 2 * len(network.last.bias):
        LOG.warning("the output channels for variances were dropped: only the mean is predicted here")
