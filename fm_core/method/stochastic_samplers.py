"""Samplers that add noise in each step and keep the marginals of the ODE.

Both need the score. It is computed as -E[x0 | x_t] / sigma_t, which is the score of the marginals only if x0
and x1 are independent.

sde: the reverse SDE dx = (u + D s) dt + sqrt(2 D) dW of SiT (Ma et al. 2024, arXiv 2401.08740) with any
diffusion coefficient D(t). With E[x1 | x_t] constant over a step, the SDE is linear and its solution is

    x_t = alpha_t E[x1] + sigma_t (sqrt(1 - kappa) E[x0] + sqrt(kappa) noise),
    kappa = 1 - exp(-integral of 2 D / sigma^2 dt over the step).

Fresh noise replaces a fraction kappa of the noise variance. The step is stable for any step size, and D = 0
gives DDIM. The weak order is 1, with one evaluation per step.

edm: algorithm 2 of Karras et al. 2022 (arXiv 2206.00364), in terms of nu = sigma_t / alpha_t and x / alpha_t,
which turn every path into theirs. Noise raises nu to (1 + gamma) nu, gamma = min(churn / steps, sqrt(2) - 1),
and a step of Heun's method in nu leads from there to the next time. Each step takes two evaluations, except
the last and, where alpha = 0, the first, which are Euler steps with one evaluation. Without churn the sampler
is deterministic and has second order.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fm_core.method.denoiser import Coefficients, Denoiser, round_time
from fm_core.method.paths import Path
from fm_core.method.solver import Churn, Diffusion
from fm_core.method.time_grid import half_log_snr, times_at

NODES = 64
"""Number of nodes of the quadrature of the diffusion over one step."""
FORMS: dict[str, Callable[[Path, Tensor, float], Tensor]] = {
    "constant": lambda path, t, scale: torch.full_like(t, scale),
    "sigma": lambda path, t, scale: scale * path.sigma(t),
    "linear": lambda path, t, scale: scale * (1 - t),
    "decreasing": lambda path, t, scale: (scale * torch.cos(math.pi * t) + 1) ** 2 / 4,
    "increasing-decreasing": lambda path, t, scale: scale * torch.sin(math.pi * t) ** 2,
}
"""The diffusion coefficients by name, except for sbdm, whose integral is known in closed form."""


def sde_step(
    denoiser: Denoiser, diffusion: Diffusion, t: float, to: float, x: Tensor, noise: Callable[[], Tensor]
) -> Tensor:
    """A step of the reverse SDE from the state x [N, ...] at t to the time `to`."""
    evaluation, target = denoiser(t, x), Coefficients.at(denoiser.path, to)
    kappa = replaced_share(denoiser.path, diffusion, t, to)
    if kappa == 0:
        return evaluation.euler(target)
    remaining, fresh = target.sigma * math.sqrt(1 - kappa), target.sigma * math.sqrt(kappa)
    state = torch.add(evaluation.data * target.alpha, evaluation.noise, alpha=remaining)
    return torch.add(state, noise(), alpha=fresh)


def replaced_share(path: Path, diffusion: Diffusion, t: float, to: float) -> float:
    """The fraction kappa of a step from t to `to`, in [0, 1]."""
    if diffusion.form == "sbdm":
        # 2 D = scale g^2 = 2 scale sigma^2 d lambda / dt
        start, end = half_log_snr(path, torch.tensor([t, to], dtype=torch.float64)).tolist()
        return -math.expm1(-2 * diffusion.scale * (end - start)) if diffusion.scale else 0.0
    nodes, weights = _quadrature()
    times = t + (to - t) * nodes
    if isinstance(diffusion.form, str):
        coefficient = FORMS[diffusion.form](path, times, diffusion.scale)
    else:
        coefficient = diffusion.scale * diffusion.form(times)
    rate = 2 * coefficient / path.sigma(times) ** 2
    return -math.expm1(-float((weights * rate).sum()) * (to - t))


@cache
def _quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def edm_step(
    denoiser: Denoiser,
    churn: Churn,
    steps: int,
    span: tuple[float, float],
    x: Tensor,
    noise: Callable[[], Tensor],
    last: bool,
) -> Tensor:
    """One of `steps` steps of EDM's sampler, over the times `span`, from the state x [N, ...]."""
    path, (t, to) = denoiser.path, span
    at, target = Coefficients.at(path, t), Coefficients.at(path, to)
    if at.alpha > 0 and (gamma := _gamma(churn, steps, at.sigma / at.alpha)):
        # nu cannot be raised above its value at the path's start.
        wanted = -math.log((1 + gamma) * at.sigma / at.alpha)
        t = round_time(times_at(path, (path.interval[0], t), [wanted])[0], x.dtype)
        higher = Coefficients.at(path, t)
        added = (higher.sigma / higher.alpha) ** 2 - (at.sigma / at.alpha) ** 2
        x = x * (higher.alpha / at.alpha)
        x = torch.add(x, noise(), alpha=higher.alpha * churn.noise * math.sqrt(max(0.0, added)))
        at = higher
    first = denoiser(t, x)
    euler = first.euler(target)
    if last or at.alpha <= 0:
        return euler
    second = denoiser(to, euler)
    # Heun's correction of the slope E[x0] in nu, on x / alpha.
    step = target.alpha * (target.sigma / target.alpha - at.sigma / at.alpha)
    return torch.add(euler, second.noise - first.noise, alpha=step / 2)


def _gamma(churn: Churn, steps: int, nu: float) -> float:
    return min(churn.amount / steps, math.sqrt(2) - 1) if churn.low <= nu <= churn.high else 0.0
