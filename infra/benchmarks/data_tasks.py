"""Tasks that infra/benchmarks/data.py measures, each in its own process."""

import gc
import importlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

SIZE, BATCH = 64, 128
IMAGENET = 1_281_167


def run(name: str, work: Path, images: int, total: int) -> dict:
    if name == "prepare":
        return prepare(work, total)
    if name == "prepare-peers":
        import data_peers

        return data_peers.prepare(work, total)
    if name == "memory":
        return memory(work)
    if name.startswith("write-"):
        return write(name, work, images)
    warm(work)
    if name.startswith("resume-"):
        return resume(name, work, total)
    return read(name, work, images, total)


def read(name: str, work: Path, images: int, total: int) -> dict:
    """Read one shuffled pass, or the first part of it, as batches uint8 [128, 3, 64, 64]."""
    array = np.load(work / "images.npy") if name == "ram" else None
    import_all(name, work)
    wall, cpu = usage()
    batches = reader(name, work, total, array)
    seen = 0
    while seen < images:
        try:
            pixels, labels = next(batches)
        except StopIteration:
            break
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1:] == (3, SIZE, SIZE)
        assert len(pixels) == len(labels)
        seen += len(pixels)
    wall = usage()[0] - wall
    del batches
    gc.collect()  # ends the workers, so that their CPU time is counted
    return {"images": seen, "wall": wall, "cpu": usage()[1] - cpu}


def import_all(name: str, work: Path) -> None:
    """Import all modules in advance, so that neither imports nor their garbage collection are measured."""
    modules = ["fm_core.data.batches", "fm_core.data.dataset_builder", "fm_core.data.reader", "data_peers"]
    if name.startswith(("wds", "resume", "write")):
        modules += ["webdataset", "PIL.Image"]
    if name.startswith(("mds", "litdata")):
        importlib.import_module("data_peers").use_peers(work)
        modules += ["litdata", "streaming"]
    for module in modules:
        importlib.import_module(module)
    np.unique(np.arange(3))
    gc.collect()
    gc.freeze()


def reader(name: str, work: Path, total: int, array: np.ndarray | None) -> Iterator:
    if name.startswith("ours"):
        return ours(work, direct=name == "ours-direct")
    if name == "memmap":
        return gather(np.load(work / "images.npy", mmap_mode="r"), total)
    if name == "ram":
        assert array is not None
        return gather(array, total)
    import data_peers

    return data_peers.reader(name, work)


def ours(work: Path, direct: bool = False, position: int = 0) -> Iterator:
    from fm_core.data.batches import Batches
    from fm_core.data.manifest import load_manifest
    from fm_core.data.reader import ImageReader
    from fm_core.data.sampler import GlobalShuffleSampler

    manifest = load_manifest(str(work), "blocks")
    images = ImageReader(str(work), manifest, "train")
    order = GlobalShuffleSampler(0, len(images))
    if direct:
        for first in range(position, 10**12, BATCH):
            yield images.read(order.ids(first, BATCH))
    with Batches(images, order, position=position, global_batch=BATCH) as batches:
        for batch in batches:
            yield batch.images, batch.labels


def gather(array: np.ndarray, total: int) -> Iterator:
    order = np.random.default_rng(0).permutation(total)
    labels = np.arange(total) % 1000
    for first in range(0, total, BATCH):
        ids = order[first : first + BATCH]
        yield torch.from_numpy(array[ids]), torch.from_numpy(labels[ids])


def write(name: str, work: Path, images: int) -> dict:
    array = np.load(work / "images.npy", mmap_mode="r")[:images]
    labels = np.arange(images) % 1000
    target = work / "written"
    shutil.rmtree(target, ignore_errors=True)
    import data_peers

    import_all(name, work)

    wall, cpu = usage()
    if name == "write-ours":
        write_blocks(target, "blocks", array, labels)
    else:
        data_peers.write_png(target, array)
    now = usage()
    shutil.rmtree(target)
    return {"images": images, "wall": now[0] - wall, "cpu": now[1] - cpu}


