"""ODE solver for dx/dt = u(t, x) with NFE and step counts, by torchdiffeq or by this package's own methods.

An interval (start, end) with start > end is solved backwards, from data to noise. The vector field is never
evaluated outside the interval. The state is float32 or better.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from fm_core.errors import SolverError
from fm_core.method.paths import Path
from fm_core.method.solver import ADAPTIVE, FIXED, Solver
from fm_core.method.step_loop import march, odeint
from fm_core.method.types import Evaluations, Interval, NoiseSource, Velocity

__all__ = [
    "ADAPTIVE",
    "FIXED",
    "Integration",
    "Solution",
    "Solver",
    "State",
    "StateField",
    "integrate",
    "solve",
]

State = tuple[Tensor, ...]
StateField = Callable[[Tensor, State], State]


@dataclass(frozen=True)
class Solution:
    """The state at the end of the interval, and the cost of the solve."""

    x: Tensor  # [N, ...]: the state at the end of the interval
    nfe: int  # network evaluations per image (two per call under guidance), of all networks
    accepted: int | None  # accepted steps; None if the method does not report them (scipy_solver)
    rejected: int | None  # rejected steps; None likewise
    times: Tensor | None = None  # [T]: the requested times
    trajectory: Tensor | None = None  # [T, N, ...]: the states at those times
    guide_nfe: int = 0  # the part of nfe spent in the weaker network of autoguidance


def solve(
    velocity: Velocity,
    x0: Tensor,
    interval: Interval,
    solver: Solver,
    at: Sequence[float] | None = None,
    *,
    path: Path | None = None,
    noise: NoiseSource | None = None,
) -> Solution:
    """Solve the ODE from the start of the interval to its end, without gradients.

    Args:
        velocity: u(t, x), t scalar, x [N, ...] -> [N, ...], with the attributes of `types.Velocity`. Adaptive
            methods of torchdiffeq end a step at each of its `jumps`.
        x0: [N, ...], the state at interval[0]. To sample, path.source_std times standard normal noise.
        interval: (start, end); start > end is solved backwards, by methods of torchdiffeq with equal or
            adaptive steps.
        solver: the method and its settings.
        at: times of the trajectory, inside the interval and in its direction. Fixed-step methods interpolate
            linearly between their steps. This takes no further evaluations.
        path: the path of the velocity, for solvers and grids that need it (`Solver.needs_path`).
        noise: the noise of each step, for stochastic solvers.

    Raises:
        SolverError: the step size underflowed or the state is not finite.
        UserError: the grid does not fit the interval or the path.
        ValueError: `at` leaves the interval or is not strictly monotonic in its direction; a required path or
            noise is missing; or the solver cannot solve backwards.
    """
    times = None if at is None else torch.tensor(list(at), dtype=torch.float64)
    counted = _CountedVelocity(velocity)
    if not solver.plain:
        _output_times(interval, at)  # validates `at`
        states = march(counted, x0, interval, solver, at or [], path, noise)
        trajectory = None if at is None else torch.stack(states.trajectory)
        return Solution(states.x, counted.nfe, solver.steps, 0, times, trajectory, counted.guide_nfe)

    def field(t: Tensor, state: State) -> State:
        return (counted(t, state[0]),)

    result = integrate(field, (x0,), interval, solver, at, jumps=getattr(velocity, "jumps", ()))
    trajectory = None if at is None else result.states[0][result.requested]
    return Solution(
        result.states[0][-1],
        counted.nfe,
        result.accepted,
        result.rejected,
        times,
        trajectory,
        counted.guide_nfe,
    )


def forwards_per_call(velocity: Velocity) -> int:
    """Largest number of network evaluations per call of the velocity: its attribute `forwards`, or 1."""
    return int(getattr(velocity, "forwards", 1))


def evaluations_at(velocity: Velocity, t: Tensor, dtype: torch.dtype) -> Evaluations:
    """Network evaluations per call at t with x of this dtype: of the network, and of the weaker network."""
    at_time = getattr(velocity, "evaluations_at", None)
    return at_time(t, dtype) if at_time else (forwards_per_call(velocity), 0)


class _CountedVelocity:
    """A velocity whose network evaluations are counted."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.nfe = self.guide_nfe = 0
        if hasattr(velocity, "displacement"):
            self.displacement = self._displacement

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        of_network, of_guide = evaluations_at(self.velocity, t, x.dtype)
        self.nfe += of_network + of_guide
        self.guide_nfe += of_guide
        return self.velocity(t, x)

    def _displacement(self, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
        self.nfe += 1
        displacement = getattr(self.velocity, "displacement", None)
        assert displacement is not None, "set in the constructor only if there is one"
        return cast(Tensor, displacement(t, s, x))


@dataclass(frozen=True)
class Integration:
    """Result of `integrate`."""

    states: State  # each [T, ...], over all output times
    requested: slice  # the output times that were requested by `at`
    calls: int  # number of calls of the vector field
    accepted: int | None  # accepted steps; None if the method does not report them
    rejected: int | None


def integrate(
    field: StateField,
    state: State,
    interval: Interval,
    solver: Solver,
    at: Sequence[float] | None = None,
    *,
    jumps: Sequence[float] = (),
    gradients: bool = False,
    ode: Callable[..., Any] = odeint,
) -> Integration:
    """Solve an ODE whose state is a tuple of tensors; `solve` is the special case of one tensor.

    Args:
        field: (t scalar, state) -> d state / dt, tensor by tensor. The first dimension of all tensors is N.
        state: the state at interval[0].
        interval: (start, end).
        solver: a method of torchdiffeq with equal or adaptive steps, and its settings.
        at: further times at which to return the state.
        jumps: times at which the field is not continuous; adaptive methods end a step there. Times outside
            the interval are ignored.
        gradients: whether to record the computation for autograd.
        ode: `torchdiffeq.odeint` or a function with its signature, such as `odeint_adjoint`.

    Raises:
        SolverError: the step size underflowed or the state is not finite.
        UserError: the solver is not a method of torchdiffeq, or has a time grid.
        ValueError: the interval is empty, or `at` is invalid as in `solve`.
    """
    solver.require_plain("an ODE of several states, as of a likelihood,")
    start, end = interval
    times, requested = _output_times(interval, at)
    state = tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in state)
    counted = _CountingField(field, interval, solver)
    t = torch.tensor(times, dtype=torch.float64, device=state[0].device)
    try:
        with nullcontext() if gradients else torch.no_grad():
            states = ode(counted, state, t, method=solver.method, **_odeint_arguments(solver, t, jumps))
    except AssertionError as error:  # torchdiffeq asserts that t + dt > t
        raise SolverError(f"solver {solver.method} failed between t = {start} and {end}: {error}") from error
    if not all(bool(torch.isfinite(part[-1]).all()) for part in states):
        raise SolverError(f"solver {solver.method} reached t = {end} with a state that is not finite")
    return Integration(cast(State, states), requested, counted.calls, counted.accepted, counted.rejected)


