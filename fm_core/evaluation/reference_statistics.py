"""Reference statistics as .npz files with mu [D] and sigma [D, D], the format of ADM, EDM and pytorch-fid.

Files written by this module also record their extractor and data set, which are checked on reading. Files of
other programs do not record them and are not checked.
"""

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
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

_PROVENANCE = ("features", "features_sha256", "data", "data_version")
_READ = {"mu", "sigma", "mu_s", "sigma_s", "images", *_PROVENANCE}


@dataclass(frozen=True)
class StatisticsFile:
    """Statistics of a reference set in an .npz file."""

    gaussian: Gaussian
    spatial: Gaussian | None
    """Statistics of the spatial features of sFID (mu_s and sigma_s, as in ADM's files)."""
    holds_images: bool
    """Whether the file also contains images (arr_0)."""
    provenance: Mapping[str, str]
    """Provenance recorded in files of this program: features, features_sha256, data_version."""


def load_statistics(path: Path) -> StatisticsFile:
    """Read mu and sigma from an .npz file, without its images.

    Raises:
        UserError: the file cannot be read, or does not contain a mean and a covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names: list[str] = list(file.files)
            content: dict[str, Any] = {name: file[name] for name in names if name in _READ}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"evaluate.reference {path} cannot be read: {' '.join(str(error).split())}; name train, val or "
            "an .npz with mu and sigma"
        ) from None
    if not {"mu", "sigma"} <= content.keys():
        raise UserError(
            f"evaluate.reference {path} contains {', '.join(names) or 'nothing'}, but no mu and sigma"
        )
    count = int(content["images"]) if "images" in content else None
    spatial = {"mu_s", "sigma_s"} <= content.keys()
    return StatisticsFile(
        gaussian=_gaussian(path, content, ("mu", "sigma"), count),
        spatial=_gaussian(path, content, ("mu_s", "sigma_s"), count) if spatial else None,
        holds_images="arr_0" in names,
        provenance={name: str(content[name]) for name in _PROVENANCE if name in content},
    )


def read_statistics(path: Path, extractor: Extractor, manifest: Manifest) -> tuple[Gaussian, Tensor | None]:
    """Read mean and covariance, and the images uint8 [N, C, S, S] (arr_0) if the file contains them.

    Raises:
        UserError: the file contains no statistics, or statistics of another extractor or data set.
    """
    file = load_statistics(path)
    check_provenance(path, file, extractor, manifest.version)
    check_dimension(path, file, extractor, manifest)
    images = None
    if file.holds_images:
        with np.load(path, allow_pickle=False) as content:
            images = _images(content["arr_0"], manifest)
    return file.gaussian, images


def write_statistics(path: Path, reference: Gaussian, extractor: Extractor, manifest: Manifest) -> None:
    """Write mu, sigma and their provenance to `path`, which must have the suffix .npz."""
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


def check_provenance(
    path: Path, file: StatisticsFile, extractor: Extractor, data_version: str | None
) -> None:
    """Raise UserError for statistics that record another extractor or, if given, another data set."""
    expected = {"features": extractor.name, "features_sha256": extractor.sha256}
    if data_version is not None:
        expected["data_version"] = data_version
    for key, value in expected.items():
        stated = file.provenance.get(key, value)
        if stated != value:
            raise UserError(f"evaluate.reference {path} has {key} {stated[:40]}, not {value[:40]}")


def check_dimension(path: Path, file: StatisticsFile, extractor: Extractor, manifest: Manifest) -> None:
    """Raise UserError if the statistics and the extractor have different numbers of features."""
    outputs = extractor.outputs(torch.zeros(1, *manifest.image_shape, dtype=torch.uint8))
    for gaussian, name in ((file.gaussian, "features"), (file.spatial, "spatial")):
        if gaussian is None or name not in outputs:
            continue
        dimension = outputs[name].shape[1]
        if gaussian.dimension != dimension:
            of = "features" if name == "features" else "spatial features"
            raise UserError(
                f"evaluate.reference {path} has {gaussian.dimension} {of}; {extractor.name} has {dimension}"
            )


def _gaussian(path: Path, content: Mapping[str, Any], names: tuple[str, str], count: int | None) -> Gaussian:
    try:
        mu, sigma = (torch.from_numpy(np.asarray(content[name], dtype=np.float64)) for name in names)
    except (TypeError, ValueError):
        raise UserError(f"evaluate.reference {path}: {' and '.join(names)} are not numbers") from None
    finite = bool(torch.isfinite(mu).all() and torch.isfinite(sigma).all())
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu) or not finite:
        raise UserError(
            f"evaluate.reference {path}: {names[0]} {list(mu.shape)} and {names[1]} {list(sigma.shape)} are "
            "not a mean and a covariance"
        )
    return Gaussian(mu, sigma, count)


def _images(array: Any, manifest: Manifest) -> Tensor | None:
    channels, height, width = manifest.image_shape
    if array is None or array.dtype != np.uint8 or array.shape[1:] != (height, width, channels):
        return None
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
