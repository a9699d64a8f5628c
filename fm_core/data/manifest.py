"""Manifest of a sharded data set: its content, byte offsets, and a version that identifies it.

Ids are 0-based positions in a split, in shard order. Intensities are 0 .. levels - 1.
"""

import hashlib
import json
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fm_core.errors import DamagedRecordError, UserError
from fm_core.storage.hashing import Sha256
from fm_core.storage.local_paths import RelativeName
from fm_core.storage.store import Store

MANIFEST_SCHEMA = 1
MANIFEST_NAME = "manifest.json"
REWRITE_MANIFEST = "rewrite it with fm validate --repair"

SAMPLE_TARS = ("samples-", "floats-")
"""Beginnings of the names of tars of samples, which are read like shards (sample_pairs.py)."""

Layout = Literal["block", "image"]
Recipe = dict[str, str | int | bool | None]


class Record(BaseModel):
    """Frozen model of a JSON object; unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Block(Record):
    """Members of a shard with one key: images, their labels and their CRCs."""

    images: int = Field(ge=1)
    """Number of images in the block."""
    x_offset: int
    """Offset of the first pixel in the shard in bytes, after the tar and .npy headers."""
    x_bytes: int
    """Size of the pixels in bytes, uint8 [images, channels, height, width]."""
    y_offset: int | None = None
    """Offset of the labels, int64 [images]; None without labels."""
    y_bytes: int | None = None
    """Size of the labels in bytes; None without labels."""
    crc_offset: int
    """Offset of the CRC-32s of the images, uint32 [images]."""


class Shard(Record):
    """One tar file."""

    name: RelativeName
    """File name in the data set's folder."""
    split: str
    """train, or val for validation."""
    bytes: int
    """Size of the file in bytes."""
    sha256: Sha256
    """SHA-256 of the file, in hexadecimal."""
    images: int = Field(ge=1)
    """Number of images in the shard."""
    first_id: int = Field(ge=0)
    """Id of its first image in the split."""
    blocks: tuple[Block, ...]
    """Blocks in order; none in layout image."""
    index_offset: int | None = None
    """Layout image: offset of int64 [images, 4]: offset and size of the PNG, label or -1, CRC-32."""


class Split(Record):
    """Counts and moments of one split."""

    images: int
    """Number of images in the split."""
    class_histogram: tuple[int, ...] | None
    """Number of images of each class; None without labels."""
    channel_mean: tuple[float, ...]
    """Mean of each channel, in intensity levels."""
    channel_std: tuple[float, ...]
    """Standard deviation of each channel over all pixels, in intensity levels."""


class Input(Record):
    """Source file of a data set."""

    name: str
    """Path relative to data.source.url; for a folder of images the folder itself."""
    bytes: int
    """Size in bytes; 0 for a folder."""
    digest: str
    """Identifies the content, e.g. "sha256:..." or "crc32:..." (from a zip's directory)."""


class Packing(Record):
    """How images are packed into shards."""

    layout: Layout = "block"
    """block: members are arrays of many images; image: members are PNGs."""
    block_images: int = Field(ge=1)
    """Source rows per block."""
    shard_blocks: int = Field(ge=1)
    """Blocks per shard."""

    @property
    def shard_images(self) -> int:
        """Source rows per shard."""
        return self.block_images * self.shard_blocks


class Quarantine(Record):
    """Images that were left out as unreadable."""

    images: int = 0
    """Number of images; each has a line in quarantine.jsonl."""
    reasons: dict[str, int] = {}
    """Number of images for each reason."""


class Interpretation(Record):
    """How a source was interpreted, for users to check. It is not part of the version."""

    splits: str = ""
    """Where training and validation images came from, and which splits were ignored."""
    classes: str = ""
    """Description of the classes."""
    pixels: str = ""
    """Orientation, transparency and range of values."""
    order: str = ""
    """Order of the images in the shards."""
    own_validation: bool = False
    """Whether the source has validation images, so that data.validation_images has no effect."""
    fair_order: bool = False
    """Whether the first images of a split are a representative sample of it."""
    not_read: dict[str, int] = {}
    """Number of files that are not images, by extension."""
    remarks: tuple[str, ...] = ()
    """Other notes, e.g. classes without training images."""

    def lines(self) -> list[str]:
        """The interpretation as lines of text."""
        named = {"splits": self.splits, "classes": self.classes, "pixels": self.pixels, "order": self.order}
        endings = ", ".join(f"{count:,} {ending}" for ending, count in self.not_read.items())
        return [
            *(f"{name}: {text}" for name, text in named.items() if text),
            *([f"not read: {endings}"] if endings else []),
            *(f"note: {remark}" for remark in self.remarks),
        ]


