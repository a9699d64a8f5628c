"""InceptionV3 with the weights of 2015-12-05 (FID), in torch-fidelity's implementation.

That implementation resizes like TensorFlow 1, which affects the features. Only its module and the imports of
that module are loaded: importing all of torch-fidelity requires a torchvision that matches torch, which does
not exist for every build of torch.
"""

import importlib
import importlib.util
import pickle
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fm_core.config import EvaluateSection
from fm_core.config.protocols import INCEPTION_SHA256, PROTOCOLS, RESIZE_TEXTS, Resize
from fm_core.data.manifest import Manifest
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import (
    INCEPTION,
    Extractor,
    extract_in_batches,
    extract_spatial_in_batches,
)
from fm_core.evaluation.features.extractor_weights import verified_weights
from fm_core.evaluation.features.inception_input import InceptionVariant

PUBLISHED_SHA256 = INCEPTION_SHA256
NO_WEIGHTS = (
    "evaluate.features inception needs evaluate.weights: path or URL of "
    "weights-inception-2015-12-05-6726825d.pth (github.com/toshas/torch-fidelity, release v0.2.0)"
)
BATCH = 128
_PACKAGE, _DISTRIBUTION = "torch_fidelity", "torch-fidelity"


def inception_extractor(
    settings: EvaluateSection, root: str, manifest: Manifest, device: torch.device
) -> Extractor:
    """Build the extractor of pool features [N, 2048] and class probabilities [N, 1008].

    Raises:
        UserError: torch-fidelity is missing or broken, or the weights are missing or have another hash.
    """
    if not settings.weights:
        raise UserError(NO_WEIGHTS)
    expected = settings.weights_sha256 or PUBLISHED_SHA256
    path, digest = verified_weights(settings.weights, expected, root, manifest.name)
    network = inception_network(path).to(device)
    protocol = PROTOCOLS[settings.protocol] if settings.protocol else None
    resize: Resize = protocol.resize if protocol else "tensorflow1-bilinear"
    spatial = protocol is not None and protocol.spatial
    variant = InceptionVariant(network, resize, spatial)
    arguments = (variant, manifest.levels, device, BATCH)
    return Extractor(
        name=INCEPTION if digest == PUBLISHED_SHA256 else f"inception-v3-{digest[:8]}",
        sha256=digest,
        extract=extract_in_batches(*arguments),
        extract_spatial=extract_spatial_in_batches(*arguments) if spatial else None,
        protocol={
            "resize": RESIZE_TEXTS[resize],
            "extractor": f"torch-fidelity {version(_DISTRIBUTION)}",
        },
    )


def inception_network(weights: Path) -> nn.Module:
    """Load the network: uint8 [N, 3, S, S] -> (features [N, 2048], logits [N, 1008] without bias).

    Raises:
        UserError: as for `inception_extractor`.
    """
    network_class: Any = torch_fidelity_module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    try:
        # torch-fidelity unpickles without restrictions, so first refuse anything but tensors.
        torch.load(weights, map_location="cpu", weights_only=True)
        layers = ["2048", "logits_unbiased"]
        return network_class("inception-v3-compat", layers, feature_extractor_weights_path=str(weights))
    except (pickle.UnpicklingError, RuntimeError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"evaluate.weights: {weights} does not contain InceptionV3 weights: {reason}"
        ) from None


def torch_fidelity_module(name: str) -> types.ModuleType:
    """Import one module of torch-fidelity without the rest of the package.

    Raises:
        UserError: the package is missing or its module cannot be imported.
    """
    loaded = _PACKAGE in sys.modules
    try:
        if not loaded:
            sys.modules[_PACKAGE] = _stub_package()
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ImportError as error:
        raise UserError(
            f"evaluate.features inception: {error}; "
            "pip install --constraint infra/constraints.txt --editable '.[inception]'"
        ) from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"evaluate.features inception: torch-fidelity does not import with torch {torch.__version__} "
            f"({reason}); install the torchvision built for this torch, or uninstall torchvision"
        ) from None
    finally:
        if not loaded:
            sys.modules.pop(_PACKAGE, None)


def _stub_package() -> types.ModuleType:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"No module named {_PACKAGE!r}", name=_PACKAGE)
    package = types.ModuleType(_PACKAGE)
    package.__path__ = list(spec.submodule_search_locations)
    return package
