"""Fraction of the training time spent waiting for data, from tar files to optimizer steps.

    python infra/benchmarks/end_to_end.py                         # ImageNet-64 UNet on a GPU
    python infra/benchmarks/end_to_end.py --device cpu --size small --batch 16

Noise images are written by this project's writer as shards of raw pixels. They are read by its reader in
training order, with CRC checks; noise, t and dequantization are drawn as in training. The training loop
itself measures the time of waiting for the next batch and computing its points on the path.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from interleaved import (
    Contender,
    device_arguments,
    make_parser,
    measure,
    parse_options,
    print_result,
    report,
    step_arguments,
)

CONTENDERS = (
    Contender("tars", "images from shards"),
    Contender("memory", "images from memory"),
)


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    device_arguments(parser, ("imagenet64", "small"))
    parser.add_argument("--images", type=int, default=20_000, help="images in the shards")
    step_arguments(parser, steps=10)
    options = parse_options(parser)
    keys = ("device", "size", "batch", "images", "warmup", "steps", "blocks")
    measurements = measure("end_to_end.py", CONTENDERS, options, {key: getattr(options, key) for key in keys})
    report(CONTENDERS, measurements, "tars", "seconds a step", options, {"memory": "at most 1.01"})
    for name, rows in measurements.items():
        shares = ", ".join(f"{float(str(row['waited'])):.2%}" for row in rows)
        print(f"{name}: waited for data {shares} of the time (goal: below 1%)")


def child(task: dict) -> None:
    import program

    with tempfile.TemporaryDirectory() as folder:
        reader = None
        if task["contender"] == "tars":
            reader = shards(Path(folder), task)
        compiled = task.get("compile", task["device"] == "cuda")
        run = program.loop_lines(task, {"compile": compiled}, reader)
        seconds = sum(after["seconds"] - before["seconds"] for before, after in run)
        waited = sum(after["data_seconds"] for _, after in run)
        blocks = program.block_seconds(run, task)
        print_result(blocks, waited=waited / seconds, images_per_s=task["batch"] / median(blocks))


def shards(folder: Path, task: dict):
    """Write shards with images of the network's size, and return a reader of them."""
    import numpy as np
    from data_tasks import write_blocks
    from same_work import SIZES

    from fm_core.data.manifest import load_manifest
    from fm_core.data.reader import ImageReader

    shape = (task["images"], *SIZES[task["size"]]["shape"])
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_blocks(folder, "noise", images, np.arange(len(images)) % 1000)
    return ImageReader(str(folder), load_manifest(str(folder), "noise"), "train")


if __name__ == "__main__":
    torch.manual_seed(0)
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
