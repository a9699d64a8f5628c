"""Reported standard errors of scores, compared with true standard deviations over independent image sets.

    python infra/benchmarks/score_errors.py                                # 1 minute: N = 500, 40 repetitions
    python infra/benchmarks/score_errors.py --images 500 2000 10000 --repetitions 400
    python infra/benchmarks/score_errors.py --scores frechet kernel --images 50000 --repetitions 400

Features have 64 dimensions. gaussian: a normal distribution; heavy-tailed: Student's t with 5 degrees of
freedom in each of 64 directions, with finite fourth but infinite fifth moments; classes: ten normal
distributions with different centers. `equal`: samples and reference have the same distribution, so that the
distance consists of bias and noise only; `other`: samples are shifted and scaled. The reference of the
Fréchet distance is fixed (200,000 images). Kernel distance, precision and recall use a new reference of N
images in each repetition, because their errors cover both sets; above 20,000 images the kernel distance is
computed from moments (kernel_moments.py), in 1.3 s instead of 21 s for 50,000.

A repetition depends only on its number; after an interruption, the same command continues. Columns: score,
features, N, repetitions, mean, true standard deviation, ratio of the root mean square of the reported errors
to the true deviation with a 95% bootstrap interval over the repetitions, the same ratio for the mean of the
reported errors, fraction of repetitions not labeled unreliable, time per repetition.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from kernel_moments import kernel_distance_by_moments

from fm_core.evaluation.metrics.feature_statistics import FeatureMoments, Gaussian
from fm_core.evaluation.metrics.frechet import estimate_frechet_distance
from fm_core.evaluation.metrics.inception_score import inception_score
from fm_core.evaluation.metrics.kid import kernel_distance
from fm_core.evaluation.metrics.precision_recall import precision_and_recall

ROOT = Path(__file__).resolve().parents[2]
DIMENSION, CLASSES, REFERENCE_IMAGES = 64, 10, 200_000
KINDS, CASES = ("gaussian", "heavy-tailed", "classes"), ("equal", "other")
SCORES = ("frechet", "kernel", "precision-recall", "inception")
FEW_IMAGES = 20_000
BOOTSTRAP = 2_000
Estimate = tuple[str, float, float, bool]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scores", nargs="+", default=SCORES, choices=SCORES)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--images", nargs="+", type=int, default=[500])
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--file", type=Path, default=ROOT / "build" / "benchmarks" / "score_errors.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    with options.file.open("a+", encoding="utf-8") as file:
        file.seek(0)
        done = {tuple(line["case"]): line for line in map(json.loads, file)}
        for images in options.images:
            for score in options.scores:
                for kind in options.kinds:
                    for case in options.cases:
                        for number in range(options.repetitions):
                            key = (score, kind, case, images, number)
                            if key not in done:
                                done[key] = repetition(*key)
                                file.write(json.dumps(done[key]) + "\n")
                                file.flush()
                        chosen = [done[score, kind, case, images, n] for n in range(options.repetitions)]
                        for line in summary(chosen):
                            print(line, flush=True)


def repetition(score: str, kind: str, case: str, images: int, number: int) -> dict[str, object]:
    """Scores of one set of samples, with their reported errors."""
    samples = features(kind, images, 2 * number + 1, other=case == "other")
    real = None if score in ("frechet", "inception") else features(kind, images, 2 * number + 2)
    began = time.perf_counter()
    estimates = [list(estimate) for estimate in estimate_all(score, kind, samples, real)]
    seconds = round(time.perf_counter() - began, 3)
    return {"case": [score, kind, case, images, number], "estimates": estimates, "seconds": seconds}


def estimate_all(
    score: str, kind: str, samples: torch.Tensor, real: torch.Tensor | None
) -> Iterator[Estimate]:
    """Name, value, reported error and reliability of each score of one set."""
    if score == "frechet":
        distance = estimate_frechet_distance(samples, reference(kind))
        yield "Fréchet distance", distance.value, distance.stderr, not distance.unreliable
        if distance.infinity:
            yield "its limit", *distance.infinity, not distance.unreliable
    elif score == "inception":
        logits = samples @ matrix(9)[:, :CLASSES].to(samples) * 3
        result = inception_score(logits.softmax(1))
        yield "Inception Score", result.value, result.stderr, not result.unreliable
    elif real is not None and score == "kernel":
        distance = kernel_distance_by_moments if len(samples) > FEW_IMAGES else kernel_distance
        kid = distance(samples, real)
        yield "kernel distance", kid.value, kid.stderr, not kid.unreliable
    elif real is not None:
        pair = precision_and_recall(samples, real)
        yield "precision", pair.precision, pair.precision_stderr, not pair.unreliable
        yield "recall", pair.recall, pair.recall_stderr, not pair.unreliable


def features(kind: str, count: int, seed: int, other: bool = False) -> torch.Tensor:
    """Features of independent images from a distribution, float32 [count, 64]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, KINDS.index(kind)]))
    shape = (count, DIMENSION)
    drawn = rng.standard_t(5, shape) if kind == "heavy-tailed" else rng.standard_normal(shape)
    rows = torch.from_numpy(drawn) @ matrix(1)
    if kind == "classes":
        rows = rows + 1.5 * matrix(2)[torch.from_numpy(rng.integers(CLASSES, size=count))] * DIMENSION**0.5
    return (rows * 1.1 + 0.1 if other else rows).float()


def matrix(seed: int) -> torch.Tensor:
    """A fixed random matrix with entries of variance 1/64."""
    drawn = np.random.Generator(np.random.Philox(key=seed)).standard_normal((DIMENSION, DIMENSION))
    return torch.from_numpy(drawn) / DIMENSION**0.5


def reference(kind: str, made: dict[str, Gaussian] = {}) -> Gaussian:  # noqa: B006
    """Fixed reference of the Fréchet distance."""
    if kind not in made:
        parts = [FeatureMoments.of(features(kind, 20_000, -1 - n % 10 + 2**40)) for n in range(10)]
        made[kind] = Gaussian.of(sum(parts[1:], parts[0]))
    return made[kind]


def summary(lines: list[dict]) -> Iterator[str]:
    """One table row for each score."""
    _, kind, case, images, _ = lines[0]["case"]
    seconds = np.median([line["seconds"] for line in lines])
    for position, (name, *_) in enumerate(lines[0]["estimates"]):
        values, errors = (np.array([line["estimates"][position][i] for line in lines]) for i in (1, 2))
        reliable = np.mean([line["estimates"][position][3] for line in lines])
        rng = np.random.default_rng(0)
        chosen = rng.integers(len(lines), size=(BOOTSTRAP, len(lines)))
        ratios = rms(errors[chosen]) / values[chosen].std(1, ddof=1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        ratio, mean = rms(errors) / values.std(ddof=1), errors.mean() / values.std(ddof=1)
        yield (
            f"| {name} | {kind}, {case} | {images:,} | {len(lines)} | {values.mean():.4g} | "
            f"{values.std(ddof=1):.3g} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {mean:.2f} | "
            f"{reliable:.0%} | {seconds:.2f} s |"
        )


def rms(errors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(errors**2, axis=-1))


if __name__ == "__main__":
    sys.exit(main())
