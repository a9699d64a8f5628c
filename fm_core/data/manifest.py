"""The manifest: what a sharded data set holds, where, and the hash that names its content.

Ids are 0-based positions in a split, in the order of the shards. Grey values are 0 .. levels - 1.
"""

import hashlib
import json
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fm_core.errors import DamagedRecordError, UserError
from fm_core.storage.store import Store

MANIFEST_SCHEMA = 1
MANIFEST_NAME = "manifest.json"

Layout = Literal["block", "image"]
Recipe = dict[str, str | int | bool | None]


class Record(BaseModel):
    """A closed, frozen piece of JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Block(Record):
    """One group of members of a shard: images, their labels and their CRCs."""

    images: int = Field(ge=1)
    """Images in the block."""
    x_offset: int
    """Where the first pixel is in the shard, in bytes: past the tar and .npy headers."""
    x_bytes: int
    """Bytes of pixels, uint8 [images, channels, height, width]."""
    y_offset: int | None = None
    """Where the labels are, int64 [images]; None without labels."""
    y_bytes: int | None = None
    """Bytes of labels; None without labels."""
    crc_offset: int
    """Where the CRC-32s of the images are, uint32 [images]."""


class Shard(Record):
    """One tar file."""

    name: str
    """File name in the data set's folder."""
    split: str
    """train or val."""
    bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    images: int = Field(ge=1)
    """Images in the shard."""
    first_id: int = Field(ge=0)
    """Id of its first image in the split."""
    blocks: tuple[Block, ...]
    """Its blocks, in order; none in layout image."""
    index_offset: int | None = None
    """Layout image: where int64 [images, 4] is: offset and bytes of the PNG, label or -1, CRC-32."""


class Split(Record):
    """Counts and moments of one split."""

    images: int
    """Images in the split."""
    class_histogram: tuple[int, ...] | None
    """Images of each class; None without labels."""
    channel_mean: tuple[float, ...]
    """Mean of each channel, in grey levels."""
    channel_std: tuple[float, ...]
    """Standard deviation of each channel over all pixels, in grey levels."""


class Input(Record):
    """A file that the data set was made from."""

    name: str
    """Path below data.source.url; for a folder of images the folder itself."""
    bytes: int
    """Size; 0 for a folder."""
    digest: str
    """What identifies its content, e.g. "sha256:..." or "crc32:..." (from a zip's directory)."""


class Packing(Record):
    """How images are laid into shards."""

    layout: Layout = "block"
    """block: arrays of many images a member; image: one PNG a member."""
    block_images: int = Field(ge=1)
    """Rows of the source in one block."""
    shard_blocks: int = Field(ge=1)
    """Blocks in one shard."""

    @property
    def shard_images(self) -> int:
        """Rows of the source in one shard."""
        return self.block_images * self.shard_blocks


class Quarantine(Record):
    """Images that were left out."""

    images: int = 0
    """How many; each has a line in quarantine.jsonl."""
    reasons: dict[str, int] = {}
    """How many for each reason."""


class Manifest(Record):
    """A whole data set."""

    schema_version: Literal[1] = MANIFEST_SCHEMA
    """Version of this file's form."""
    name: str
    """data.name."""
    levels: int = Field(ge=2, le=256)
    """Number of grey levels: 256 for photographs, 17 for the digits."""
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    class_count: int | None
    """Number of classes; labels are 0 .. class_count - 1. None without labels."""
    label_order: str
    """Name of the order of the classes; "none" without labels."""
    class_names: tuple[str, ...] | None = None
    """Name of each class, where the source tells."""
    packing: Packing
    """How images are laid into shards."""
    recipe: Recipe
    """How the pixels came about; two data sets compare only under equal recipes."""
    inputs: tuple[Input, ...] = ()
    """The source's files. They do not enter the version: the shards' hashes do."""
    splits: dict[str, Split]
    """By name: train, val."""
    shards: tuple[Shard, ...]
    """All shards, train first."""
    quarantine: Quarantine = Quarantine()
    """Images that were left out."""

    @property
    def version(self) -> str:
        """SHA-256, in hexadecimal, of the content that matters: shard hashes, labels' order, recipe."""
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
        """The shards of one split, in the order of ids; UserError for a split that is not there."""
        if split not in self.splits:
            raise UserError(f"data set {self.name} has no split {split!r}, only {', '.join(self.splits)}")
        return tuple(shard for shard in self.shards if shard.split == split)

    def to_json(self) -> str:
        """JSON with the version spelled out for readers of the file."""
        tree = {**self.model_dump(mode="json"), "version": self.version}
        return json.dumps(tree, indent=1) + "\n"


def load_manifest(root_url: str, name: str) -> Manifest:
    """Read <root_url>/<name>/manifest.json.

    Raises UserError, in one line, if it is missing, of another schema, or was altered.
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
    """Check and read a manifest's JSON.

    Raises DamagedRecordError or, of another schema, UserError; both name `where`.
    """
    tree = read_record(text, where, MANIFEST_SCHEMA)
    version = tree.pop("version", None)
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DamagedRecordError(f"{where}: {key}: {first['msg']}; run fm validate on the data set") from None
    if version != manifest.version:
        raise DamagedRecordError(f"{where}: altered since it was written: its version is {manifest.version}")
    return manifest


def read_record(text: bytes, where: str, schema: int) -> dict[str, Any]:
    """Parse JSON that carries `schema_version`.

    Raises DamagedRecordError where it is no JSON, UserError where its version is not `schema`.
    """
    try:
        tree: object = json.loads(text)
    except ValueError:
        raise DamagedRecordError(f"{where}: not JSON; write it again with fm shard") from None
    found = cast(dict[str, Any], tree).get("schema_version") if isinstance(tree, dict) else None
    if found != schema:
        raise UserError(f"{where}: schema version {found}; this program reads version {schema}")
    return cast(dict[str, Any], tree)
