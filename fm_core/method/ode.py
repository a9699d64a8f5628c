"""Solving dx/dt = u(t, x), with torchdiffeq, and counting what it costs.

Time runs from t = 0 (noise) to t = 1 (data); an interval (start, end) with start > end runs backwards, from
data to noise. The field is never evaluated outside the interval. The state is float32 or better.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torchdiffeq import odeint

from fm_core.errors import UserError
from fm_core.method.types import Interval, Velocity

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "implicit_adams")
WRONG = ("explicit_adams",)
"""Methods of torchdiffeq 0.2.5 that end far off with some numbers of steps, and say nothing."""
ALIASES = {"heun": "heun2"}

State = tuple[Tensor, ...]
StateField = Callable[[Tensor, State], State]


@dataclass(frozen=True)
class Solver:
    """A method of torchdiffeq with all that moves its result, and nothing that it would ignore.

    Args:
        method: an adaptive method (dopri5, dopri8, bosh3, fehlberg2, adaptive_heun, scipy_solver), or one of
            fixed steps (euler, midpoint, heun or heun2, heun3, rk4, implicit_adams).
        rtol: relative tolerance, adaptive methods and implicit_adams only; 1e-5, the paper's, unless given.
        atol: absolute tolerance, as rtol.
        steps: number of equal steps, required by fixed methods, refused by adaptive ones.
        error_norm: what an adaptive step must keep below 1. "batch": the RMS over the whole batch; the steps
            then depend on the batch, and the result by about 1e-5. "worst": the largest RMS of an example.

    Raises:
        UserError: an unknown method or one that torchdiffeq gets wrong, a missing setting, or one the method
            would ignore.
    """

    method: str = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    error_norm: Literal["batch", "worst"] = "batch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", ALIASES.get(self.method, self.method))
        if self.method in WRONG:
            # dx/dt = -x from 1: 0.4170 in 40 steps, where exp(-1) = 0.3679.
            raise UserError(f"solver {self.method} of torchdiffeq ends far off; implicit_adams does not")
        if self.method not in ADAPTIVE + FIXED:
            raise UserError(f"unknown solver {self.method!r}; allowed: {', '.join(ADAPTIVE + FIXED)}, heun")
        if self.error_norm not in ("batch", "worst"):
            raise UserError(f"solver {self.method}: error_norm is batch or worst, not {self.error_norm!r}")
        self._settle_tolerances()
        self._settle_steps()

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its steps."""
        return self.method in ADAPTIVE

    def _settle_tolerances(self) -> None:
        if self.adaptive or self.method == "implicit_adams":
            for name in ("rtol", "atol"):
                value = getattr(self, name)
                object.__setattr__(self, name, 1e-5 if value is None else value)
                if not getattr(self, name) > 0:
                    raise UserError(f"solver {self.method}: {name} must be positive, not {value}")
        elif self.rtol is not None or self.atol is not None:
            raise UserError(f"solver {self.method} takes steps of fixed size and would ignore rtol and atol")
        if self.error_norm != "batch" and (not self.adaptive or self.method == "scipy_solver"):
            raise UserError(f"solver {self.method} would ignore error_norm")

    def _settle_steps(self) -> None:
        if self.adaptive and self.steps is not None:
            raise UserError(f"solver {self.method} chooses its own steps and would ignore steps={self.steps}")
        if not self.adaptive and (self.steps is None or self.steps < 1):
            raise UserError(f"solver {self.method} needs steps, a positive number, not {self.steps}")


@dataclass(frozen=True)
class Solution:
    """Where the ODE ended and what it cost."""

    x: Tensor  # [N, ...]: the state at the interval's end
    nfe: int  # forwards of the network for each image (two a call under guidance)
    accepted: int | None  # steps; None where the method does not tell (scipy_solver)
    rejected: int | None
    times: Tensor | None = None  # [T]: the times asked for
    trajectory: Tensor | None = None  # [T, N, ...]: the states then


def solve(
    velocity: Velocity,
    x0: Tensor,
    interval: Interval,
    solver: Solver,
    at: Sequence[float] | None = None,
) -> Solution:
    """Carry x0 from the start of the interval to its end, without gradients.

    Args:
        velocity: u(t, x), t scalar, x [N, ...] -> [N, ...]. If it has an attribute `forwards`, that many
            forwards of the network are counted a call.
        x0: [N, ...], the state at interval[0]. To sample, path.source_std times standard normal noise.
        interval: (start, end); start > end runs backwards.
        solver: the method.
        at: times of the trajectory, inside the interval and in its direction. Fixed methods interpolate
            linearly between their steps. Costs no forwards.

    Raises:
        ArithmeticError: the step underflowed or the state is not finite.
        ValueError: `at` is not as described.
    """

    def field(t: Tensor, state: State) -> State:
        return (velocity(t, state[0]),)

    run = integrate(field, (x0,), interval, solver, at)
    forwards = forwards_per_call(velocity)
    times = None if at is None else torch.tensor(list(at), dtype=torch.float64)
    trajectory = None if at is None else run.states[0][run.wanted]
    return Solution(run.states[0][-1], run.calls * forwards, run.accepted, run.rejected, times, trajectory)