def write_blocks(root: Path, name: str, array: np.ndarray, labels: np.ndarray) -> None:
    """Write shards with this project's writer, from an array instead of an archive."""
    from fm_core.config.data import DataSection
    from fm_core.data.dataset_builder import write_manifest, write_missing
    from fm_core.data.manifest import Interpretation, Packing
    from fm_core.data.shard_plan import ShardPlan, ShardTask
    from fm_core.data.sources.base import ArrayStream, Classes, SourceFacts, SourcePart
    from fm_core.storage.store import Store

    class ArraySource:
        shape = getattr(array, "shape", (0, 3, SIZE, SIZE))[1:]
        facts = SourceFacts(256, shape, {"source": "benchmark"})

        def open(self, part):
            return ArrayStream(array, labels)

    packing = Packing(block_images=1024, shard_blocks=8)
    part = SourcePart("all", "train", len(array))
    step = packing.shard_images
    tasks = tuple(
        ShardTask(f"train-{n:06d}.tar", "train", n, part, first, min(step, len(array) - first))
        for n, first in enumerate(range(0, len(array), step))
    )
    plan = ShardPlan(ArraySource(), Classes(1000, "benchmark"), packing, (), tasks, Interpretation())
    config = DataSection(root=str(root), name=name, workers=1)
    store = Store.at(config.root, config.name)
    write_missing(store, plan, config, lambda done: None)
    write_manifest(store, plan, config)


def resume(name: str, work: Path, total: int) -> dict:
    import data_peers

    import_all(name, work)

    position = total * 9 // 10
    wall, cpu = usage()
    source = ours(work, position=position) if name == "resume-ours" else data_peers.skip_to(work, position)
    pixels, _ = next(source)
    now = usage()
    assert pixels.shape == (BATCH, 3, SIZE, SIZE)
    return {"images": 1, "wall": now[0] - wall, "cpu": now[1] - cpu}


def usage() -> tuple[float, float]:
    """Wall time and CPU time in seconds; CPU time includes finished child processes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(item.ru_utime + item.ru_stime for item in used)


def warm(work: Path) -> None:
    """Read every file once, so that it is in the page cache."""
    for path in work.rglob("*"):
        if path.is_file() and "peers" not in path.parts:
            with path.open("rb") as file:
                while file.read(2**24):
                    pass


def prepare(work: Path, total: int) -> dict:
    """Store crops of scikit-learn's and matplotlib's example photographs as an array and as shards."""
    import data_peers

    if not (work / "images.npy").exists() or len(np.load(work / "images.npy", mmap_mode="r")) != total:
        for folder in ("blocks", "png", "mds", "litdata"):
            shutil.rmtree(work / folder, ignore_errors=True)
        np.save(work / "images.npy", crops(total))
    array = np.load(work / "images.npy", mmap_mode="r")
    if not (work / "blocks" / "manifest.json").exists():
        write_blocks(work, "blocks", array, np.arange(total) % 1000)
    if not (work / "png").exists():
        # An mtime of 0 avoids PAX headers, which halve webdataset's reading speed.
        data_peers.write_png(work / "png", array, mtime=0)
    return {}


def crops(count: int) -> np.ndarray:
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [*load_sample_images().images]
    with get_sample_data("grace_hopper.jpg") as file:
        photographs.append(np.asarray(Image.open(file).convert("RGB")))
    random = np.random.default_rng(0)
    out = np.empty((count, 3, SIZE, SIZE), np.uint8)
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        y, x = (random.integers(side - SIZE) for side in photograph.shape[:2])
        out[index] = photograph[y : y + SIZE, x : x + SIZE].transpose(2, 0, 1)
    return out


class Synthetic:
    """Noise images, generated on access."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._noise = np.random.default_rng(0).integers(0, 256, (4096, 3, SIZE, SIZE), dtype=np.uint8)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self._count)
        return self._noise[(np.arange(start, stop) * 31) % len(self._noise)]


READ_ALL = rf"""
import re, sys, time
sys.path[:0] = sys.argv[1:3]
import data_tasks
import fm_core.data.batches
from pathlib import Path
def resident_peak():  # getrusage would count the parent before exec
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
base = resident_peak()
seen, began = 0, time.perf_counter()
for images, labels in data_tasks.ours(Path(sys.argv[3])):
    seen += len(images)
    if seen >= {IMAGENET}:
        break
print(seen, base, resident_peak(), time.perf_counter() - began)
"""


def memory(work: Path) -> dict:
    """Measure the peak resident memory of a process that reads 1,281,167 images once, in random order."""
    here = Path(__file__).resolve().parent
    try:
        write_blocks(work / "large", "blocks", Synthetic(IMAGENET), np.arange(IMAGENET) % 1000)
        arguments = [sys.executable, "-c", READ_ALL, str(here), str(here.parents[1]), str(work / "large")]
        done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(work / "large", ignore_errors=True)
    seen, base, peak, seconds = map(float, done.stdout.split())
    return {"images": seen, "bytes_after_imports": base, "peak_bytes": peak, "seconds": seconds}
