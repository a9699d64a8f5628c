"""Fixed-step solution of a sampling ODE or SDE on a time grid, from noise to data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from fm_core.errors import SolverError, UserError
from fm_core.method.denoiser import Coefficients, Denoiser, coefficients_of_means, round_time
from fm_core.method.multistep_solvers import Multistep
from fm_core.method.paths import Path
from fm_core.method.solver import FLOW_MAP, MULTISTEP, SAMPLERS, Solver
from fm_core.method.stochastic_samplers import edm_step, sde_step
from fm_core.method.types import Interval, NoiseSource, Velocity

Step = Callable[[int, float, float, Tensor], Tensor]
"""(number, t, to, state [N, ...] at t) -> state at `to`."""


@dataclass
class March:
    """Result of `march`."""

    x: Tensor  # [N, ...]: the state at the end of the interval
    calls: int = 0  # number of calls of the velocity
    trajectory: list[Tensor] = field(default_factory=list[Tensor])  # the states at the requested times


def march(
    velocity: Velocity,
    x: Tensor,
    interval: Interval,
    solver: Solver,
    at: Sequence[float],
    path: Path | None,
    noise: NoiseSource | None,
) -> March:
    """Solve from the start of the interval to its end, without gradients.

    Args:
        velocity: u(t, x).
        x: [N, ...], the state at interval[0].
        interval: (start, end), increasing.
        solver: a solver with a fixed number of steps.
        at: times at which to interpolate linearly between the steps, increasing.
        path: the path, if the solver needs it.
        noise: the noise of each step, if the solver is stochastic.

    Raises:
        SolverError: the state is not finite.
        UserError: the grid does not fit the interval or the path.
        ValueError: the interval decreases, a required path or noise is missing, or the velocity has no
            displacement and the solver needs it.
    """
    start, end = interval
    if start > end:
        raise ValueError(
            f"solver {solver.method} on the time grid {solver.grid.name} solves from noise to data only"
        )
    if solver.needs_path and path is None:
        raise ValueError(f"solver {solver.method} on the time grid {solver.grid.name} needs the path")
    if solver.stochastic and noise is None:
        raise ValueError(f"solver {solver.method} is stochastic and needs a source of noise")
    result = March(x.to(torch.promote_types(x.dtype, torch.float32)))
    grid = solver.grid.on(interval, solver.steps or 1, path)
    seen = _seen_times(grid.times, result.x.dtype, solver)

    def counted(t: Tensor, x: Tensor) -> Tensor:
        result.calls += 1
        return velocity(t, x)

    if solver.method == FLOW_MAP:
        step = _flow_map_step(velocity)
    else:
        step = _step_of(solver, counted, path, noise, grid.euler_last)
    with torch.no_grad():
        for number, (t, to) in enumerate(pairwise(grid.times)):
            state = step(number, seen[number], seen[number + 1], result.x)
            wanted = [time for time in at if t < time <= to or (number == 0 and time == t)]
            result.trajectory += [torch.lerp(result.x, state, (time - t) / (to - t)) for time in wanted]
            result.x = state
    if not bool(torch.isfinite(result.x).all()):
        raise SolverError(f"solver {solver.method} reached t = {end} with a state that is not finite")
    return result


def check_steps(solver: Solver, interval: Interval, path: Path) -> None:
    """Check the steps of a solver on a path, in float32, without any evaluation of the velocity.

    Raises:
        UserError: the grid does not fit the interval or the path, or the solver needs E[x1 | x_t] at a time
            at which the velocity does not determine it.
    """
    if solver.plain:
        return
    grid = solver.grid.on(interval, solver.steps or 1, path)
    for t in _seen_times(grid.times, torch.float32, solver)[:-1]:
        if solver.method in (*MULTISTEP, *SAMPLERS):
            coefficients_of_means(path, t)


def _seen_times(times: Sequence[float], dtype: torch.dtype, solver: Solver) -> list[float]:
    """The times of the steps, rounded as the network receives them."""
    seen = [round_time(t, dtype) for t in times]
    if any(to <= t for t, to in pairwise(seen)):
        raise UserError(
            f"steps {solver.steps}: some steps of the time grid {solver.grid.name} are too short for float32;"
            " take fewer steps, or other bounds"
        )
    return seen


def _flow_map_step(velocity: Velocity) -> Step:
    """The step function of a flow map: one displacement, on any grid."""
    displacement = getattr(velocity, "displacement", None)
    if displacement is None:
        raise ValueError(f"solver {FLOW_MAP} needs the displacement of a network with two times")

    def step(number: int, t: float, to: float, x: Tensor) -> Tensor:
        times = (torch.tensor(time, dtype=x.dtype, device=x.device) for time in (t, to))
        return x + displacement(*times, x)

    return step


def _step_of(
    solver: Solver, velocity: Velocity, path: Path | None, noise: NoiseSource | None, euler_last: bool
) -> Step:
    """The step function of a solver; the last step is an Euler step in the x1 form if `euler_last`."""
    method, steps = solver.method, solver.steps or 1
    if path is None:
        return lambda number, t, to, x: _torchdiffeq_step(method, velocity, t, to, x)
    denoiser = Denoiser(velocity, path)
    multistep = Multistep(method, denoiser) if method in MULTISTEP else None
    euler_last = euler_last or (method in (*MULTISTEP, "edm") and method != "ab2")

    def step(number: int, t: float, to: float, x: Tensor) -> Tensor:
        euler = euler_last and number == steps - 1
        drawn = partial(_drawn, noise, number)
        if multistep is not None:
            return multistep.step(t, to, x, euler)
        if solver.churn is not None:
            return edm_step(denoiser, solver.churn, steps, (t, to), x, drawn, euler)
        if euler:
            return denoiser(t, x).euler(Coefficients.at(path, to))
        if solver.diffusion is not None:
            return sde_step(denoiser, solver.diffusion, t, to, x, drawn)
        return _torchdiffeq_step(method, velocity, t, to, x)

    return step


def _drawn(noise: NoiseSource | None, number: int) -> Tensor:
    assert noise is not None, "a stochastic solver has a source of noise"
    return noise(number)


def _torchdiffeq_step(method: str, velocity: Velocity, t: float, to: float, x: Tensor) -> Tensor:
    """One step of a fixed-step method of torchdiffeq."""
    span = torch.tensor([t, to], dtype=torch.float64, device=x.device)
    return cast(Tensor, odeint(velocity, x, span, method=method))[-1]


def odeint(*arguments: Any, **options: Any) -> Any:
    """torchdiffeq.odeint, imported by the first call: it imports scipy, which training does not need."""
    import torchdiffeq

    return torchdiffeq.odeint(*arguments, **options)
