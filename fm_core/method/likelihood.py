"""Log-densities by the instantaneous change of variables (eqs. 27 to 34).

The ODE is solved from x1 at the end of the interval (data) back to its start (noise):

    log p(x1) = log N(x_start; 0, s^2 I) - integral of div u_t(x_t) dt over the interval,

which is the exact log-density of the model, the pushforward of its source N(0, s^2 I) over its interval.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.method.divergence import Divergence
from fm_core.method.ode import Solver, State, evaluations_at, integrate
from fm_core.method.types import Interval, Velocity


@dataclass(frozen=True)
class LogDensity:
    """The log-density of each example and the cost of computing it."""

    log_density: Tensor  # [N] float64, nats: the mean over probes, unbiased
    per_probe: Tensor  # [N, P] float64, nats: from each probe alone (P = 1 if exact)
    source: Tensor  # [N, ...]: the state at the start of the interval, noise
    nfe: int  # network evaluations per image
    accepted: int | None  # solver steps; None where the solver does not report them
    rejected: int | None


def log_density(
    velocity: Velocity,
    x1: Tensor,
    interval: Interval,
    solver: Solver,
    divergence: Divergence,
    source_std: float = 1.0,
) -> LogDensity:
    """Log-density at x1 of the pushforward of N(0, source_std^2 I) by the velocity over the interval.

    Args:
        velocity: u(t, x), t scalar, x [N, ...]; must be differentiable in x.
        x1: [N, ...], float32 or better, at interval[1].
        interval: the objective's interval (start, end), start < end; the ODE is solved from end to start.
        solver: the ODE solver. Fixed-step Euler overestimates densities.
        divergence: Exact() or Hutchinson(probes).
        source_std: the path's source_std.

    Raises:
        ValueError: the interval is not increasing.
        ArithmeticError: the solver failed; see `solve`.
    """
    start, end = interval
    if not start < end:
        raise ValueError(f"the interval must increase, from noise to data, not {interval}")
    dimension = x1[0].numel()

    nfe = 0

    def field(t: Tensor, state: State) -> State:
        nonlocal nfe
        nfe += sum(evaluations_at(velocity, t, state[0].dtype))
        u, trace = divergence.with_velocity(velocity, t, state[0])
        # Divide by the dimension so that the solver's tolerance is in nats per dimension, which takes fewer
        # steps for the same result.
        return u, trace / dimension

    initial = (x1, x1.new_zeros(x1.shape[0], divergence.probe_count))
    result = integrate(field, initial, (end, start), solver, jumps=getattr(velocity, "jumps", ()))
    x0, change = result.states[0][-1], result.states[1][-1]
    # Because the ODE is solved from end to start, the state is *minus* the integral from start to end.
    per_probe = normal_log_density(x0, source_std)[:, None] + change.double() * dimension
    return LogDensity(per_probe.mean(1), per_probe, x0, nfe, result.accepted, result.rejected)


def normal_log_density(x: Tensor, std: float) -> Tensor:
    """Log-density of N(0, std^2 I) at x [N, ...] in nats, [N]; in float64 to sum thousands of terms."""
    flat = x.flatten(1).double()
    constant = flat.shape[1] * (math.log(std) + 0.5 * math.log(2 * math.pi))
    return -0.5 * (flat / std).square().sum(1) - constant


def log_mean_exp(log_densities: Tensor) -> Tensor:
    """Return log (1/K) sum_k exp(l_k) over the first dimension of [K, ...]."""
    return torch.logsumexp(log_densities, dim=0) - math.log(log_densities.shape[0])
