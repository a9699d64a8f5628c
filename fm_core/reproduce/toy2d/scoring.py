"""Scores and pictures of a model of the plane."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fm_core.config import PlaneSection
from fm_core.method.divergence import Exact
from fm_core.method.likelihood import LogDensity, log_density
from fm_core.method.objectives import Objective
from fm_core.method.ode import Solution, Solver, solve
from fm_core.method.types import Velocity
from fm_core.reproduce.toy2d.checkerboard import (
    ENTROPY,
    WINDOW,
    by_position,
    grid_centres,
    on_squares,
    points,
)
from fm_core.storage import keyed_random

INSTANTS = 25
"""Times of a trajectory, equally spaced over the interval; pictures show five of them."""
LIKELIHOOD_BATCH = 1_024
"""Points whose log-density is solved together; adaptive steps depend on it."""
PICTURE_TOLERANCE = 1e-3
"""Of dopri5, in nats, for the picture of the density: below what colour shows."""

Scores = dict[str, Any]
OnPart = Callable[[float, str], None]


@dataclass(frozen=True)
class Judged:
    """A judged model of the plane."""

    scores: Scores
    """Plain numbers for result.json."""
    pictures: dict[str, Tensor]
    """times [T], trajectory [T, S, 2], samples-<nfe> [S, 2], density [G, G] (y, x)."""


def judge(
    network: nn.Module, objective: Objective, plane: PlaneSection, seed: int, on_part: OnPart
) -> Judged:
    """Score a trained network; `on_part` hears the finished share, 0 to 1, and what was finished.

    Noise and held-out points are functions of (seed, number), the same for every objective.

    Raises:
        ArithmeticError: from the solver.
    """
    velocity, path = objective.velocity(network), objective.path
    noise = path.source_std * by_position(keyed_random.normal, seed, "plane-samples", 0, plane.samples, (2,))
    dopri5 = Solver("dopri5", rtol=plane.rtol, atol=plane.atol)
    start, end = objective.interval
    instants = [start + (end - start) * i / (INSTANTS - 1) for i in range(INSTANTS - 1)] + [end]
    run = solve(velocity, noise, objective.interval, dopri5, instants)
    on_part(0.25, f"trajectories of {plane.samples:,} points in {run.nfe} evaluations")
    pictures = _few_evaluations(velocity, noise, objective, plane)
    on_part(0.4, "samples in few evaluations")
    held_out = points(seed, "plane-held-out", 0, plane.held_out)
    likelihood = _log_density(velocity, held_out, objective, dopri5)
    on_part(0.7, f"log-density of {plane.held_out:,} held-out points")
    density = _density(velocity, objective, plane.grid)
    on_part(1.0, "picture of the density")
    cell = (2 * WINDOW / plane.grid) ** 2
    scores: Scores = {
        "nll": _nll(likelihood, held_out),
        "nfe": _nfe(run),
        "on_squares": {
            **{str(nfe): _share(pictures[f"samples-{nfe}"]) for nfe in plane.nfe},
            "dopri5": _share(run.x),
        },
        "mass_in_picture": float(density.sum()) * cell,
    }
    trajectory = {"times": cast(Tensor, run.times), "trajectory": cast(Tensor, run.trajectory)}
    return Judged(scores, {**trajectory, **pictures, "density": density})


def _few_evaluations(
    velocity: Velocity, noise: Tensor, objective: Objective, plane: PlaneSection
) -> dict[str, Tensor]:
    """Samples by the midpoint rule at each budget of evaluations."""
    drawn: dict[str, Tensor] = {}
    for nfe in plane.nfe:
        run = solve(velocity, noise, objective.interval, Solver("midpoint", steps=nfe // 2))
        assert run.nfe == nfe, f"a budget of {nfe} evaluations cost {run.nfe}"
        drawn[f"samples-{nfe}"] = run.x
    return drawn


def _log_density(velocity: Velocity, x1: Tensor, objective: Objective, solver: Solver) -> list[LogDensity]:
    return [
        log_density(velocity, part, objective.interval, solver, Exact(), objective.path.source_std)
        for part in x1.split(LIKELIHOOD_BATCH)
    ]


def _density(velocity: Velocity, objective: Objective, side: int) -> Tensor:
    """The model's density at the centres of the picture's cells, float32 [side, side], rows by y."""
    x, y = grid_centres(side)
    solver = Solver("dopri5", rtol=PICTURE_TOLERANCE, atol=PICTURE_TOLERANCE)
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
