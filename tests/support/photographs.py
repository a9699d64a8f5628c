"""Crops of real photographs, and files in the official formats made from them."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def crops(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Random crops, uint8 [count, 3, size, size]."""
    photographs = load_sample_images().images
    random = np.random.default_rng(seed)
    out = np.empty((count, 3, size, size), np.uint8)
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        y = random.integers(photograph.shape[0] - size)
        x = random.integers(photograph.shape[1] - size)
        out[index] = photograph[y : y + size, x : x + size].transpose(2, 0, 1)
    return out


def labels(count: int, classes: int = 1000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 1).integers(0, classes, count)


class NpzFiles:
    """A tiny downsampled ImageNet: batches 1..`batches` of `rows` images, and `val_rows` of val_data."""

    def __init__(self, size: int = 8, batches: int = 2, rows: int = 50, val_rows: int = 20) -> None:
        self.size = size
        counts = {f"train_data_batch_{n}": rows + n for n in range(1, batches + 1)} | {"val_data": val_rows}
        self.images = {
            name: crops(count, size, seed=index) for index, (name, count) in enumerate(counts.items())
        }
        self.labels = {name: labels(count, seed=index) for index, (name, count) in enumerate(counts.items())}

    def train(self) -> tuple[np.ndarray, np.ndarray]:
        names = [name for name in self.images if name != "val_data"]
        return np.concatenate([self.images[n] for n in names]), np.concatenate(
            [self.labels[n] for n in names]
        )

    def npz(self, name: str, compressed: bool = False, labels_last: bool = False) -> bytes:
        """The file as the publishers' script makes it: CHW rows, labels from 1, the mean image in train."""
        arrays = {
            "data": self.images[name].reshape(len(self.images[name]), -1),
            "labels": self.labels[name] + 1,
        }
        if name != "val_data":
            arrays["mean"] = arrays["data"].mean(axis=0)
        if not labels_last:
            arrays = dict(reversed(arrays.items()))
        file = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(file, **arrays)
        return file.getvalue()

    def pickle(self, name: str, protocol: int = 3) -> bytes:
        """As image2numpy_imagenet_train.py: a dictionary of the rows, a list of labels from 1, the mean."""
        table = {"data": self.images[name].reshape(len(self.images[name]), -1)}
        table["labels"] = (self.labels[name] + 1).tolist()
        table["mean"] = table["data"].mean(axis=0)
        return pickle.dumps(table, protocol)

    def write_pickles(self, folder: Path) -> Path:
        return write_tree(folder, {name: self.pickle(name) for name in self.images})

    def write_folder(self, folder: Path, **options: bool) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.images:
            (folder / f"{name}.npz").write_bytes(self.npz(name, **options))
        return folder

    def write_zips(self, folder: Path, method: int = zipfile.ZIP_DEFLATED, **options: bool) -> Path:
        """The zips that image-net.org serves; the batches of the second half are in part 2 for size 64."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name in self.images if name != "val_data"]
        groups = {f"Imagenet{self.size}_val_npz": ["val_data"]}
        if self.size == 64:
            half = (len(names) + 1) // 2
            groups["Imagenet64_train_part1_npz"], groups["Imagenet64_train_part2_npz"] = (
                names[:half],
                names[half:],
            )
        else:
            groups[f"Imagenet{self.size}_train_npz"] = names
        for stem, members in groups.items():
            with zipfile.ZipFile(folder / f"{stem}.zip", "w", method) as archive:
                for name in members:
                    archive.writestr(f"{stem}/{name}.npz", self.npz(name, **options))
        return folder


def encoded(image: np.ndarray, kind: str = "png", **options) -> bytes:
    """An image file of uint8 [3, H, W]; kind is Pillow's name of the format."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, kind, **options)
    return file.getvalue()


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
