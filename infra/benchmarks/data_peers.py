"""Other dataset formats, written and read according to their documentation."""

import importlib.abc
import importlib.machinery
import itertools
import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

SIZE, BATCH = 64, 128


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that provides stubs for packages that the peers import but do not use here."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


class _Stub(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def use_peers(work: Path) -> None:
    sys.meta_path.insert(0, Absent(("transformers", "torchvision")))
    sys.path.append(str(work / "peers"))
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(work / "litdata-cache")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(work / "litdata-cache")


def write_png(target: Path, array: np.ndarray, **options) -> None:
    """Write shards with webdataset.ShardWriter as documented: one PNG and one class per sample."""
    import webdataset as wds
    from PIL import Image

    target.mkdir(parents=True)
    with wds.ShardWriter(str(target / "%06d.tar"), maxcount=5_000, verbose=0, **options) as writer:
        for number, image in enumerate(array):
            picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            writer.write({"__key__": f"{number:08d}", "png": picture, "cls": number % 1000})


def prepare(work: Path, total: int) -> dict:
    use_peers(work)
    array = np.load(work / "images.npy", mmap_mode="r")[:total]
    if not (work / "mds").exists():
        from streaming import MDSWriter

        columns = {"x": f"ndarray:uint8:3,{SIZE},{SIZE}", "y": "int"}
        with MDSWriter(out=str(work / "mds"), columns=columns) as writer:
            for number, image in enumerate(array):
                writer.write({"x": np.ascontiguousarray(image), "y": number % 1000})
    if not (work / "litdata").exists():
        from litdata import optimize

        optimize(
            fn=LitdataSample(str(work / "images.npy")),
            inputs=list(range(len(array))),
            output_dir=str(work / "litdata"),
            chunk_bytes="64MB",
            num_workers=1,
        )
    return {}


class LitdataSample:
    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, number: int) -> dict:
        image = np.load(self.path, mmap_mode="r")[number]
        # Bytes, because litdata decodes a window of samples for each requested sample; tensors are slower.
        return {"x": image.tobytes(), "y": number % 1000}


def reader(name: str, work: Path) -> Iterator:
    workers = int(name.rsplit("-", 1)[1])
    if name.startswith("wds"):
        return webdataset_batches(work, workers)
    return mds_batches(work, workers) if name.startswith("mds") else litdata_batches(work, workers)


def _to_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


def _stack(samples: list) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def _undecoded(work: Path):
    import webdataset as wds

    shards = [str(path) for path in sorted((work / "png").glob("*.tar"))]
    return wds.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False).shuffle(1000)


def webdataset_batches(work: Path, workers: int) -> Iterator:
    import webdataset as wds

    data = _undecoded(work).decode("rgb8").to_tuple("png", "cls").map_tuple(_to_tensor, int)
    data = data.batched(BATCH, collation_fn=_stack)
    return iter(wds.WebLoader(data, batch_size=None, num_workers=workers))


def skip_to(work: Path, position: int) -> Iterator:
    """Resume webdataset in the fastest way: skip samples before they are decoded."""
    from webdataset.autodecode import imagehandler

    decode = imagehandler("rgb8")
    samples = iter(_undecoded(work))
    next(itertools.islice(samples, position - 1, position))
    while taken := list(itertools.islice(samples, BATCH)):
        yield _stack([(_to_tensor(decode("png", item["png"])), int(item["cls"])) for item in taken])


def mds_batches(work: Path, workers: int) -> Iterator:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    data = StreamingDataset(local=str(work / "mds"), shuffle=True, batch_size=BATCH)
    loader = DataLoader(data, batch_size=BATCH, num_workers=workers)
    return ((torch.as_tensor(batch["x"]), batch["y"]) for batch in loader)


def litdata_batches(work: Path, workers: int) -> Iterator:
    from litdata import StreamingDataLoader, StreamingDataset

    shutil.rmtree(work / "litdata-cache", ignore_errors=True)
    data = StreamingDataset(str(work / "litdata"), shuffle=True)
    return iter(StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=_join))


def _join(samples: list) -> tuple[torch.Tensor, torch.Tensor]:
    content = bytearray(b"".join(sample["x"] for sample in samples))
    pixels = torch.frombuffer(content, dtype=torch.uint8).view(-1, 3, SIZE, SIZE)
    return pixels, torch.tensor([sample["y"] for sample in samples])
