"""Sources of images, by the format of data.source."""

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
from fm_core.data.sources.webdataset_tars import WebDatasetSource
from fm_core.errors import UserError


def open_source(config: DataSection, detected: str | None = None, val_by_number: bool = False) -> DataSource:
    """Open the source of data.source; format auto means `detected`, or the format detected at the URL.

    `val_by_number`: imagenet-folder keeps the order of validation images in class folders, as earlier
    versions did. Files are listed only for detection. Raises UserError for missing keys or an unknown format.
    """
    kind = config.source.format
    if kind == "auto":
        kind = detected or (detect(config.source.url) if config.source.url else "digits")
    match kind:
        case "digits":
            return DigitsSource(config)
        case "imagenet-npz":
            return ImagenetNpzSource(config.source)
        case "imagenet-png":
            return ImagenetPngSource(config)
        case "imagenet-folder" | "imagenet-tar":
            return ImagenetOriginalSource(config, kind, val_by_number)
        case "folder":
            return FolderSource(config)
        case "parquet":
            return ParquetSource(config)
        case "webdataset":
            return WebDatasetSource(config)
        case "cifar10":
            return Cifar10Source(config)
        case _:
            raise UserError(f"data.source.format: {kind} is not a format of this version")