def forwards_per_call(velocity: Velocity) -> int:
    """Forwards of the network in one call of the velocity: its attribute `forwards`, or 1."""
    return int(getattr(velocity, "forwards", 1))


@dataclass(frozen=True)
class Integration:
    """A finished integration of a state of several tensors."""

    states: State  # each [T, ...] over the times of the run
    wanted: slice  # which of those times were asked for
    calls: int
    accepted: int | None
    rejected: int | None


def integrate(
    field: StateField,
    state: State,
    interval: Interval,
    solver: Solver,
    at: Sequence[float] | None = None,
    *,
    gradients: bool = False,
    ode: Callable[..., Any] = odeint,
) -> Integration:
    """Integrate a field of several tensors; `solve` is this with one.

    Args:
        field: (t scalar, state) -> d state / dt, tensor by tensor. All tensors have N first.
        state: the state at interval[0].
        interval: (start, end).
        solver: the method.
        at: further times at which the state is wanted.
        gradients: whether to record the computation.
        ode: `torchdiffeq.odeint` or a function with its arguments, such as one that uses the adjoint.
    """
    start, end = interval
    times, wanted = _times(interval, at)
    state = tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in state)
    counted = _Counted(field, interval, solver)
    t = torch.tensor(times, dtype=torch.float64, device=state[0].device)
    try:
        with nullcontext() if gradients else torch.no_grad():
            states = ode(counted, state, t, method=solver.method, **_arguments(solver, t))
    except AssertionError as error:  # torchdiffeq asserts that t + dt > t
        raise ArithmeticError(
            f"{solver.method} cannot go on between t = {start} and {end}: {error}"
        ) from error
    if not all(bool(torch.isfinite(part[-1]).all()) for part in states):
        raise ArithmeticError(f"{solver.method} ended at t = {end} in a state that is not finite")
    return Integration(cast(State, states), wanted, counted.calls, counted.accepted, counted.rejected)


def _times(interval: Interval, at: Sequence[float] | None) -> tuple[list[float], slice]:
    """All the times of a run, and where the wanted ones lie among them."""
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


def _arguments(solver: Solver, t: Tensor) -> dict[str, Any]:
    """Arguments of odeint beside the method."""
    arguments: dict[str, Any] = {}
    if solver.rtol is not None:
        arguments.update(rtol=solver.rtol, atol=solver.atol)
    if solver.method == "scipy_solver":
        return arguments
    if solver.adaptive:
        # Without step_t torchdiffeq steps past the end (t = 1.06 for dopri5) and interpolates back.
        options: dict[str, Any] = {"step_t": t[-1:].clone()}
        if solver.error_norm == "worst":
            options["norm"] = _worst
        return arguments | {"options": options}
    steps = cast(int, solver.steps)

    # A grid rather than step_size: a size that rounds badly makes torchdiffeq take one step more.
    def grid(_func: object, _y0: object, t: Tensor) -> Tensor:
        return torch.linspace(float(t[0]), float(t[-1]), steps + 1, dtype=t.dtype, device=t.device)

    return arguments | {"options": {"grid_constructor": grid}}


def _worst(parts: State) -> Tensor:
    """The largest, over examples and parts of the state, of the RMS over dimensions."""
    return torch.stack([part.flatten(1).square().mean(1).sqrt().max() for part in parts]).max()


class _Counted:
    """The field with its calls and steps counted and its time kept inside the interval."""

    def __init__(self, field: StateField, interval: Interval, solver: Solver) -> None:
        self.field = field
        self.low, self.high = min(interval), max(interval)
        self.calls = 0
        self.accepted: int | None = 0 if solver.adaptive else solver.steps
        self.rejected: int | None = 0
        if solver.method == "scipy_solver":
            self.accepted = self.rejected = None
        elif solver.adaptive:
            # torchdiffeq looks these names up, and warns where a method has no use for them.
            self.callback_accept_step = self._accept
            self.callback_reject_step = self._reject

    def __call__(self, t: Tensor, state: State) -> State:
        self.calls += 1
        # The probe that chooses the first step may look past the end where the field is slow.
        return self.field(t.clamp(self.low, self.high), state)

    def _accept(self, *_: object) -> None:
        self.accepted = (self.accepted or 0) + 1

    def _reject(self, *_: object) -> None:
        self.rejected = (self.rejected or 0) + 1
