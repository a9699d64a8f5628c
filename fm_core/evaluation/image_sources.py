"""Sources of the images to score: the sample shards of a run, the sampler itself, a folder, an .npz file."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fm_core.config import RunConfig
from fm_core.data.manifest import Manifest
from fm_core.data.sources.file_listing import list_names, printable
from fm_core.data.sources.image_decoding import PixelRules
from fm_core.errors import UserError
from fm_core.evaluation.npz_images import NpzImages
from fm_core.evaluation.resumable_parts import split_ranges
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.generate import GeneratedBatch, generate
from fm_core.sampling.sample_protocol import draw_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.storage.hashing import sha256_bytes
from fm_core.storage.store import Store

PART_IMAGES = 1_024
"""Images per part of a folder or an .npz file."""
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
LOSSY_SUFFIXES = {".jpg", ".jpeg", ".webp"}
"""Suffixes of files that may contain other pixels than were saved."""
IGNORED_SUFFIXES = {
    ".csv",
    ".html",
    ".json",
    ".jsonl",
    ".log",
    ".md",
    ".npy",
    ".npz",
    ".tsv",
    ".txt",
    ".yaml",
    ".yml",
}
"""Suffixes of other files next to the images, ignored like hidden entries (file_listing.is_hidden)."""


@dataclass(frozen=True)
class SamplingCost:
    """Sampling cost of a batch of images."""

    nfe: int
    accepted: int | None
    rejected: int | None
    forwards: int

    def to_tensor(self) -> Tensor:
        """Convert to int64 [4]; -1 where the solver does not report a count."""
        values = (self.nfe, self.accepted, self.rejected, self.forwards)
        return torch.tensor([-1 if number is None else number for number in values])


@dataclass(frozen=True)
class ImageSource:
    """Images uint8 [N, C, S, S], read in numbered parts."""

    name: str
    ranges: Sequence[range]
    read: Callable[[int], tuple[Tensor, SamplingCost | None]]
    """Read a part: pixels uint8 [n, C, S, S] and, for samples, their cost. Raises UserError."""
    identity: Any
    """A JSON value that identifies the images."""
    protocol: dict[str, Any]


def run_samples(samples: SampleSet, shape: tuple[int, int, int]) -> ImageSource:
    """Open the sample shards of a run. Raises UserError if they are not complete."""
    if samples.done() is None:
        raise UserError(f"{samples.store.url} is not complete; run fm sample first")

    def read(number: int) -> tuple[Tensor, SamplingCost | None]:
        record = samples.shard(number)
        cost = record and SamplingCost(record.nfe, record.accepted, record.rejected, record.forwards)
        return samples.read_batch(number, shape), cost

    ranges = split_ranges(samples.images, samples.batch)
    return ImageSource("samples", ranges, read, samples.protocol, samples.protocol)


def sampler_images(config: RunConfig, samples: SampleSet, model: Model, device: torch.device) -> ImageSource:
    """Generate the same images as `run_samples` when they are read, without storing them."""
    draw = draw_of(config)
    draw.check(model)

    def read(number: int) -> tuple[Tensor, SamplingCost | None]:
        first, count = samples.extent(number)
        batch: GeneratedBatch = generate(model, draw, first, count, device)
        return batch.images, SamplingCost(batch.nfe, batch.accepted, batch.rejected, batch.forwards)

    ranges = split_ranges(samples.images, samples.batch)
    return ImageSource("sampler", ranges, read, samples.protocol, samples.protocol)


def external_images(location: str, manifest: Manifest) -> ImageSource:
    """Open a folder or an .npz file. Raises UserError if it is neither or does not match the data set."""
    path = Path(location)
    if path.is_dir():
        return _folder(path, manifest)
    if path.suffix == ".npz" and path.exists():
        return _npz(path, manifest)
    raise UserError(f"evaluate.samples {location}: neither a folder of images nor an .npz file, nor sampler")


def _folder(folder: Path, manifest: Manifest) -> ImageSource:
    files = _list_images(folder)
    _check_count(len(files), str(folder))
    names = [(str(path.relative_to(folder)), *_size_and_mtime(path)) for path in files]
    ranges = split_ranges(len(files), PART_IMAGES)

    def read(number: int) -> tuple[Tensor, SamplingCost | None]:
        images = ranges[number]
        return torch.stack([_read_image(path, manifest) for path in files[images.start : images.stop]]), None

    identity = sha256_bytes(repr(names).encode())
    lossy = sum(path.suffix.lower() in LOSSY_SUFFIXES for path in files)
    facts = {"images": len(files), "samples": "folder", **({"lossy_files": lossy} if lossy else {})}
    return ImageSource(folder.name, ranges, read, identity, facts)


def _list_images(folder: Path) -> list[Path]:
    """List all images below a folder, sorted. Raises UserError for files that may be unsupported images."""
    visible = [folder / name for name in list_names(Store.at(str(folder)))]
    unsupported = [path for path in visible if path.suffix.lower() not in IMAGE_SUFFIXES | IGNORED_SUFFIXES]
    if unsupported:
        more = f" and {len(unsupported) - 1:,} more files" if len(unsupported) > 1 else ""
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(
            f"{printable(str(unsupported[0]))}{more}: not a supported image format "
            f"({suffixes}); remove or convert it"
        )
    return [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]


def _read_image(path: Path, manifest: Manifest) -> Tensor:
    channels, height, width = manifest.image_shape
    gray = ("L", "LA", "P", "PA", "1")
    modes = gray if channels == 1 else (*gray, "RGB", "RGBA")
    # The rules of sharding; the recipes of earlier versions and of official sets have no background.
    rules = PixelRules(str(manifest.recipe.get("background") or "white"), orientation=True)
    try:
        with Image.open(path) as picture:
            if picture.mode not in modes:
                raise UserError(f"{path}: mode {picture.mode}; {channels} channels of 8 bits are expected")
            opaque = rules.to_rgb(picture)
            array = np.asarray(opaque.convert("L") if channels == 1 else opaque, dtype=np.uint8)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if array.shape[:2] != (height, width):
        raise UserError(f"{path}: {array.shape[0]} x {array.shape[1]} pixels, not {height} x {width}")
    pixels = torch.from_numpy(array.copy()).view(height, width, channels).permute(2, 0, 1)
    return _check_levels(pixels, manifest, str(path))


def _npz(path: Path, manifest: Manifest) -> ImageSource:
    images = NpzImages(path)
    channels, height, width = manifest.image_shape
    if images.shape != manifest.image_shape:
        own = [images.count, *images.shape[1:], images.shape[0]]
        raise UserError(f"{path}: arr_0 is {own}; the data set's are [N, {height}, {width}, {channels}]")
    _check_count(images.count, str(path))
    ranges = split_ranges(images.count, PART_IMAGES)

    def read(number: int) -> tuple[Tensor, SamplingCost | None]:
        return _check_levels(images.read(ranges[number]), manifest, str(path)), None

    return ImageSource(
        path.stem,
        ranges,
        read,
        [path.name, *_size_and_mtime(path)],
        {"images": images.count, "samples": "npz"},
    )


def _check_levels(pixels: Tensor, manifest: Manifest, location: str) -> Tensor:
    if int(pixels.max()) >= manifest.levels:
        raise UserError(
            f"{location}: intensity levels up to {int(pixels.max())}; those of {manifest.name} are 0 .. "
            f"{manifest.levels - 1}"
        )
    return pixels


def _check_count(count: int, location: str) -> None:
    if count < 4:
        raise UserError(f"{location} contains {count} images; scores and their errors need at least 4")


def _size_and_mtime(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{printable(str(path))} cannot be read: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns


def digests(images: Tensor) -> Tensor:
    """Return a 64-bit hash of the pixels of each image, int64 [N]."""
    rows = images.cpu().contiguous().flatten(1).numpy()
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.from_numpy(np.frombuffer(b"".join(hashes), dtype=np.int64).copy())


def file_signature(name: str | None) -> list[int] | None:
    """Size and modification time of a local file, to detect its replacement; None if there is no file."""
    path = Path(name or "")
    return list(_size_and_mtime(path)) if path.is_file() else None