def _output_times(interval: Interval, at: Sequence[float] | None) -> tuple[list[float], slice]:
    """All output times of a solve, and the slice of them that was requested."""
    start, end = interval
    if start == end:
        raise ValueError(f"the interval {interval} is empty")
    if at is None:
        return [start, end], slice(0, 0)
    inner = list(at)
    direction = 1 if end > start else -1
    ordered = [start, *inner, end]
    increasing = all(direction * (b - a) > 0 for a, b in pairwise(inner))
    if not inner or not increasing or not all(min(interval) <= t <= max(interval) for t in inner):
        raise ValueError(
            f"trajectory times must run from {start} towards {end} without repetition, not {inner}"
        )
    first, last = inner[0] == start, inner[-1] == end
    return ordered[first : len(ordered) - last], slice(1 - first, 1 - first + len(inner))


def _odeint_arguments(solver: Solver, t: Tensor, jumps: Sequence[float]) -> dict[str, Any]:
    """Keyword arguments of odeint other than the method."""
    arguments: dict[str, Any] = {}
    if solver.rtol is not None:
        arguments.update(rtol=solver.rtol, atol=solver.atol)
    if solver.method == "scipy_solver":
        return arguments
    if solver.adaptive:
        # Without step_t torchdiffeq steps past the end (t = 1.06 for dopri5) and interpolates back.
        options: dict[str, Any] = {"step_t": t[-1:].clone()}
        low, high = sorted((float(t[0]), float(t[-1])))
        if inside := [jump for jump in jumps if low < jump < high]:
            options["jump_t"] = t.new_tensor(inside)
        if solver.error_norm == "worst":
            options["norm"] = _max_rms_norm
        return arguments | {"options": options}
    steps = cast(int, solver.steps)

    # Pass a grid instead of step_size, whose rounding can make torchdiffeq take an extra step.
    def grid(_func: object, _y0: object, t: Tensor) -> Tensor:
        return torch.linspace(float(t[0]), float(t[-1]), steps + 1, dtype=t.dtype, device=t.device)

    return arguments | {"options": {"grid_constructor": grid}}


def _max_rms_norm(parts: State) -> Tensor:
    """The maximum, over examples and tensors of the state, of the RMS over dimensions."""
    return torch.stack([part.flatten(1).square().mean(1).sqrt().max() for part in parts]).max()


class _CountingField:
    """Wrapper of the vector field that counts calls and steps and clamps t to the interval."""

    def __init__(self, field: StateField, interval: Interval, solver: Solver) -> None:
        self.field = field
        self.low, self.high = min(interval), max(interval)
        self.calls = 0
        self.accepted: int | None = 0 if solver.adaptive else solver.steps
        self.rejected: int | None = 0
        if solver.method == "scipy_solver":
            self.accepted = self.rejected = None
        elif solver.adaptive:
            # torchdiffeq looks up these names, and warns if a method does not use them.
            self.callback_accept_step = self._accept
            self.callback_reject_step = self._reject

    def __call__(self, t: Tensor, state: State) -> State:
        self.calls += 1
        # The selection of the first step size may evaluate past the end if the field varies slowly.
        return self.field(t.clamp(self.low, self.high), state)

    def _accept(self, *_: object) -> None:
        self.accepted = (self.accepted or 0) + 1

    def _reject(self, *_: object) -> None:
        self.rejected = (self.rejected or 0) + 1
