"""NFE curve: error of the ODE solution and Fréchet distance against the number of network evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_core.config import NfeCurveSection
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.feature_statistics import Gaussian
from fm_core.evaluation.metrics.frechet import estimate_frechet_distance
from fm_core.evaluation.metrics.kid import kernel_distance
from fm_core.evaluation.recognition import recognized_share
from fm_core.evaluation.reference import subset_indices
from fm_core.method.objectives import Objective
from fm_core.method.ode import forwards_per_call
from fm_core.method.solver import ADAPTIVE, ALIASES, EVALUATIONS_PER_STEP, Solver
from fm_core.method.time_grid import UNIFORM, TimeGrid
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.compiled_network import matmul_precision
from fm_core.sampling.generate import Draw
from fm_core.sampling.solver_check import check_solver

DTYPE = "float32"
"""Precision of the network, regardless of sample.precision: rounding must not hide solver errors."""


@dataclass(frozen=True)
class SolverSetting:
    """A solver with one budget: one point of the curve."""

    solver: Solver

    @property
    def record(self) -> dict[str, Any]:
        """Record for the scores file: the solver, its grid if not uniform, and its steps or rtol."""
        setting = {"rtol": self.solver.rtol} if self.solver.adaptive else {"steps": self.solver.steps}
        grid = self.solver.grid
        if grid == UNIFORM:
            return {"solver": self.solver.method, **setting}
        number = grid.shift or (grid.rho if grid != TimeGrid(grid.name) else None)
        name = f"{self.solver.method}@{grid.name}" + (f":{number:g}" if number else "")
        return {"solver": name, **setting}


def solver_settings(settings: NfeCurveSection) -> list[SolverSetting]:
    """List every solver with every budget that allows a step, and dopri5 with every tolerance.

    Raises:
        UserError: a solver adds noise or has no fixed number of evaluations per step, or its grid is unknown.
    """
    points = list[SolverSetting]()
    for name in settings.solvers:
        solver, at, grid_name = name.partition("@")
        method = ALIASES.get(solver, solver)
        if method not in EVALUATIONS_PER_STEP or method == "sde":
            allowed = ", ".join(each for each in EVALUATIONS_PER_STEP if each != "sde")
            reason = "adds noise" if method == "sde" else "has no fixed number of evaluations per step"
            advice = "dopri5 is always included" if method in ADAPTIVE else f"allowed: {allowed}"
            raise UserError(f"evaluate.nfe_curve.solvers: {solver} {reason}; {advice}")
        grid = _grid_named(grid_name) if at else UNIFORM
        # The last step of the edm solver takes one evaluation instead of two.
        spare = 1 if method == "edm" else 0
        steps = [(budget + spare) // EVALUATIONS_PER_STEP[method] for budget in settings.nfe]
        points += [
            SolverSetting(Solver(method, steps=count, grid=grid)) for count in dict.fromkeys(steps) if count
        ]
    return points + [SolverSetting(Solver("dopri5", rtol=t, atol=t)) for t in settings.tolerances]


def _grid_named(text: str) -> TimeGrid:
    """Parse the grid of an entry: a name, and after a colon the rho of `edm` or the shift of `shift`."""
    name, colon, number = text.partition(":")
    if not colon:
        return TimeGrid(name)
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"evaluate.nfe_curve.solvers: {text}: {number!r} is not a number") from None
    return TimeGrid(name, shift=value) if name == "shift" else TimeGrid(name, rho=value)


def check_curve(
    settings: NfeCurveSection, objective: Objective, coupling: str, guidance: float = 1.0
) -> None:
    """Check the solvers of a curve against a model, as `check_solver` does. Raises UserError."""
    for point in solver_settings(settings) if settings.images else []:
        check_solver(point.solver, objective, coupling, "evaluate.nfe_curve", guidance)


def curve_part(
    model: Model,
    draw: Draw,
    settings: NfeCurveSection,
    extractor: Extractor,
    numbers: Sequence[int],
    device: torch.device,
) -> dict[str, Tensor]:
    """Solve the ODE of the images `numbers` at every point of the curve, from the same noise, in float32.

    Returns:
        For each point p: `error-p` float64 [n], the root mean square over dimensions of the difference from
        the exact solution, in the model's units (the data span [-1, 1]); `features-p` [n, D]; `nfe-p` int64
        [n]; and, of a classifier of the data set, `confidence-p` [n], the probability of the most probable
        class.
    """
    labels = draw.labels(model, numbers)
    velocity = draw.velocity(model, None if labels is None else labels.to(device))
    steps = settings.exact_nfe // EVALUATIONS_PER_STEP["rk4"]
    content = dict[str, Tensor]()
    with matmul_precision():
        exact = draw.solve(model, velocity, numbers, device, solver=Solver("rk4", steps=steps)).x
        solutions = [
            draw.solve(model, velocity, numbers, device, solver=point.solver)
            for point in solver_settings(settings)
        ]
    for number, solution in enumerate(solutions):
        difference = (solution.x - exact).double().flatten(1)
        content[f"error-{number}"] = difference.square().mean(1).sqrt().cpu()
        content[f"features-{number}"], probabilities = extractor(model.quantizer.quantize(solution.x))
        if probabilities is not None and extractor.validation_accuracy is not None:
            content[f"confidence-{number}"] = probabilities.amax(1)
        content[f"nfe-{number}"] = torch.full((len(numbers),), solution.nfe)
    content["forwards"] = torch.tensor([forwards_per_call(velocity)])
    return content


def curve_record(
    parts: Sequence[Mapping[str, Tensor]],
    settings: NfeCurveSection,
    reference: Gaussian,
    extractor: Extractor,
    rows: Tensor | None = None,
    pair_images: int | None = None,
) -> dict[str, Any]:
    """Build the curve's record for the scores file, which has one record per point.

    Args:
        parts: what `curve_part` returned, in order.
        settings: the curve.
        reference: mean and covariance of the reference.
        extractor: the extractor of the features.
        rows: features [M, D] of reference images, for the kernel distance; None leaves it out.
        pair_images: largest number of images for the kernel distance; by default all.
    """
    records = list[dict[str, Any]]()
    device = reference.mean.device
    for number, point in enumerate(solver_settings(settings)):
        values = {
            name: torch.cat([part[f"{name}-{number}"] for part in parts])
            for name in ("error", "features", "nfe", "confidence")
            if all(f"{name}-{number}" in part for part in parts)
        }
        features, error = values["features"].to(device), values["error"]
        frechet = estimate_frechet_distance(features, reference, limit=False)
        records.append(
            {
                **point.record,
                "nfe": values["nfe"].double().mean().item(),
                "error": error.mean().item(),
                "error_stderr": error.std().item() / len(error) ** 0.5,
                "frechet_distance": frechet.value,
                "frechet_distance_stderr": frechet.stderr,
                **({"unreliable": frechet.unreliable} if frechet.unreliable else {}),
                **_further_scores(features, rows, values.get("confidence"), pair_images),
            }
        )
    return {
        "images": settings.images,
        "features": extractor.name,
        "forwards_per_evaluation": int(parts[0]["forwards"]),
        "dtype": DTYPE,
        "exact": {"solver": "rk4", "evaluations": settings.exact_nfe},
        "error": "root mean square over dimensions, data in [-1, 1]",
        "points": records,
    }


def _further_scores(
    features: Tensor, rows: Tensor | None, confidence: Tensor | None, pair_images: int | None
) -> dict[str, float]:
    """Kernel distance with its error, and the share that a classifier of the data set recognizes."""
    scores = dict[str, float]()
    if rows is not None:
        pairs = features[subset_indices(len(features), pair_images or len(features))]
        kernel = kernel_distance(pairs, rows.to(features.device))
        scores |= {"kernel_distance": kernel.value, "kernel_distance_stderr": kernel.stderr}
    if confidence is not None:
        scores["recognized"] = recognized_share(confidence)
    return scores
