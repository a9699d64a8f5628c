"""Scores of a 2-D model: likelihood, NFE, share of samples on the board, and tensors for figures."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fm_core.config import FewStepsSection, Toy2dSection
from fm_core.method.divergence import Exact
from fm_core.method.likelihood import LogDensity, log_density
from fm_core.method.objectives import Objective
from fm_core.method.ode import Solution, Solver, solve
from fm_core.method.types import Velocity
from fm_core.reproduce.toy2d.checkerboard import (
    ENTROPY,
    WINDOW,
    by_position,
    grid_centers,
    on_squares,
    points,
)
from fm_core.reproduce.toy2d.few_evaluations import few_evaluations
from fm_core.storage.keyed_random import KeyedRandom, Purpose

TRAJECTORY_TIMES = 25
"""Number of times of a trajectory, equally spaced over the interval; figures show five of them."""
LIKELIHOOD_BATCH = 1_024
"""Number of points whose log-densities are solved together; adaptive steps depend on it."""
DENSITY_TOLERANCE = 1e-3
"""Tolerance of dopri5, in nats, for the density image; finer than the resolution of its colors."""

Scores = dict[str, Any]
OnPart = Callable[[float, str], None]


@dataclass(frozen=True)
class ToyEvaluation:
    """Scores of a model, and the tensors of its figures."""

    scores: Scores
    """Plain numbers for result.json."""
    tensors: dict[str, Tensor]
    """times [T], trajectory [T, S, 2], samples-<nfe> [S, 2], density [G, G] (y, x)."""


def score_model(
    network: nn.Module,
    objective: Objective,
    toy: Toy2dSection,
    random: KeyedRandom,
    on_part: OnPart,
    few_steps: FewStepsSection | None = None,
) -> ToyEvaluation:
    """Score a trained network; `on_part` is called with the finished share, 0 to 1, and the finished part.

    With `few_steps`, samples of its solvers are scored too.

    Noise and held-out points are functions of their index and do not depend on the objective.

    Raises:
        ArithmeticError: the solver failed.
    """
    velocity, path = objective.velocity(network), objective.path
    noise = path.source_std * by_position(random.normal, Purpose.NOISE, 0, toy.samples, (2,))
    dopri5 = Solver("dopri5", rtol=toy.rtol, atol=toy.atol)
    start, end = objective.interval
    times = [start + (end - start) * i / (TRAJECTORY_TIMES - 1) for i in range(TRAJECTORY_TIMES - 1)] + [end]
    run = solve(velocity, noise, objective.interval, dopri5, times)
    on_part(0.25, f"trajectories of {toy.samples:,} points in {run.nfe} evaluations")
    samples = _low_nfe_samples(velocity, noise, objective, toy)
    few = few_evaluations(velocity, noise, run, objective, few_steps) if few_steps else None
    on_part(0.4, "samples at few evaluations")
    held_out = points(random, 0, toy.held_out)
    likelihood = _log_density(velocity, held_out, objective, dopri5)
    on_part(0.7, f"log-density of {toy.held_out:,} held-out points")
    density = _density(velocity, objective, toy.grid)
    on_part(1.0, "density image")
    cell_area = (2 * WINDOW / toy.grid) ** 2
    scores: Scores = {
        "nll": _nll(likelihood, held_out),
        "nfe": _nfe(run),
        "on_squares": {
            **{str(nfe): _share(samples[f"samples-{nfe}"]) for nfe in toy.nfe},
            "dopri5": _share(run.x),
        },
        "mass_in_picture": float(density.sum()) * cell_area,
        **({"few_steps": few} if few else {}),
    }
    trajectory = {"times": cast(Tensor, run.times), "trajectory": cast(Tensor, run.trajectory)}
    return ToyEvaluation(scores, {**trajectory, **samples, "density": density})


def _low_nfe_samples(
    velocity: Velocity, noise: Tensor, objective: Objective, toy: Toy2dSection
) -> dict[str, Tensor]:
    """Samples by the midpoint method for each budget of evaluations."""
    samples: dict[str, Tensor] = {}
    for nfe in toy.nfe:
        run = solve(velocity, noise, objective.interval, Solver("midpoint", steps=nfe // 2))
        assert run.nfe == nfe, f"a budget of {nfe} evaluations cost {run.nfe}"
        samples[f"samples-{nfe}"] = run.x
    return samples


def _log_density(velocity: Velocity, x1: Tensor, objective: Objective, solver: Solver) -> list[LogDensity]:
    return [
        log_density(velocity, part, objective.interval, solver, Exact(), objective.path.source_std)
        for part in x1.split(LIKELIHOOD_BATCH)
    ]


def _density(velocity: Velocity, objective: Objective, side: int) -> Tensor:
    """The model's density at the centers of the grid cells, float32 [side, side]; rows are y."""
    x, y = grid_centers(side)
    solver = Solver("dopri5", rtol=DENSITY_TOLERANCE, atol=DENSITY_TOLERANCE)
    parts = _log_density(velocity, torch.stack([x, y], dim=-1).reshape(-1, 2), objective, solver)
    return torch.cat([part.log_density for part in parts]).exp().float().view(side, side)


def _nll(parts: list[LogDensity], x1: Tensor) -> Scores:
    """Mean negative log-density in nats and bits, its standard error, and the excess over the entropy."""
    nll = -torch.cat([part.log_density for part in parts])
    mean, stderr = float(nll.mean()), float(nll.std() / math.sqrt(len(nll)))
    return {
        "nats": mean,
        "bits": mean / math.log(2),
        "stderr_nats": stderr,
        "excess_over_entropy_nats": mean - ENTROPY,
        "worst_point_nats": float(nll.max()),
        "points": len(x1),
        "batch": min(LIKELIHOOD_BATCH, len(x1)),
        "nfe": sum(part.nfe * len(part.source) for part in parts) / len(x1),
    }


def _nfe(run: Solution) -> Scores:
    return {"dopri5": run.nfe, "accepted": run.accepted, "rejected": run.rejected, "batch": len(run.x)}


def _share(x: Tensor) -> float:
    return float(on_squares(x).float().mean())
