"""Where images come from."""

from fm_core.config.data import DataSection
from fm_core.data.sources.base import Source
from fm_core.data.sources.digits import DigitsSource
from fm_core.data.sources.imagenet_npz import ImagenetNpzSource


def open_source(config: DataSection, found: str | None = None) -> Source:
    """The source that data.source names, or `found` if it names none.

    Nothing is read yet; UserError for keys that are missing.
    """
    if config.source.format == "digits":
        return DigitsSource(config)
    return ImagenetNpzSource(config.source)
