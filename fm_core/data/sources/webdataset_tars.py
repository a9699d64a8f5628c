"""WebDataset tars of any origin: an image and a .cls, .json or .txt per sample.

The webdataset package determines which files form a sample, how braces in URLs expand and how fields are
decoded. Only the tar headers are read here, because samples are read in a random order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fm_core.config.data import DataSection
from fm_core.data.manifest import Input, Interpretation
from fm_core.data.sources.archive_readers import IMAGE_SUFFIXES, ArchiveGroup
from fm_core.data.sources.base import UNLABELED, Classes
from fm_core.data.sources.class_folders import classes_of, describe_classes, ordered, untrained_numbers
from fm_core.data.sources.file_listing import composed, count_endings, list_files, printable, state_of
from fm_core.data.sources.image_collection import (
    FoundImages,
    ImageCollection,
    ImageFileSource,
    image_file_facts,
    pixel_rules,
)
from fm_core.data.sources.scratch_folder import ScratchFolder
from fm_core.data.sources.split_conflicts import splits_of_data_files
from fm_core.data.sources.split_selection import assign_rows, choose_splits, describe_choice, left_alone
from fm_core.data.sources.split_words import split_of_folder
from fm_core.data.sources.tar_archive import TarArchive
from fm_core.errors import UserError
from fm_core.storage.store import Store

IMAGE_FIELDS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
LABEL_FIELDS = ("cls", "json", "txt")
CAPTION_SHARE = 0.5
"""Texts are captions, not classes, if more than this fraction of them is distinct."""

Sample = dict[str, Any]


class WebDatasetSource(ImageFileSource):
    """Samples of WebDataset tars. Tars at a remote URL are first copied to this node."""

    def __init__(self, config: DataSection) -> None:
        source = config.source
        extra = {"label_field": source.label_column, "validation_images": config.validation_images}
        super().__init__(
            image_file_facts(config, "webdataset", extra),
            source.resize,
            pixel_rules(config, True),
            str(source.url),
        )
        self._field = source.label_column
        self._validation_images, self._seed = config.validation_images, config.split_seed
        self._copies: list[ScratchFolder] = []
        self._places: dict[str, tuple[Store, str]] = {}

    def find(self) -> FoundImages:
        """Read the headers of all tars, choose the splits, and read the labels."""
        self._places = self._tars()
        tars = {name: TarArchive(*self._local(*place)) for name, place in self._places.items()}
        group = ArchiveGroup(list(tars.items()))
        numbers = {key: number for number, key in enumerate(group.keys)}
        rows: dict[str | None, list[int]] = {}
        tars_of: dict[str | None, list[str]] = {}
        labels: dict[int, int | str] = {}
        captions = unlabeled = without_image = 0
        split_of = splits_of_data_files(sorted(tars), self._url)
        for name, split in split_of.items():
            tar = tars[name]
            read = partial(_read_member, tar, name)
            for sample in samples_of(name, tar, self._url):
                image = _image_of(sample)
                if image is None:
                    without_image += 1
                    continue
                # A tar without a split in its name may contain a folder for each split.
                inner = split or _split_within(image[len(name) + 1 :])
                rows.setdefault(inner, []).append(numbers[image])
                if name not in tars_of.setdefault(inner, []):
                    tars_of[inner].append(name)
                label = None if self._field is None else self._label_of(sample, read)
                if label is None:
                    unlabeled += 1
                else:
                    labels[numbers[image]] = label
                    captions += isinstance(label, str) and "txt" in sample
            tar.close()
        if not rows:
            raise UserError(
                f"data.source.url: no samples with an image (jpg, png, webp, ...) in the tars of {self._url}"
            )
        remarks = [f"{without_image:,} samples have no image"] if without_image else []
        if captions and len(set(labels.values())) > max(1, CAPTION_SHARE * len(labels)):
            remarks.append("the .txt files are captions, not classes: no labels")
            labels = {}

        if self._field is not None and not labels and not captions and any(map(_is_label_file, group.others)):
            remarks.append(f"no labels: none in the .cls, .json (key {self._field}) and .txt files")

        def usable(split: str) -> bool:
            return split == "val" or not labels or _valid(labels.get(number) for number in rows[split])

        def describe(split: str | None) -> str:
            of = tars_of[split]
            return f"{len(of)} tars, {printable(of[0])} first ({len(rows[split]):,} samples)"

        choice = choose_splits(list(rows), self._url, usable)
        used = {number: labels.get(number) for split in choice.used for number in rows[split]}
        classes, table = self._classes(used, len(numbers), group.keys) if labels else (UNLABELED, None)
        arrays: dict[str | None, NDArray[np.int64]] = {
            split: np.array(members, np.int64) for split, members in rows.items()
        }
        selected = assign_rows(choice, arrays, self._validation_images, self._seed)
        untrained = [] if table is None else untrained_numbers(classes, table[arrays[choice.train]])
        others = (path for path in group.others if not _is_label_file(path))
        return FoundImages(
            {split: ImageCollection(group, table, members) for split, members in selected.items()},
            classes,
            Interpretation(
                splits=describe_choice(choice, describe, self._validation_images),
                classes=describe_classes(classes),
                order="all splits shuffled by data.split_seed",
                own_validation=choice.own_validation,
                fair_order=True,
                not_read=count_endings(others),
                remarks=(*left_alone(choice, describe), *untrained, *remarks),
            ),
        )

    def inputs(self) -> Sequence[Input]:
        """The tars, by their names at the URL."""
        return [item.model_copy(update={"name": printable(item.name)}) for item in super().inputs()]

    def state(self) -> str:
        """State of the tars at the URL, because that of their copies changes with each copy."""
        self.parts()
        return " ".join(state_of(store, [name]) for store, name in self._places.values())

    def release(self) -> None:
        """Remove the copies of remote tars."""
        for copy in self._copies:
            copy.remove()
        self._copies, self._images = [], None

    def _tars(self) -> dict[str, tuple[Store, str]]:
        """Store and name of each tar, by its name for messages and splits."""
        import webdataset  # imported here, because it takes half a second

        urls = cast(list[str], cast(Any, webdataset).shardlists.expand_urls(self._url))
        tars: dict[str, tuple[Store, str]] = {}
        folders = [url.rstrip("/").rpartition("/")[0].split("/") for url in urls]
        levels = enumerate(zip(*folders, strict=False))
        # Folders common to all tars do not indicate a split.
        above = next((depth for depth, names in levels if len(set(names)) > 1), min(map(len, folders)))
        for url in urls:
            folder, _, name = url.rstrip("/").rpartition("/")
            if name.lower().endswith(".tar"):
                store = Store.at(folder or ("/" if url.startswith("/") else "."))
                if store.size(name) is None:
                    raise UserError(f"data.source.url: {url} does not exist")
                tars["/".join(url.rstrip("/").split("/")[above:])] = (store, name)
                continue
            store = Store.at(url)
            for path in list_files(store, depth=None):
                if path.lower().endswith(".tar"):
                    tars[path] = (store, path)
        if not tars:
            raise UserError(
                f"data.source.url: no .tar files at {self._url}; name a folder, or tars with braces such as "
                "train-{000000..000146}.tar"
            )
        return tars

    def _local(self, store: Store, name: str) -> tuple[Store, str]:
        """The tar on this node; a remote one is copied."""
        if store.local is not None:
            return store, name
        size = store.size(name) or 0
        scratch = ScratchFolder(f"{store.url}/{name} {size} {state_of(store, [name])}")
        target = name.rsplit("/", 1)[-1]
        folder = scratch.fill(lambda path: store.fetch(name, path / target), size)
        self._copies.append(scratch)
        return Store.at(str(folder)), target

    def _label_of(self, sample: Mapping[str, Any], read: Callable[[str], bytes]) -> int | str | None:
        """The class in the fields of a sample, an integer or a name; None if there is none."""
        from webdataset import autodecode

        for field in LABEL_FIELDS:
            if field not in sample:
                continue
            content = read(sample[field])
            try:
                value = cast(Any, autodecode).basichandlers(field, content)
            except ValueError:
                value = content.decode("utf-8", "replace")
            if field == "json":
                value = cast(dict[str, Any], value).get(str(self._field)) if isinstance(value, dict) else None
            if isinstance(value, str):
                text = composed(value.strip())
                value = int(text) if text.lstrip("-").isdecimal() else text
            if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
                continue
            return value
        return None

    def _classes(
        self, used: Mapping[int, int | str | None], count: int, keys: Sequence[str]
    ) -> tuple[Classes, NDArray[np.int64]]:
        """The classes, and the class of each image of the group, int64; UserError if some have none."""
        missing = [number for number, label in used.items() if label is None]
        if missing:
            raise UserError(
                f"data.source.url: {len(missing):,} of {len(used):,} samples have no label, first "
                f"{printable(keys[missing[0]])}; set data.source.label_column to null to leave all out"
            )
        table = np.full(count, -1, np.int64)
        if all(isinstance(label, int) for label in used.values()):
            numbers = {number: int(cast(int, label)) for number, label in used.items()}
            if min(numbers.values()) < 0:
                raise UserError(
                    f"{self._url}: a sample has class {min(numbers.values())}; classes start at 0"
                )
            classes = Classes(max(numbers.values()) + 1, "webdataset-cls")
        else:
            names = {number: str(label) for number, label in used.items()}
            in_order = {name: number for number, name in enumerate(ordered(set(names.values())))}
            classes = classes_of(set(names.values()))
            numbers = {number: in_order[name] for number, name in names.items()}
        table[list(numbers)] = list(numbers.values())
        return classes, table


def _split_within(path: str) -> str | None:
    """Split of a file in a tar by its folders."""
    return next((kind for name in path.split("/")[:-1] if (kind := split_of_folder(name))), None)


def _is_label_file(path: str) -> bool:
    return path.rsplit(".", 1)[-1].lower() in LABEL_FIELDS


def _read_member(tar: TarArchive, name: str, key: str) -> bytes:
    """Content of a file by its key in the group of tars."""
    return tar.read_other(key[len(name) + 1 :])


def samples_of(name: str, tar: TarArchive, url: str) -> Iterator[Sample]:
    """The samples of a tar, grouped by the webdataset package: field -> key in the group of tars.

    Raises UserError for two files of one sample and field.
    """
    from webdataset import tariterators

    package = cast(Any, tariterators)
    paths = [path for path in (*tar.keys, *tar.others) if not path.rsplit("/", 1)[-1].startswith("__")]
    paths.sort(key=lambda path: (package.base_plus_ext(path)[0] or "", path))
    files = ({"fname": path, "data": f"{name}/{path}", "__url__": url} for path in paths)
    try:
        yield from package.group_by_keys(files)
    except ValueError as error:
        raise UserError(f"{url}: {printable(name)}: {error.args[0].split(' dict_keys')[0]}") from None


def _image_of(sample: Mapping[str, Any]) -> str | None:
    """Key of the image of a sample: a field such as jpg, or else the only field that ends in it."""
    for field in IMAGE_FIELDS:
        if field in sample:
            return str(sample[field])
    fields = [field for field in sample if field.rsplit(".", 1)[-1] in IMAGE_FIELDS]
    return str(sample[fields[0]]) if len(fields) == 1 else None


def _valid(labels: Iterator[int | str | None]) -> bool:
    """Whether any sample has a class; classes of a test set are often all -1."""
    return any(label not in (None, -1) for label in labels)
