"""What fewer evaluations of the network cost: error of the solution and distance to the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_core.config import NfeCurveSection
from fm_core.errors import UserError
from fm_core.evaluation.features.extractor import Extractor
from fm_core.evaluation.metrics.feature_statistics import Gaussian
from fm_core.evaluation.metrics.frechet import distance
from fm_core.method.ode import ADAPTIVE, Solver, forwards_per_call, solve
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.compiled_network import matmul_precision
from fm_core.sampling.generate import Draw

EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
"""Of the field, in one step of a method."""
DTYPE = "float32"
"""Of the network, whatever sample.precision is: errors of solvers are not to drown in rounding."""


@dataclass(frozen=True)
class SolverSetting:
    """A solver at one budget."""

    solver: Solver

    @property
    def asked(self) -> dict[str, Any]:
        """What a person would call it."""
        told = {"rtol": self.solver.rtol} if self.solver.adaptive else {"steps": self.solver.steps}
        return {"solver": self.solver.method, **told}


def points(settings: NfeCurveSection) -> list[SolverSetting]:
    """Every solver at every budget that pays for a step. UserError for others than those of fixed steps."""
    found = list[SolverSetting]()
    for name in settings.solvers:
        method = "heun2" if name == "heun" else name
        if method not in EVALUATIONS:
            advice = "dopri5 is always there" if name in ADAPTIVE else f"allowed: {', '.join(EVALUATIONS)}"
            raise UserError(f"evaluate.nfe_curve.solvers: {name} takes no fixed steps of one cost; {advice}")
        steps = [budget // EVALUATIONS[method] for budget in settings.nfe]
        found += [SolverSetting(Solver(method, steps=count)) for count in dict.fromkeys(steps)]
    return found + [SolverSetting(Solver("dopri5", rtol=t, atol=t)) for t in settings.tolerances]


def curve_part(
    model: Model,
    draw: Draw,
    settings: NfeCurveSection,
    extractor: Extractor,
    numbers: Sequence[int],
    device: torch.device,
) -> dict[str, Tensor]:
    """All points for the images of these numbers, from the same noise.

    The model is in float32, as it is loaded. For point p: `error-p` float64 [n], the root mean square
    difference from the exact solution over dimensions, in the model's units (the data span [-1, 1]);
    `features-p` [n, D]; `nfe-p` int64 [n].
    """
    labels = draw.labels(model, numbers)
    velocity = draw.velocity(model, None if labels is None else labels.to(device))
    noise = draw.noise(model, numbers).to(device)
    steps = settings.exact_nfe // EVALUATIONS["rk4"]
    content = dict[str, Tensor]()
    with matmul_precision():
        exact = solve(velocity, noise, model.objective.interval, Solver("rk4", steps=steps)).x
        solutions = [
            solve(velocity, noise, model.objective.interval, point.solver) for point in points(settings)
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
    """The curve as the scores file has it: a record for each point."""
    records = list[dict[str, Any]]()
    for number, point in enumerate(points(settings)):
        joined = {
            name: torch.cat([part[f"{name}-{number}"] for part in parts])
            for name in ("error", "features", "nfe")
        }
        found = distance(joined["features"].to(reference.mean.device), reference, limit=False)
        error = joined["error"]
        records.append(
            {
                **point.asked,
                "nfe": joined["nfe"].double().mean().item(),
                "error": error.mean().item(),
                "error_stderr": error.std().item() / len(error) ** 0.5,
                "frechet_distance": found.value,
                "frechet_distance_stderr": found.stderr,
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
