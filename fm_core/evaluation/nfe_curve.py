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
from fm_core.method.ode import ADAPTIVE, Solver, forwards_per_call, solve
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.compiled_network import matmul_precision
from fm_core.sampling.generate import Draw

EVALUATIONS_PER_STEP = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
"""Evaluations of the vector field in one step of a fixed-step method."""
DTYPE = "float32"
"""Precision of the network, whatever sample.precision is: rounding must not hide solver errors."""


@dataclass(frozen=True)
class SolverSetting:
    """A solver at one budget: one point of the curve."""

    solver: Solver

    @property
    def record(self) -> dict[str, Any]:
        """The solver and its one setting, as in the scores file."""
        setting = {"rtol": self.solver.rtol} if self.solver.adaptive else {"steps": self.solver.steps}
        return {"solver": self.solver.method, **setting}


def solver_settings(settings: NfeCurveSection) -> list[SolverSetting]:
    """Every solver at every budget that allows a step, and dopri5 at every tolerance.

    Raises:
        UserError: a solver has no fixed number of evaluations per step.
    """
    points = list[SolverSetting]()
    for name in settings.solvers:
        method = "heun2" if name == "heun" else name
        if method not in EVALUATIONS_PER_STEP:
            advice = (
                "dopri5 is always included"
                if name in ADAPTIVE
                else f"allowed: {', '.join(EVALUATIONS_PER_STEP)}"
            )
            raise UserError(
                f"evaluate.nfe_curve.solvers: {name} has no fixed number of evaluations per step; {advice}"
            )
        steps = [budget // EVALUATIONS_PER_STEP[method] for budget in settings.nfe]
        points += [SolverSetting(Solver(method, steps=count)) for count in dict.fromkeys(steps)]
    return points + [SolverSetting(Solver("dopri5", rtol=t, atol=t)) for t in settings.tolerances]


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
        For point p: `error-p` float64 [n], the root mean square over dimensions of the difference from the
        exact solution, in the model's units (the data span [-1, 1]); `features-p` [n, D]; `nfe-p` int64 [n].
    """
    labels = draw.labels(model, numbers)
    velocity = draw.velocity(model, None if labels is None else labels.to(device))
    noise = draw.noise(model, numbers, device)
    steps = settings.exact_nfe // EVALUATIONS_PER_STEP["rk4"]
    content = dict[str, Tensor]()
    with matmul_precision():
        exact = solve(velocity, noise, model.objective.interval, Solver("rk4", steps=steps)).x
        solutions = [
            solve(velocity, noise, model.objective.interval, point.solver)
            for point in solver_settings(settings)
        ]
    for number, solution in enumerate(solutions):
        difference = (solution.x - exact).double().flatten(1)
        content[f"error-{number}"] = difference.square().mean(1).sqrt().cpu()
        content[f"features-{number}"] = extractor(model.quantizer.quantize(solution.x))[0]
        content[f"nfe-{number}"] = torch.full((len(numbers),), solution.nfe)
    content["forwards"] = torch.tensor([forwards_per_call(velocity)])
    return content


def curve_record(
    parts: Sequence[Mapping[str, Tensor]], settings: NfeCurveSection, reference: Gaussian, features: str
) -> dict[str, Any]:
    """The record of the curve in the scores file: one record per point."""
    records = list[dict[str, Any]]()
    for number, point in enumerate(solver_settings(settings)):
        values = {
            name: torch.cat([part[f"{name}-{number}"] for part in parts])
            for name in ("error", "features", "nfe")
        }
        frechet = estimate_frechet_distance(
            values["features"].to(reference.mean.device), reference, limit=False
        )
        error = values["error"]
        records.append(
            {
                **point.record,
                "nfe": values["nfe"].double().mean().item(),
                "error": error.mean().item(),
                "error_stderr": error.std().item() / len(error) ** 0.5,
                "frechet_distance": frechet.value,
                "frechet_distance_stderr": frechet.stderr,
            }
        )
    return {
        "images": settings.images,
        "features": features,
        "forwards_per_evaluation": int(parts[0]["forwards"]),
        "dtype": DTYPE,
        "exact": {"solver": "rk4", "evaluations": settings.exact_nfe},
        "error": "root mean square over dimensions, data in [-1, 1]",
        "points": records,
    }
