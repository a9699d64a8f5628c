"""Moments and Fréchet distance of 50,000 x 2048 features, against pytorch-fid's formula, in one process.

    python infra/benchmarks/moments.py [--images 50000] [--features 2048] [--repeats 3]

Ours: float64 sums over batches of 1,000 as they come from an extractor, then the distance through the root of
the reference, which is kept. Theirs: all activations in one float64 array, numpy's mean and covariance, and
scipy's square root of the product of the covariances. Both use as many threads as torch and numpy take by
themselves. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np
import scipy.linalg
import torch

from fm_core.evaluation.frechet import frechet_distance
from fm_core.evaluation.moments import Gaussian, Moments

BATCH = 1_000


def features(count, dimension, seed):
    """Non-negative, correlated, with a spectrum that falls by a power law, as pool features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator)).Q
    scale = torch.arange(1, dimension + 1).float().pow(-0.6)
    parts = [
        (
            (torch.randn(min(BATCH, count - first), dimension, generator=generator) * scale) @ mixing
            + 0.02 * seed
        )
        for first in range(0, count, BATCH)
    ]
    return torch.cat(parts).relu()


def ours(rows, reference):
    began = time.perf_counter()
    moments = Moments.of(rows[:BATCH])
    for first in range(BATCH, len(rows), BATCH):
        moments = moments + Moments.of(rows[first : first + BATCH])
    middle = time.perf_counter()
    value = frechet_distance(moments, reference)
    return value, middle - began, time.perf_counter() - middle


def theirs(rows, mu, sigma):
    began = time.perf_counter()
    activations = np.empty(rows.shape)
    for first in range(0, len(rows), BATCH):
        activations[first : first + BATCH] = rows[first : first + BATCH].numpy()
    mean, covariance = np.mean(activations, axis=0), np.cov(activations, rowvar=False)
    middle = time.perf_counter()
    root = scipy.linalg.sqrtm(covariance.dot(sigma))
    difference = mean - mu
    value = difference.dot(difference) + np.trace(covariance) + np.trace(sigma) - 2 * np.trace(np.real(root))
    return float(value), middle - began, time.perf_counter() - middle


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=2_048)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    rows, real = (features(asked.images, asked.features, seed) for seed in (1, 2))
    reference = Gaussian.of(Moments.of(real))
    began = time.perf_counter()
    root = reference.root
    root_seconds = time.perf_counter() - began
    mu, sigma = reference.mean.numpy(), reference.covariance.numpy()
    assert root.shape == sigma.shape
    timed = {"ours": [], "pytorch-fid": []}
    for repeat in range(asked.repeats):
        timed["ours"].append(ours(rows, reference))
        timed["pytorch-fid"].append(theirs(rows, mu, sigma))
        print(
            f"repeat {repeat + 1}: ours {timed['ours'][-1]}, pytorch-fid {timed['pytorch-fid'][-1]}",
            flush=True,
        )
    seconds = {
        name: {
            "moments": statistics.median(moments for _, moments, _ in runs),
            "distance": statistics.median(distance for _, _, distance in runs),
            "both": statistics.median(moments + distance for _, moments, distance in runs),
        }
        for name, runs in timed.items()
    }
    values = {name: runs[0][0] for name, runs in timed.items()}
    print(
        json.dumps(
            {
                "images": asked.images,
                "features": asked.features,
                "threads": torch.get_num_threads(),
                "seconds": seconds,
                "root_of_the_reference_once": root_seconds,
                "times_faster": {
                    part: seconds["pytorch-fid"][part] / seconds["ours"][part]
                    for part in ("moments", "distance", "both")
                },
                "value": values,
                "relative_difference": abs(values["ours"] / values["pytorch-fid"] - 1),
                "versions": {"torch": torch.__version__, "scipy": scipy.__version__, "numpy": np.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
