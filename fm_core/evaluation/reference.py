"""Reference statistics: of a data set's split, computed once and stored beside it, or from an .npz file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from fm_core.config import EvaluateSection
from fm_core.config.protocols import RESIZE_TEXTS
from fm_core.data.manifest import Manifest
from fm_core.data.reader import ImageReader
from fm_core.data.sources.splits import permutation
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian, MomentAccumulator
from fm_core.evaluation.reference_statistics import load_statistics, read_statistics
from fm_core.evaluation.resumable_parts import ResumableParts, split_ranges
from fm_core.storage.hashing import fingerprint
from fm_core.storage.store import Store

SUBSET_ORDER = "permutation"
"""Method by which a subset of the images is chosen; earlier versions took every k-th image."""
STATISTICS_VERSION = 2
"""Version of the statistics; increment it if the same images would yield other statistics."""
DEFAULT_RESIZE = RESIZE_TEXTS["tensorflow1-bilinear"]
PART_IMAGES = 65_536
READ_IMAGES = 4_096
CHECK_TOLERANCE = 0.02
"""Relative change in the distance of real images that can be caused by the arithmetic of another device."""


@dataclass(frozen=True)
class Reference:
    """Mean and covariance, and features of individual images for pairwise metrics."""

    gaussian: Gaussian
    rows: Tensor | None
    """Features float32 [M, D] of randomly chosen images; None if imported statistics contain no images."""
    name: str
    """Name of the reference, displayed with every metric that uses it."""
    spatial: Gaussian | None = None
    """Mean and covariance of the spatial features of sFID; None if sFID is not requested."""


class ReferenceSplit:
    """Reference that is computed from a split of the data set."""

    def __init__(
        self, root: str, manifest: Manifest, settings: EvaluateSection, extractor: Extractor
    ) -> None:
        self.root, self.manifest, self.extractor = root, manifest, extractor
        self.split = settings.reference
        self.count = manifest.splits[self.split].images
        self.row_indices = subset_indices(self.count, settings.pair_images)
        identity = [
            STATISTICS_VERSION,
            manifest.version,
            extractor.sha256,
            extractor.protocol,
            self.split,
            len(self.row_indices),
            *([SUBSET_ORDER] if len(self.row_indices) < self.count else []),
        ]
        self.store = Store.at(root, manifest.name, "evaluation")
        self.file = f"{self.split}-{fingerprint(identity)[:12]}.safetensors"

    @property
    def exists(self) -> bool:
        """Whether the statistics are stored."""
        return self.store.size(self.file) is not None

    @property
    def stem(self) -> str:
        """Name of the stored file without its suffix."""
        return self.file.removesuffix(".safetensors")

    def task(self, phase: str) -> ResumableParts | None:
        """Return the task that computes the statistics; None if they exist."""
        return reference_task([self], phase)

    def read(self, task: ResumableParts | None) -> Reference:
        """Read the reference; with a completed task, merge its parts and store the result first."""
        if task is not None:
            store_references([self], task)
        tensors = load(self.store.read_bytes(self.file))
        gaussian = Gaussian(tensors["mean"], tensors["covariance"], self.count)
        # The square root is expensive, so it is stored as well.
        gaussian.__dict__["root"] = tensors["root"]
        return Reference(gaussian, tensors["rows"], f"{self.split}, {self.count} images")

    def merge(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Store the statistics from the parts of a task, which may be of several extractors."""
        prefix = f"{self.stem}." if f"{self.stem}.total" in parts[0] else ""
        moments = FeatureMoments(
            self.count,
            torch.stack([part[f"{prefix}total"] for part in parts]).sum(0),
            torch.stack([part[f"{prefix}products"] for part in parts]).sum(0),
        )
        gaussian = Gaussian.of(moments)
        content = {"mean": gaussian.mean, "covariance": gaussian.covariance, "root": gaussian.root}
        rows = torch.cat([part[f"{prefix}rows"] for part in parts])
        self.store.write_bytes(self.file, save({**content, "rows": rows}))


