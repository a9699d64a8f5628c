"""The data section of the configuration tree."""

from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator

from fm_core.config.location import Location
from fm_core.config.section import Name, Section

SourceFormat = Literal[
    "auto",
    "digits",
    "imagenet-npz",
    "imagenet-png",
    "imagenet-folder",
    "imagenet-tar",
    "folder",
    "parquet",
    "webdataset",
    "cifar10",
]


BACKGROUND = r"^(white|black|gray|#[0-9a-fA-F]{6})$"


class SourceSection(Section):
    """Source of the images."""

    format: SourceFormat = "digits"
    """digits: scikit-learn's handwritten digits; imagenet-npz: downsampled ImageNet (Chrabaszcz et al.);
    imagenet-png: the older one (van den Oord et al.); imagenet-folder, imagenet-tar: the originals of
    ILSVRC2012; folder: images in folders, zips or tars, split and class from folder names; parquet: columns
    of images and labels; webdataset: tars with an image and a .cls, .json or .txt per sample; cifar10: the
    python archive; auto: detected from the files at the URL."""
    url: Location | None = None
    """Folder or fsspec URL (s3://, hf://datasets/..., ...) that holds the files; not for digits.
    folder and webdataset also take the URL of a .zip or .tar, webdataset with braces: {000000..000146}.tar
    is 147 tars."""
    image_size: int | None = Field(default=None, ge=4, le=1024)
    """Height and width in pixels: the published size to use, or the size that originals are resized to."""
    resize: Literal["squash-box", "crop-adm", "exact"] = "squash-box"
    """How originals are resized. squash-box: the full image to a square, box filter (as Chrabaszcz et al.);
    crop-adm: halve by the box filter, bicubic to the size, center crop (as ADM, EDM2); exact: images must
    already have the size."""
    image_column: str = "image"
    """parquet: column of encoded images or of arrays."""
    label_column: str | None = "label"
    """parquet: column of 0-based classes; webdataset: key of the class in a .json; null for no labels."""
    background: str = Field(default="white", pattern=BACKGROUND)
    """Color under transparent pixels: white, black, gray, or "#rrggbb"."""
    value_range: tuple[float, float] | None = None
    """Values of black and white, e.g. [0, 1] or [-1, 1]. Required for floats and 32-bit integers; optional
    for 16-bit integers (default 0 and 65535) and 8-bit arrays in parquet; not used for 8-bit image files."""
    allow_partial: bool = False
    """Accept a source with fewer images than the published set; its recipe records this."""

    @model_validator(mode="before")
    @classmethod
    def _default_format_to_auto(cls, keys: Any) -> Any:
        # A preset's format (tree.py `config_class`) is kept when only a URL is given.
        named = cls.model_fields["format"].default != "digits"
        if isinstance(keys, dict) and keys.get("url") and "format" not in keys and not named:
            return {**cast(dict[str, Any], keys), "format": "auto"}
        return keys

    @model_validator(mode="after")
    def _format_reads_its_keys(self) -> Self:
        pixels = ("background", "value_range")
        unread: dict[str, tuple[str, ...]] = {"digits": ("url", "image_size", "resize", *pixels)}
        unread |= dict.fromkeys(("imagenet-npz", "cifar10"), ("resize", *pixels))
        unread["imagenet-png"] = ("resize",)
        for key in unread.get(self.format, ()):
            if getattr(self, key) != SourceSection.model_fields[key].default:
                raise ValueError(f"data.source.{key} is not used by format {self.format}: remove it")
        if self.value_range and not self.value_range[0] < self.value_range[1]:
            raise ValueError(
                f"data.source.value_range is {list(self.value_range)}: the value of black is the smaller one"
            )
        return self


class PairsSection(Section):
    """Training pairs for reflow: the samples of another run, each with the noise that it was made from."""

    samples: Location | None = None
    """Folder or fsspec URL of a complete sample set, as fm sample writes it, or of a folder above that holds
    one; the noise is regenerated from its seed. By default training images are those of the data set, which
    in any case remains what scores and bits/dim compare with."""
    validation_images: int | None = Field(default=None, ge=0)
    """Number of pairs, the last of the set, that are not trained on and whose loss is the validation loss; by
    default 500, or a tenth of the pairs if there are fewer than 1,500."""

    @model_validator(mode="after")
    def _check_switch(self) -> Self:
        if self.set_without("samples", "validation_images"):
            raise ValueError("data.pairs.validation_images does nothing without data.pairs.samples")
        return self


class DataSection(Section):
    """Data set: its source, its shards and the order in which they are read."""

    root: Location = "datasets"
    """fsspec URL of the folder of data sets; this one is <data.root>/<data.name>."""
    name: Name = "digits"
    """Name of the sharded data set; by default that of the folder at data.source.url, if it is set. A default
    name is refused if a data set of that name was made from another URL; an explicit name is not."""
    source: SourceSection = SourceSection()
    """Source of the images."""
    validation_images: int = Field(default=500, ge=1)
    """Number of validation images, chosen by a seeded permutation, for sources without a validation split; by
    default 500, or a tenth of the images if there are fewer than 1,500."""
    split_seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of that permutation; part of the data set, not of the run."""
    block_bytes: int = Field(default=12 * 2**20, ge=1024)
    """Pixels in one block (member pair) of a shard, in bytes."""
    shard_blocks: int = Field(default=8, ge=1)
    """Blocks (member pairs) per shard."""
    layout: Literal["block", "image"] = "block"
    """block: members are arrays of many images, fast to read; image: members are PNGs, for other tools."""
    label_map: Location | None = None
    """File that renumbers classes: map_clsloc.txt (to the order of sorted WordNet ids) or lines "old new"."""
    max_quarantined: float | None = Field(default=None, ge=0, le=1)
    """Largest fraction of unreadable images to leave out; by default 0 for arrays, 1e-4 for files."""
    workers: int | None = Field(default=None, ge=1)
    """Number of processes that write shards; by default one per core. It does not affect the contents."""
    cache: Location | None = None
    """Local folder for copies of remote shards, shared by the processes of a node. No other user may be able
    to write to it. By default below XDG_CACHE_HOME, or TMPDIR if that is not set."""
    cache_bytes: int | None = Field(default=None, ge=2**20)
    """Largest size of that folder in bytes; unlimited by default."""
    order: Literal["full", "blocks"] = "full"
    """full: a permutation of all images each epoch; blocks: shuffled blocks and windows, for a small disk."""
    virtual_ranks: int = Field(default=64, ge=1)
    """order blocks: number of streams shared by the processes; the number of processes must divide it."""
    window_blocks: int = Field(default=8, ge=1)
    """order blocks: number of blocks among which a virtual rank shuffles."""
    horizontal_flip: bool = False
    """Flip images left to right with probability 1/2, keyed by stream position."""
    pairs: PairsSection = PairsSection()
    """Training pairs of another run's samples and their noise, in place of images and new noise (reflow)."""