class Manifest(Record):
    """Description of a complete data set."""

    schema_version: Literal[1] = MANIFEST_SCHEMA
    """Schema version of the file."""
    name: RelativeName
    """data.name."""
    levels: int = Field(ge=2, le=256)
    """Number of intensity levels: 256 for photographs, 17 for the digits."""
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    class_count: int | None
    """Number of classes; labels are 0 .. class_count - 1. None without labels."""
    label_order: str
    """Name of the order of the classes; "none" without labels."""
    class_names: tuple[str, ...] | None = None
    """Name of each class, if the source has names."""
    packing: Packing
    """How images are packed into shards."""
    recipe: Recipe
    """How the pixels were produced; scores are comparable only between data sets of equal recipes."""
    inputs: tuple[Input, ...] = ()
    """Source files. They are not part of the version; the hashes of the shards are."""
    splits: dict[str, Split]
    """Splits by name: train, and val for validation."""
    shards: tuple[Shard, ...]
    """All shards, train first."""
    quarantine: Quarantine = Quarantine()
    """Images that were left out as unreadable."""
    interpretation: Interpretation | None = None
    """How the source was read; None in manifests of earlier versions."""
    source_url: str | None = None
    """Where the images came from; None for the digits and in manifests of earlier versions."""

    @property
    def version(self) -> str:
        """SHA-256, in hexadecimal, of shard hashes, label order, recipe and image format."""
        content = {
            "levels": self.levels,
            "image_shape": self.image_shape,
            "class_count": self.class_count,
            "label_order": self.label_order,
            "recipe": self.recipe,
            "shards": [(shard.name, shard.split, shard.images, shard.sha256) for shard in self.shards],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def split_shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split, in id order; UserError for a split that does not exist."""
        if split not in self.splits:
            raise UserError(f"data set {self.name} has no split {split!r}, only {', '.join(self.splits)}")
        return tuple(shard for shard in self.shards if shard.split == split)

    def to_json(self) -> str:
        """The manifest as JSON, including its version."""
        tree = {**self.model_dump(mode="json"), "version": self.version}
        return json.dumps(tree, indent=1) + "\n"


def load_manifest(root_url: str, name: str) -> Manifest:
    """Read <root_url>/<name>/manifest.json.

    Raises UserError if it is missing, has another schema, or was modified.
    """
    store = Store.at(root_url, name)
    try:
        text = store.read_bytes(MANIFEST_NAME)
    except FileNotFoundError:
        raise UserError(
            f"{store.url}/{MANIFEST_NAME} is missing: the data set {name} is not complete; "
            f"run fm shard with data.root {root_url} and data.name {name}"
        ) from None
    return parse_manifest(text, where=f"{store.url}/{MANIFEST_NAME}")


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Parse and validate a manifest.

    Raises DamagedRecordError, or UserError for another schema; both name `where`.
    """
    tree = read_record(text, where, MANIFEST_SCHEMA, REWRITE_MANIFEST)
    version = tree.pop("version", None)
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DamagedRecordError(f"{where}: {key}: {first['msg']}; {REWRITE_MANIFEST}") from None
    if version != manifest.version:
        raise DamagedRecordError(
            f"{where}: altered since it was written (its content has version {manifest.version}); "
            f"{REWRITE_MANIFEST}"
        )
    return manifest


def read_record(text: bytes, where: str, schema: int, remedy: str) -> dict[str, Any]:
    """Parse JSON with a `schema_version`; `remedy` is what the user can do if it is damaged.

    Raises DamagedRecordError for invalid JSON, UserError if its version is not `schema`.
    """
    try:
        tree: object = json.loads(text)
    except ValueError:
        raise DamagedRecordError(f"{where}: not valid JSON; {remedy}") from None
    version = cast(dict[str, Any], tree).get("schema_version") if isinstance(tree, dict) else None
    if version != schema:
        raise UserError(f"{where}: schema version {version}; this program reads version {schema}")
    return cast(dict[str, Any], tree)


def repair_command(shard: str) -> str:
    """The command that makes a missing or damaged shard again, for messages; `shard` is its file name."""
    return "fm sample" if shard.startswith(SAMPLE_TARS) else "fm validate --repair"
