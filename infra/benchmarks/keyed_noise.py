"""Speed of random number generation in training, compared with the generator of earlier versions.

    python infra/benchmarks/keyed_noise.py
    python infra/benchmarks/keyed_noise.py --task normals --images 64

normals: standard normal numbers for 64x64 images, from philox-v1 (eager and compiled), numpy-v1, and numpy
without a key for each image. loader: 64x64 images from shards through the loader's thread, up to the inputs
of a training step; numpy-v1 draws its numbers there. step-digits, step-small64: a training step on the CPU
with the demo's network, or with a small network at 64x64. torch uses --threads threads, one by default.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from interleaved import Contender, make_parser, measure, parse_options, print_result, report, step_arguments

SHAPE = (3, 64, 64)
SIDES = {
    "normals": (
        Contender("philox-v1", "eager"),
        Contender("philox-v1-compiled", "with torch.compile"),
        Contender("numpy-v1", "numpy's Philox, keyed for each image, as in earlier versions"),
        Contender("numpy", "numpy's Philox, one stream"),
    ),
    "loader": (Contender("philox-v1", "pixels and positions"), Contender("numpy-v1", "noise drawn ahead")),
    "step-digits": (Contender("philox-v1", "drawn in the step"), Contender("numpy-v1", "drawn ahead")),
    "step-small64": (Contender("philox-v1", "drawn in the step"), Contender("numpy-v1", "drawn ahead")),
}
GOALS = {"normals": {"numpy-v1": "at most 1"}, "loader": {"numpy-v1": "at most 0.05"}}
UNITS = {"normals": "seconds for a million", "loader": "seconds for a thousand images"}


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--task", choices=tuple(SIDES), help="only this one")
    parser.add_argument("--images", type=int, default=32, help="64x64 images drawn at a time")
    step_arguments(parser, steps=10)
    options = parse_options(parser)
    for name in [options.task] if options.task else SIDES:
        keys = ("images", "batch", "warmup", "steps", "blocks")
        task = {"task": name, **{key: getattr(options, key) for key in keys}}
        measurements = measure("keyed_noise.py", SIDES[name], options, task)
        goals = GOALS.get(name, {"numpy-v1": "at most 1"})
        report(
            SIDES[name],
            measurements,
            "philox-v1",
            UNITS.get(name, "seconds a step"),
            options,
            goals,
            f"-{name}",
        )
        for side, rows in measurements.items():
            if rate := [float(str(row["per_s"])) for row in rows if "per_s" in row]:
                print(f"{name}, {side}: {median(rate):,.0f} {rows[0]['of']}/s")
            if "bytes_per_image" in rows[0]:
                print(f"{name}, {side}: {rows[0]['bytes_per_image']} bytes per image are sent to the device")


def child(task: dict) -> None:
    work = {"normals": normals, "loader": loader}.get(task["task"], step)
    work(task)


def normals(task: dict) -> None:
    from fm_core.storage.keyed_random import Domain, KeyedRandom, Purpose

    name, positions = task["contender"], torch.arange(task["images"])
    count = task["images"] * int(np.prod(SHAPE))
    if name == "numpy":
        stream = np.random.Generator(np.random.Philox(0))
        seconds = timed(lambda: stream.standard_normal(count, dtype=np.float32), task)
    else:
        compiled = name.endswith("-compiled")
        random = KeyedRandom(name.removesuffix("-compiled"), 0, Domain.TRAINING, compiled)
        device = torch.device(task.get("device", "cpu"))

        def draw() -> None:
            random.normal(Purpose.NOISE, positions, SHAPE, device)
            if device.type == "cuda":
                torch.cuda.synchronize()

        seconds = timed(draw, task)
    millions = [value / count * 1e6 for value in seconds]
    print_result(millions, per_s=1e6 / median(millions), of="normal numbers")


def loader(task: dict) -> None:
    import data_tasks

    from fm_core.data.manifest import load_manifest
    from fm_core.data.reader import ImageReader

    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (4096, *SHAPE), dtype=np.uint8)
        data_tasks.write_blocks(Path(folder), "noise", pixels, np.arange(len(pixels)) % 10)
        reader = ImageReader(folder, load_manifest(folder, "noise"), "train")
        source = source_of(reader, task["contender"])
        with source.batches(0, 128, 0, 1, 128) as batches:
            sizes: list[int] = []
            next(batches).map(lambda part: sizes.append(part.nbytes) or part)

            def read() -> None:
                for _ in range(8):
                    next(batches)

            seconds = [value / 1.024 for value in timed(read, task)]
    print_result(seconds, per_s=1e3 / median(seconds), of="images", bytes_per_image=sum(sizes) // 128)


def step(task: dict) -> None:
    import program

    size = task["task"].removeprefix("step-")
    print_result(program.loop({**task, "size": size, "generator": task["contender"]}))


def source_of(reader: object, generator: str):
    import program

    return program._source({"generator": generator}, reader)


def timed(work, task: dict) -> list[float]:
    """Seconds per call, for each block of `steps` calls."""
    for _ in range(task["warmup"]):
        work()
    blocks = []
    for _ in range(task["blocks"]):
        began = time.perf_counter()
        for _ in range(task["steps"]):
            work()
        blocks.append((time.perf_counter() - began) / task["steps"])
    return blocks


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
