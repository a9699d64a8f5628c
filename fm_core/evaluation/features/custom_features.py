"""Extractors from outside: a TorchScript file, or an nn.Module by its import path.

Either takes images uint8 [N, 3, S, S] of 256 grey levels and gives features [N, D], or (features, logits
[N, classes]).
"""

import hashlib
import importlib
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor, read_in_batches
from fm_core.evaluation.features.extractor_weights import verified_weights

BATCH = 128
SCRIPTED = (".pt", ".ts", ".jit", ".torchscript")


def imported_extractor(
    settings: EvaluateSection, root: str, manifest: Manifest, device: torch.device
) -> Extractor:
    """The extractor of evaluate.features = FILE.pt or package.module:Name.

    A module of one's own is named by class or by a function that makes one, without arguments; its weights
    are its own or those of evaluate.weights. Raises UserError for what cannot be imported, loaded or run.
    """
    scripted = settings.features.endswith(SCRIPTED)
    if scripted and settings.weights:
        raise UserError("evaluate.weights: a TorchScript file holds its weights; leave this key out")
    if scripted:
        path, digest = verified_weights(settings.features, settings.weights_sha256, root, manifest.name)
        network = _scripted(path)
        name = f"torchscript-{path.stem}"
    else:
        network = _module(settings.features)
        if settings.weights:
            path, _ = verified_weights(settings.weights, settings.weights_sha256, root, manifest.name)
            _fill(network, path)
        digest, name = _digest(network), settings.features
    network = network.to(device).eval()
    read = read_in_batches(network, manifest.levels, device, BATCH)
    _try(read, settings.features, manifest)
    return Extractor(name=name, sha256=digest, read=read)


def _scripted(path: Path) -> nn.Module:
    try:
        return torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"evaluate.features: {path} is no TorchScript file: {_line(error)}") from None


def _module(name: str) -> nn.Module:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            f"evaluate.features {name}: allowed are classifier, inception, a TorchScript file "
            f"({', '.join(SCRIPTED)}) and package.module:Name"
        )
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # anything may go wrong in code from outside
        raise UserError(f"evaluate.features {name}: {type(error).__name__}: {_line(error)}") from None
    if not isinstance(made, nn.Module):
        raise UserError(f"evaluate.features {name} makes a {type(made).__name__}, not a torch.nn.Module")
    return made


def _fill(network: nn.Module, path: Path) -> None:
    try:
        safe = path.suffix == ".safetensors"
        weights: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, TypeError, EOFError) as error:
        raise UserError(f"evaluate.weights: {path} does not fit the extractor: {_line(error)}") from None


def _try(read: Any, name: str, manifest: Manifest) -> None:
    images = torch.zeros(2, *manifest.image_shape, dtype=torch.uint8)
    try:
        features, _ = read(images)
    except Exception as error:  # anything may go wrong in code from outside
        raise UserError(
            f"evaluate.features {name} cannot read uint8 images {[2, 3, *manifest.image_shape[1:]]}: "
            f"{type(error).__name__}: {_line(error)}"
        ) from None
    if features.ndim != 2 or len(features) != 2:
        raise UserError(f"evaluate.features {name} gives {list(features.shape)} for 2 images, not [2, D]")


def _digest(network: nn.Module) -> str:
    """SHA-256 over names and values of all weights."""
    digest = hashlib.sha256()
    state: dict[str, Tensor] = network.state_dict()
    for name in sorted(state):
        digest.update(name.encode() + b"\0")
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
