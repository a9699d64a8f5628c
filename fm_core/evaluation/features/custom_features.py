"""Custom feature extractors: a TorchScript file, or an nn.Module by its import path.

Both take images uint8 [N, 3, S, S] of 256 intensity levels and return features [N, D], or (features,
logits [N, classes]).
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
from fm_core.evaluation.features.extractor import Extract, Extractor, extract_in_batches
from fm_core.evaluation.features.extractor_weights import verified_weights

BATCH = 128
TORCHSCRIPT_SUFFIXES = (".pt", ".ts", ".jit", ".torchscript")


def custom_extractor(
    settings: EvaluateSection, root: str, manifest: Manifest, device: torch.device
) -> Extractor:
    """Build the extractor of evaluate.features = FILE.pt or package.module:Name.

    Name is an nn.Module class or a function that returns an nn.Module, and is called without arguments. The
    module keeps its initial weights unless evaluate.weights names a file.

    Raises:
        UserError: the extractor cannot be imported, loaded or run.
    """
    scripted = settings.features.endswith(TORCHSCRIPT_SUFFIXES)
    if scripted and settings.weights:
        raise UserError("evaluate.weights: a TorchScript file contains its weights; leave this key out")
    if scripted:
        path, digest = verified_weights(settings.features, settings.weights_sha256, root, manifest.name)
        network = _load_torchscript(path)
        name = f"torchscript-{path.stem}"
    else:
        network = _import_module(settings.features)
        if settings.weights:
            path, _ = verified_weights(settings.weights, settings.weights_sha256, root, manifest.name)
            _load_weights(network, path)
        digest, name = _weights_sha256(network), settings.features
    network = network.to(device).eval()
    extract = extract_in_batches(network, manifest.levels, device, BATCH)
    _check_output(extract, settings.features, manifest)
    return Extractor(name=name, sha256=digest, extract=extract)


def _load_torchscript(path: Path) -> nn.Module:
    try:
        return torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"evaluate.features: {path} is not a TorchScript file: {_one_line(error)}") from None


def _import_module(name: str) -> nn.Module:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            f"evaluate.features {name}: allowed are classifier, inception, dinov2, a TorchScript file "
            f"({', '.join(TORCHSCRIPT_SUFFIXES)}) and package.module:Name"
        )
    try:
        network = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # user code may raise anything
        raise UserError(f"evaluate.features {name}: {type(error).__name__}: {_one_line(error)}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"evaluate.features {name} returns a {type(network).__name__}, not a torch.nn.Module")
    return network


def _load_weights(network: nn.Module, path: Path) -> None:
    try:
        is_safetensors = path.suffix == ".safetensors"
        weights: Any = (
            load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
        )
        network.load_state_dict(weights)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, TypeError, EOFError) as error:
        raise UserError(f"evaluate.weights: {path} does not fit the extractor: {_one_line(error)}") from None


def _check_output(extract: Extract, name: str, manifest: Manifest) -> None:
    images = torch.zeros(2, *manifest.image_shape, dtype=torch.uint8)
    try:
        features, _ = extract(images)
    except Exception as error:  # user code may raise anything
        raise UserError(
            f"evaluate.features {name} cannot read uint8 images {[2, 3, *manifest.image_shape[1:]]}: "
            f"{type(error).__name__}: {_one_line(error)}"
        ) from None
    if features.ndim != 2 or len(features) != 2:
        raise UserError(f"evaluate.features {name} returns {list(features.shape)} for 2 images, not [2, D]")


def _weights_sha256(network: nn.Module) -> str:
    """SHA-256 of the names and values of all weights."""
    digest = hashlib.sha256()
    state: dict[str, Tensor] = network.state_dict()
    for name in sorted(state):
        digest.update(name.encode() + b"\0")
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