def reference_task(splits: Sequence[ReferenceSplit], phase: str) -> ResumableParts | None:
    """Return the task that computes the missing statistics of one split in one pass over its images.

    `splits` have the same split and one extractor each. None if all statistics exist.
    """
    missing = [split for split in splits if not split.exists]
    if not missing:
        return None
    first = missing[0]
    several = len(missing) > 1
    folder = f"{first.split}-{fingerprint([split.file for split in missing])[:12]}" if several else first.stem
    ranges = split_ranges(first.count, PART_IMAGES)

    def make(number: int) -> Mapping[str, Tensor]:
        images = ranges[number]
        sums = [MomentAccumulator(split.row_indices, images.start) for split in missing]
        with ImageReader(first.root, first.manifest, first.split) as reader:
            for start in range(images.start, images.stop, READ_IMAGES):
                end = min(start + READ_IMAGES, images.stop)
                pixels, _ = reader.read(np.arange(start, end, dtype=np.int64))
                for split, each in zip(missing, sums, strict=True):
                    each.add(split.extractor(pixels)[0])
        content = dict[str, Tensor]()
        for split, each in zip(missing, sums, strict=True):
            prefix = f"{split.stem}." if several else ""
            content |= {
                f"{prefix}total": each.moments.total,
                f"{prefix}products": each.moments.products,
                f"{prefix}rows": each.rows,
            }
        return content

    return ResumableParts(phase, Store.at(first.store.url, folder), "moments", ranges, make)


def store_references(splits: Sequence[ReferenceSplit], task: ResumableParts) -> None:
    """Merge the parts of a completed `reference_task`, store the missing statistics, and remove the parts."""
    if missing := [split for split in splits if not split.exists]:
        parts = task.read_all()
        for split in missing:
            split.merge(parts)
    task.remove()


def reference_from_npz(
    settings: EvaluateSection, extractor: Extractor, manifest: Manifest, needs_rows: bool
) -> Reference:
    """Read the reference from an .npz file.

    Raises:
        UserError: as for `read_statistics`, or individual images are needed and the file contains none of the
            right size.
    """
    path = Path(settings.reference)
    gaussian, images = read_statistics(path, extractor, manifest)
    if images is None and needs_rows:
        raise UserError(
            f"evaluate.reference {path} contains no images (arr_0): remove kernel_distance and "
            "precision_recall from evaluate.metrics"
        )
    rows = None
    if images is not None and needs_rows:
        selected = images[subset_indices(len(images), settings.pair_images)]
        rows = torch.cat([extractor(part)[0] for part in selected.split(READ_IMAGES)])
    spatial = load_statistics(path).spatial if extractor.extract_spatial else None
    return Reference(gaussian, rows, statistics_name(path, gaussian), spatial)


def statistics_name(path: Path, gaussian: Gaussian) -> str:
    """Name of the statistics in a file: the file name and the number of images."""
    size = f"{gaussian.count} images" if gaussian.count else "number of images not told"
    return f"{path.name}, {size}"


def subset_indices(count: int, maximum: int) -> Tensor:
    """At most `maximum` of the indices 0 .. count - 1, int64 and increasing.

    The indices are chosen by a fixed permutation, because every k-th image might be of the same class.
    """
    return torch.from_numpy(np.sort(permutation(count, seed=0)[:maximum]))


def reference_check(
    root: str, manifest: Manifest, extractor: Extractor, reference: str, distance: float, images: int
) -> None:
    """Check that the distance of real validation images to the reference has not changed.

    The first distance is stored beside the data set. If a later distance differs, then the resizing, the
    pixel range, the extractor or the statistics have changed.

    Raises:
        UserError: the distance differs by more than 2%.
    """
    store = Store.at(root, manifest.name, "evaluation")
    resize = extractor.protocol.get("resize", DEFAULT_RESIZE)
    identity = [
        manifest.version,
        extractor.name,
        extractor.protocol.get("classifier_recipe"),
        reference,
        images,
        *([resize] if resize != DEFAULT_RESIZE else []),
    ]
    name = f"guard-{fingerprint(identity)[:12]}.json"
    try:
        stored: dict[str, Any] = json.loads(store.read_bytes(name))
    except FileNotFoundError:
        identifiers = {
            "features": extractor.name,
            "features_sha256": extractor.sha256,
            "reference": reference,
        }
        record = {"schema": 1, "distance": distance, "images": images, **identifiers}
        store.write_bytes(name, json.dumps(record, indent=1).encode())
        return
    if abs(distance - stored["distance"]) > CHECK_TOLERANCE * abs(stored["distance"]) + 1e-9:
        raise UserError(
            f"{images:,} real validation images are at {distance:.4g} from the reference {reference}, "
            f"and were at {stored['distance']:.4g} when it was first used: pixels, resizing, extractor or "
            f"statistics changed; if this is intended, remove {store.url}/{name}"
        )
