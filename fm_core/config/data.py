"""The data section of the configuration tree."""

from typing import Literal

from pydantic import Field

from fm_core.config.section import Name, Section


class SourceSection(Section):
    """Where the images come from."""

    format: Literal["digits", "imagenet-npz"] = "digits"
    """digits: scikit-learn's handwritten digits; imagenet-npz: downsampled ImageNet (Chrabaszcz et al.)."""
    url: str | None = None
    """Folder or fsspec URL that holds the archives; not needed for digits."""
    image_size: Literal[8, 16, 32, 64] | None = None
    """imagenet-npz: which of the four published sizes, in pixels."""
    allow_partial: bool = False
    """Take a source that holds fewer images than the published set; its recipe then says so."""


class DataSection(Section):
    """The data set: its source and its shards."""

    root: str = "datasets"
    """fsspec URL under which data sets are written, as <data.root>/<data.name>."""
    name: Name = "digits"
    """Name of the sharded data set."""
    source: SourceSection = SourceSection()
    """Where the images come from."""
    validation_images: int = Field(default=500, ge=1)
    """Images held out by a seeded permutation, for sources without a split of their own."""
    split_seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of that permutation; it is part of the data set, not of the run."""
    block_bytes: int = Field(default=12 * 2**20, ge=1024)
    """Bytes of pixels in one member pair of a shard."""
    shard_blocks: int = Field(default=8, ge=1)
    """Member pairs in one shard."""
    cache: str | None = None
    """Local folder for copies of remote shards, shared by the processes of a node; by default in TMPDIR."""
    horizontal_flip: bool = False
    """Flip images left to right with probability 1/2, keyed by the stream position."""
