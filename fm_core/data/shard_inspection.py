"""Inspection of one shard: archive structure, labels, CRCs and image digests."""

import hashlib
import tarfile
from dataclasses import dataclass, field
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from fm_core.data.manifest import Manifest, Shard
from fm_core.data.shard_format import decode_png, image_crcs
from fm_core.storage.store import Store

_NO_LABELS = np.empty(0, np.int64)
_NO_DIGESTS = np.empty(0, np.uint64)


@dataclass
class ShardContent:
    """Content of a shard."""

    problem: str = ""
    """The problem, or ""."""
    labels: NDArray[np.int64] = field(default_factory=lambda: _NO_LABELS)
    """Classes, int64 [images]; empty without labels."""
    digests: NDArray[np.uint64] = field(default_factory=lambda: _NO_DIGESTS)
    """64-bit hash of the pixels of each image, uint64 [images]; empty unless pixels were read."""


def inspect_shard(store: Store, manifest: Manifest, shard: Shard, pixels: bool) -> ShardContent:
    """Hash a shard, read its headers and labels and, if `pixels`, every image."""
    if store.sha256(shard.name) != shard.sha256:
        return ShardContent("its SHA-256 is not the manifest's")
    content = ShardContent()
    with store.open(shard.name) as file:
        members = _members(file)
        if isinstance(members, str):
            return ShardContent(members)
        if shard.index_offset is not None:
            _inspect_pngs(file, shard, members, pixels, manifest, content)
        else:
            _inspect_blocks(file, shard, members, pixels, manifest, content)
    if manifest.class_count is None:
        content.labels = _NO_LABELS
    return content


def _members(file: IO[bytes]) -> dict[int, int] | str:
    """Size of each member by its offset, or the problem of the archive."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            members = {member.offset_data: member.size for member in archive}
            end = int(cast(Any, archive).offset)
    except tarfile.TarError as error:
        return f"not a tar archive: {error}"
    file.seek(end)
    # tarfile treats a damaged header as the end of the archive.
    return members if file.read(512) == bytes(512) else f"its header at byte {end} is damaged"


def _inspect_blocks(
    file: IO[bytes],
    shard: Shard,
    members: dict[int, int],
    pixels: bool,
    manifest: Manifest,
    content: ShardContent,
) -> None:
    labels: list[NDArray[np.int64]] = []
    digests: list[NDArray[np.uint64]] = []
    for number, block in enumerate(shard.blocks):
        expected = {block.x_offset: block.x_bytes, block.crc_offset: 4 * block.images}
        if block.y_offset is not None:
            expected[block.y_offset] = 8 * block.images
        if any(members.get(offset - 128) != size + 128 for offset, size in expected.items()):
            content.problem = f"block {number} is not at the offset in the manifest"
            return
        if block.y_offset is not None:
            labels.append(_array(file, block.y_offset, block.images, np.dtype("<i8")))
        if pixels:
            images = _array(file, block.x_offset, block.x_bytes, np.dtype("u1"))
            images = images.reshape(block.images, *manifest.image_shape)
            crcs = _array(file, block.crc_offset, block.images, np.dtype("<u4"))
            content.problem = _pixel_problem(images, crcs, manifest.levels, number)
            if content.problem:
                return
            digests.append(_digests(images))
    content.labels = np.concatenate(labels) if labels else _NO_LABELS
    content.digests = np.concatenate(digests) if digests else _NO_DIGESTS


def _inspect_pngs(
    file: IO[bytes],
    shard: Shard,
    members: dict[int, int],
    pixels: bool,
    manifest: Manifest,
    content: ShardContent,
) -> None:
    assert shard.index_offset is not None
    index = _array(file, shard.index_offset, 4 * shard.images, np.dtype("<i8")).reshape(-1, 4)
    if any(members.get(offset) != size for offset, size in index[:, :2].tolist()):
        content.problem = "an image is not at the offset in the index"
        return
    content.labels = index[:, 2]
    if not pixels:
        return
    digests: list[NDArray[np.uint64]] = []
    for number, (offset, size, _, crc) in enumerate(index.tolist()):
        file.seek(offset)
        image = decode_png(file.read(size))[None]
        content.problem = _pixel_problem(image, np.array([crc], np.uint32), manifest.levels, number)
        if content.problem:
            return
        digests.append(_digests(image))
    content.digests = np.concatenate(digests)


def _pixel_problem(images: NDArray[np.uint8], crcs: NDArray[np.uint32], levels: int, number: int) -> str:
    if not np.array_equal(image_crcs(images), crcs):
        return f"an image of block {number} has the wrong CRC"
    if int(images.max()) >= levels:
        return f"block {number} holds intensity {int(images.max())}; the largest is {levels - 1}"
    return ""


def _digests(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    joined = b"".join(hashlib.blake2b(image.data, digest_size=8).digest() for image in images)
    return np.frombuffer(joined, np.uint64)


def _array(file: IO[bytes], offset: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    file.seek(offset)
    return np.frombuffer(file.read(count * dtype.itemsize), dtype)
