"""Where images come from."""

from fm_core.config.data import DataSection
from fm_core.data.sources.base import DataSource
from fm_core.data.sources.cifar10 import Cifar10Source
from fm_core.data.sources.detect import detect
from fm_core.data.sources.digits import DigitsSource
from fm_core.data.sources.folder import FolderSource
from fm_core.data.sources.imagenet_ilsvrc import ImagenetOriginalSource
from fm_core.data.sources.imagenet_npz import ImagenetNpzSource
from fm_core.data.sources.imagenet_png import ImagenetPngSource
from fm_core.data.sources.parquet import ParquetSource
from fm_core.errors import UserError


def open_source(config: DataSection, found: str | None = None) -> DataSource:
    """The source that data.source names, or `found`, or what is detected, if it names none.

    But for detection nothing is read yet; UserError for keys that are missing.
    """
    kind = config.source.format
    if kind == "auto":
        kind = found or (detect(config.source.url) if config.source.url else "digits")
    match kind:
        case "digits":
            return DigitsSource(config)
        case "imagenet-npz":
            return ImagenetNpzSource(config.source)
        case "imagenet-png":
            return ImagenetPngSource(config)
        case "imagenet-folder" | "imagenet-tar":
            return ImagenetOriginalSource(config, kind)
        case "folder":
            return FolderSource(config)
        case "parquet":
            return ParquetSource(config)
        case "cifar10":
            return Cifar10Source(config)
        case _:
            raise UserError(f"data.source.format: {kind} is unknown to this program")
