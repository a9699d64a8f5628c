"""Older downsampled ImageNet of van den Oord et al. (2016): PNGs without labels.

train_64x64 and valid_64x64 (or 32x32) as .tar, .zip or folder. It was resized differently from the
.npz set, so likelihoods on the two are not comparable.
"""

from fm_core.config.data import DataSection
from fm_core.data.manifest import Interpretation
from fm_core.data.sources.archive_readers import Archive, FolderArchive
from fm_core.data.sources.base import UNLABELED, SourceFacts
from fm_core.data.sources.file_listing import count_endings, list_files
from fm_core.data.sources.image_collection import (
    FILES_MAX_QUARANTINED,
    FoundImages,
    ImageFileSource,
    in_order,
    pixel_recipe,
    pixel_rules,
    require_counts,
    shuffled,
)
from fm_core.data.sources.tar_archive import open_archive
from fm_core.errors import UserError
from fm_core.storage.store import Store

PUBLISHED = {"train": 1_281_149, "val": 49_999}
STEMS = {"train": "train", "val": "valid"}


class ImagenetPngSource(ImageFileSource):
    """Source of the PNGs, which are not resized."""

    def __init__(self, config: DataSection) -> None:
        source = config.source
        if not source.url or source.image_size not in (32, 64):
            raise UserError(
                "data.source.format imagenet-png needs data.source.url and data.source.image_size 32 or 64"
            )
        self._store = Store.at(source.url)
        self._size, self._partial, self._seed = source.image_size, source.allow_partial, config.split_seed
        super().__init__(
            SourceFacts(
                levels=256,
                image_shape=(3, self._size, self._size),
                recipe={
                    "source": "imagenet-png",
                    "image_size": self._size,
                    "resize": "by the publishers (van den Oord et al.); not the box filter of imagenet-npz",
                    "order_seed": config.split_seed,
                    "allow_partial": self._partial,
                    **pixel_recipe(config),
                },
                max_quarantined=FILES_MAX_QUARANTINED,
                images=None if self._partial else sum(PUBLISHED.values()),
            ),
            "exact",
            pixel_rules(config, orientation=False),
            source.url,
        )

    def find(self) -> FoundImages:
        """Find both splits and check the numbers of images."""
        train, val = self._archive("train"), self._archive("val")
        collections = {"train": shuffled(train, None, self._seed), "val": in_order(val, None)}
        require_counts(self._store.url, collections, PUBLISHED, self._partial)
        return FoundImages(
            collections,
            UNLABELED,
            Interpretation(
                splits=f"train and valid ({len(train.keys):,} and {len(val.keys):,} images)",
                classes="none",
                order="train shuffled by data.split_seed, val by number",
                own_validation=True,
                fair_order=not self._partial,
                not_read=count_endings([*train.others, *val.others]),
            ),
        )

    def _archive(self, split: str) -> Archive:
        stem = f"{STEMS[split]}_{self._size}x{self._size}"
        files = list_files(self._store, depth=1)
        for suffix in (".tar", ".zip"):
            if stem + suffix in files:
                archive = open_archive(self._store, stem + suffix)
                if not archive.keys:
                    raise UserError(f"data.source.url: no images in {self._store.url}/{stem}{suffix}")
                return archive
        folder = Store.at(self._store.url, stem)
        archive = FolderArchive.listed(folder, depth=2)
        if not archive.keys:
            raise UserError(
                f"data.source.url: no {stem}.tar (or .zip, or folder {stem}) under {self._store.url}; "
                "the set is no longer on image-net.org, academictorrents.com has it: put both tars there"
            )
        return archive
