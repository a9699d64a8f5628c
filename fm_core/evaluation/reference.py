"""What samples are compared with: a split of the data set, read once and kept beside it, or an .npz."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from fm_core.config import EvaluateSection
from fm_core.data.manifest import Manifest
from fm_core.data.reader import ImageReader
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.reference_statistics import read_statistics
from fm_core.evaluation.resumable_parts import ResumableParts, split_ranges
from fm_core.storage.hashing import fingerprint
from fm_core.storage.store import Store

VERSION = 2
"""Changes whenever the same images would give other statistics."""
PART_IMAGES = 65_536
READ_IMAGES = 4_096
GUARD_TOLERANCE = 0.02
"""Relative change of the distance of real images that arithmetic on another device may explain."""


@dataclass(frozen=True)
class Reference:
    """A mean and covariance, and single images for what compares pair by pair."""

    gaussian: Gaussian
    rows: Tensor | None
    """Features float32 [M, D] of evenly spaced images; None where imported statistics hold no images."""
    name: str
    """What it is called wherever a number made with it is shown."""


class ReferenceSplit:
    """A split of the data set as a reference."""

    def __init__(
        self, root: str, manifest: Manifest, settings: EvaluateSection, extractor: Extractor
    ) -> None:
        self.root, self.manifest, self.extractor = root, manifest, extractor
        self.split = settings.reference
        self.count = manifest.splits[self.split].images
        self.kept = evenly_spaced(self.count, settings.pair_images)
        of = [VERSION, manifest.version, extractor.sha256, extractor.protocol, self.split, len(self.kept)]
        self.store = Store.at(root, manifest.name, "evaluation")
        self.file = f"{self.split}-{fingerprint(of)[:12]}.safetensors"

    def work(self, phase: str) -> ResumableParts | None:
        """What has to be read; None where all is there."""
        if self.store.size(self.file) is not None:
            return None
        store = Store.at(self.store.url, self.file.removesuffix(".safetensors"))
        return ResumableParts(phase, store, "moments", split_ranges(self.count, PART_IMAGES), self._part)

    def read(self, work: ResumableParts | None) -> Reference:
        """The reference; what was read for it is put together and kept."""
        if work is not None:
            self._merge(work)
        kept = load(self.store.read_bytes(self.file))
        gaussian = Gaussian(kept["mean"], kept["covariance"], self.count)
        # The root is what takes the time: it is kept too.
        gaussian.__dict__["root"] = kept["root"]
        return Reference(gaussian, kept["rows"], f"{self.split}, {self.count} images")

    def _part(self, number: int) -> Mapping[str, Tensor]:
        images = split_ranges(self.count, PART_IMAGES)[number]
        moments: FeatureMoments | None = None
        rows = list[Tensor]()
        with ImageReader(self.root, self.manifest, self.split) as reader:
            for first in range(images.start, images.stop, READ_IMAGES):
                last = min(first + READ_IMAGES, images.stop)
                pixels, _ = reader.read(np.arange(first, last, dtype=np.int64))
                features = self.extractor(pixels)[0]
                part = FeatureMoments.of(features)
                moments = part if moments is None else moments + part
                rows.append(features[self.kept[(self.kept >= first) & (self.kept < last)] - first])
        assert moments is not None, "a split has at least one image"
        return {"total": moments.total, "products": moments.products, "rows": torch.cat(rows)}

    def _merge(self, work: ResumableParts) -> None:
        parts = work.read_all()
        moments = FeatureMoments(
            self.count,
            torch.stack([part["total"] for part in parts]).sum(0),
            torch.stack([part["products"] for part in parts]).sum(0),
        )
        gaussian = Gaussian.of(moments)
        content = {"mean": gaussian.mean, "covariance": gaussian.covariance, "root": gaussian.root}
        rows = torch.cat([part["rows"] for part in parts])
        self.store.write_bytes(self.file, save({**content, "rows": rows}))
        work.remove()


def imported(
    settings: EvaluateSection, extractor: Extractor, manifest: Manifest, needs_rows: bool
) -> Reference:
    """The reference of an .npz file.

    Raises UserError as `read_statistics`, and where images are needed and it holds none of the right size.
    """
    path = Path(settings.reference)
    gaussian, images = read_statistics(path, extractor, manifest)
    if images is None and needs_rows:
        raise UserError(
            f"evaluate.reference {path} holds no images (arr_0): leave kernel_distance and precision_recall "
            "out of evaluate.metrics"
        )
    rows = None
    if images is not None and needs_rows:
        chosen = images[evenly_spaced(len(images), settings.pair_images)]
        rows = torch.cat([extractor(part)[0] for part in chosen.split(READ_IMAGES)])
    told = f"{gaussian.count} images" if gaussian.count else "number of images not told"
    return Reference(gaussian, rows, f"{path.name}, {told}")


def evenly_spaced(count: int, wanted: int) -> Tensor:
    """At most `wanted` of the numbers 0 .. count - 1, as far apart as they can be, int64 and increasing."""
    wanted = min(count, wanted)
    return torch.arange(wanted) * count // wanted


def reference_check(
    root: str, manifest: Manifest, extractor: Extractor, reference: str, distance: float, images: int
) -> None:
    """Refuse a reference whose distance to real held-out images is not what it was.

    The first distance is written down beside the data set. A later one that differs means that resizing, the
    range of pixels, the extractor or the statistics changed.

    Raises:
        UserError: it differs by more than 2%.
    """
    store = Store.at(root, manifest.name, "evaluation")
    of = [manifest.version, extractor.name, extractor.protocol.get("classifier_recipe"), reference, images]
    name = f"guard-{fingerprint(of)[:12]}.json"
    try:
        before: dict[str, Any] = json.loads(store.read_bytes(name))
    except FileNotFoundError:
        facts = {"features": extractor.name, "features_sha256": extractor.sha256, "reference": reference}
        record = {"schema": 1, "distance": distance, "images": images, **facts}
        store.write_bytes(name, json.dumps(record, indent=1).encode())
        return
    if abs(distance - before["distance"]) > GUARD_TOLERANCE * abs(before["distance"]) + 1e-9:
        raise UserError(
            f"{images:,} real held-out images are at {distance:.4g} from the reference {reference}, and were "
            f"at {before['distance']:.4g} when it was first used: pixels, resizing, extractor or statistics "
            f"changed; if that is meant, remove {store.url}/{name}"
        )
