"""Reference statistics as .npz files: mu [D] and sigma [D, D], the format of ADM, EDM and pytorch-fid.

Files written here also record their extractor and data set, which are checked; files of other programs do
not, and are trusted.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_core.data.manifest import Manifest
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.feature_statistics import Gaussian
from fm_core.storage.atomic_files import write_bytes


def read_statistics(path: Path, extractor: Extractor, manifest: Manifest) -> tuple[Gaussian, Tensor | None]:
    """Read mean and covariance, and the images uint8 [N, C, S, S] (arr_0) if the file contains them.

    Raises:
        UserError: the file has no statistics, or those of another extractor or data set.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content: dict[str, Any] = {name: file[name] for name in file.files if name != "mu_s"}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"evaluate.reference {path} cannot be read: {' '.join(str(error).split())}; name train, val or "
            "an .npz with mu and sigma"
        ) from None
    if not {"mu", "sigma"} <= content.keys():
        raise UserError(
            f"evaluate.reference {path} contains {', '.join(content) or 'nothing'}, but no mu and sigma"
        )
    mu, sigma = (torch.from_numpy(np.asarray(content[name], dtype=np.float64)) for name in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not torch.isfinite(sigma).all():
        raise UserError(
            f"evaluate.reference {path}: mu {list(mu.shape)} and sigma {list(sigma.shape)} are not a mean "
            "and a covariance"
        )
    _check_provenance(path, content, extractor, manifest)
    dimension = _feature_dimension(extractor, manifest)
    if len(mu) != dimension:
        raise UserError(f"evaluate.reference {path} has {len(mu)} features; {extractor.name} has {dimension}")
    count = int(content["images"]) if "images" in content else None
    return Gaussian(mu, sigma, count), _images(content.get("arr_0"), manifest)


def write_statistics(path: Path, reference: Gaussian, extractor: Extractor, manifest: Manifest) -> None:
    """Write mu, sigma and their provenance to `path`, whose suffix is .npz."""
    buffer = io.BytesIO()
    provenance: dict[str, Any] = {
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "data": manifest.name,
        "data_version": manifest.version,
        **({"images": reference.count} if reference.count else {}),
    }
    np.savez(buffer, mu=reference.mean.cpu().numpy(), sigma=reference.covariance.cpu().numpy(), **provenance)
    write_bytes(path, buffer.getvalue())


def _check_provenance(path: Path, content: dict[str, Any], extractor: Extractor, manifest: Manifest) -> None:
    expected = {
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "data_version": manifest.version,
    }
    for key, value in expected.items():
        if key in content and str(content[key]) != value:
            raise UserError(f"evaluate.reference {path} has {key} {str(content[key])[:40]}, not {value[:40]}")


def _feature_dimension(extractor: Extractor, manifest: Manifest) -> int:
    return extractor(torch.zeros(1, *manifest.image_shape, dtype=torch.uint8))[0].shape[1]


def _images(array: Any, manifest: Manifest) -> Tensor | None:
    channels, height, width = manifest.image_shape
    if array is None or array.dtype != np.uint8 or array.shape[1:] != (height, width, channels):
        return None
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
