"""Time of moments and Fréchet distance of 50,000 x 2048 features, compared with pytorch-fid's formula.

    python infra/benchmarks/moments.py                       # one thread per core of the machine
    python infra/benchmarks/moments.py --images 2000 --features 128 --rounds 1

`value`: float64 sums over batches of 1,000, as an extractor returns them, then the distance with the stored
matrix square root of the reference. `evaluate`: the results of `fm evaluate` for a set of samples, i.e. the
distance, its standard error, and its limit for infinitely many images; pytorch-fid does not compute the
latter two. `curve`: only the distance and its standard error, as for each point of an NFE curve. pytorch-fid:
all activations in one float64 array, numpy's mean and covariance, and scipy's square root of the product of
the covariances.
"""

import json
import os
import statistics
import sys
import time

import numpy as np
import scipy.linalg
import torch
from interleaved import Contender, make_parser, measure, parse_options, print_result, report

CONTENDERS = (
    Contender("value", "moments and distance"),
    Contender("curve", "distance and error"),
    Contender("evaluate", "distance, error and limit"),
    Contender("pytorch-fid", "numpy's moments, scipy's root, no error"),
)
GOALS = {"value": "0.5", "curve": "0.9", "evaluate": "1.3"}
"""Largest ratio to pytorch-fid's time."""
BATCH = 1_000


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.set_defaults(threads=os.cpu_count())
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=2_048, help="features per image")
    parser.add_argument("--blocks", type=int, default=1, help="repetitions in a process")
    options = parse_options(parser)
    task = {key: getattr(options, key) for key in ("images", "features", "blocks")}
    measurements = measure("moments.py", CONTENDERS, options, task)
    theirs = CONTENDERS[-1]
    for item in CONTENDERS[:-1]:
        if item.name in measurements and theirs.name in measurements:
            goals = {theirs.name: GOALS[item.name]}
            report((item, theirs), measurements, item.name, "seconds", options, goals, f"-{item.name}")
            of_cpu = (
                statistics.median(row["cpu_seconds"] for row in measurements[n])
                for n in (item.name, theirs.name)
            )
            print("CPU time, ours and pytorch-fid's: {:.3g} s, {:.3g} s".format(*of_cpu))
    values = [float(str(row["value"])) for rows in measurements.values() for row in rows]
    print(f"largest relative difference of the distances: {max(values) / min(values) - 1:.1e}")


def child(task: dict) -> None:
    from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian

    rows, real = (features(task["images"], task["features"], seed) for seed in (1, 2))
    reference = Gaussian.of(FeatureMoments.of(real))
    began = time.perf_counter()
    _ = reference.root
    once = time.perf_counter() - began
    work = theirs if task["contender"] == "pytorch-fid" else ours
    seconds, cpu, moments, value = [], [], [], 0.0
    for _ in range(task["blocks"]):
        began, used = time.perf_counter(), time.process_time()
        value, middle = work(task["contender"], rows, reference)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
        moments.append(middle - began if middle else None)
    facts = {"cpu_seconds": statistics.median(cpu), "seconds_of_moments": moments}
    print_result(seconds, value=value, **facts, root_of_the_reference_once=once)


def features(count: int, dimension: int, seed: int) -> torch.Tensor:
    """Non-negative, correlated features with a power-law spectrum, similar to pool features."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator)).Q
    scale = torch.arange(1, dimension + 1).float().pow(-0.6)
    parts = [
        (torch.randn(min(BATCH, count - first), dimension, generator=generator) * scale) @ mixing
        + 0.02 * seed
        for first in range(0, count, BATCH)
    ]
    return torch.cat(parts).relu()


def ours(name: str, rows: torch.Tensor, reference):
    from fm_core.evaluation.metrics.feature_statistics import FeatureMoments
    from fm_core.evaluation.metrics.frechet import estimate_frechet_distance, frechet_distance

    if name != "value":
        return estimate_frechet_distance(rows, reference, limit=name == "evaluate").value, None
    moments = FeatureMoments.of(rows[:BATCH])
    for first in range(BATCH, len(rows), BATCH):
        moments = moments + FeatureMoments.of(rows[first : first + BATCH])
    middle = time.perf_counter()
    return frechet_distance(moments, reference), middle


def theirs(name: str, rows: torch.Tensor, reference):
    mu, sigma = reference.mean.numpy(), reference.covariance.numpy()
    activations = np.empty(rows.shape)
    for first in range(0, len(rows), BATCH):
        activations[first : first + BATCH] = rows[first : first + BATCH].numpy()
    mean, covariance = np.mean(activations, axis=0), np.cov(activations, rowvar=False)
    middle = time.perf_counter()
    root = scipy.linalg.sqrtm(covariance.dot(sigma))
    difference = mean - mu
    value = difference.dot(difference) + np.trace(covariance) + np.trace(sigma) - 2 * np.trace(np.real(root))
    return float(value), middle


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
