"""Small inputs of sharding with the right answer of each, read back without the reader of the project."""

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from fm_core.config.data import DataSection, SourceSection
from tests.support.photographs import tar_of, write_tree

SIZE = 8
Expected = dict[str | int | None, list[int]]
"""Class (None without labels) -> the numbers of its images."""


def pixels(number: int) -> np.ndarray:
    """A picture that tells its number: uint8 [8, 8, 3]."""
    return np.full((SIZE, SIZE, 3), (number % 256, number // 256, 77), np.uint8)


def picture(number: int, kind: str = "png", **options: Any) -> bytes:
    return encode(Image.fromarray(pixels(number)), kind, **options)


def encode(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tree(files: Mapping[str, int | bytes]) -> dict[str, bytes]:
    """Contents by path; a number stands for its picture."""
    return {name: picture(value) if isinstance(value, int) else value for name, value in files.items()}


def zip_of(files: Mapping[str, int | bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in tree(files).items():
            archive.writestr(name, content)
    return file.getvalue()


def tar(files: Mapping[str, int | bytes]) -> bytes:
    return tar_of(tree(files))


def parquet(
    numbers: list[int], labels: list[Any] | None = None, names: list[str] | None = None, column: Any = None
) -> bytes:
    """A parquet file of pictures as the hub has them; `column` replaces the images."""
    images = column if column is not None else [{"bytes": picture(n), "path": None} for n in numbers]
    columns = {"image": images} | ({} if labels is None else {"label": labels})
    table = pyarrow.table(columns)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=3)
    return file.getvalue()


@dataclass(frozen=True)
class Case:
    """An input and its right answer."""

    name: str
    files: Mapping[str, int | bytes] | Callable[[Path], None]
    train: Expected | None = None
    val: Expected | None = None
    both: Expected | None = None
    """Training and validation images together, where validation is chosen at random."""
    classes: list[str] | None = None
    """Names of the classes in their order, if that matters."""
    refused: str | None = None
    """Pattern of the one-line message; the other answers do not apply."""
    says: str | None = None
    """Pattern of a line of the interpretation."""
    quarantined: dict[str, int] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    url: str = ""
    """Path below the input that the URL names."""

    def config(self, folder: Path) -> DataSection:
        """Write the input under a folder; the configuration that reads it."""
        root = folder / "source"
        root.mkdir(parents=True)
        if callable(self.files):
            self.files(root)
        else:
            write_tree(root, tree(self.files))
        source = {"format": "folder", "url": str(root / self.url), "image_size": SIZE, "resize": "exact"}
        data = {"validation_images": 2, "max_quarantined": 0.9 if self.quarantined else 0} | self.data
        section = SourceSection.model_validate(source | self.source)
        return DataSection(root=str(folder / "sets"), name="set", source=section, **data)


def read_split(folder: Path, split: str) -> tuple[np.ndarray, list[str | int | None]]:
    """Images uint8 [n, C, H, W] and classes of a written split, by tarfile and numpy alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    arrays: dict[str, list[np.ndarray]] = {"x": [], "y": []}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                match = re.search(r"\.(x|y)\.npy$", member.name)
                if match:
                    content = archive.extractfile(member)
                    assert content is not None
                    arrays[match[1]].append(np.load(io.BytesIO(content.read())))
    images = np.concatenate(arrays["x"])
    if not arrays["y"]:
        return images, [None] * len(images)
    names = manifest["class_names"]
    labels = np.concatenate(arrays["y"]).tolist()
    return images, [names[label] if names else label for label in labels]


def numbers_by_class(folder: Path, split: str) -> Expected:
    """The numbers of the pictures of a written split by class."""
    images, classes = read_split(folder, split)
    by_class: Expected = {}
    for image, name in zip(images, classes, strict=True):
        by_class.setdefault(name, []).append(int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]))
    return {name: sorted(numbers) for name, numbers in by_class.items()}
