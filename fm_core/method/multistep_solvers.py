"""Solvers with one evaluation per step: DDIM, DPM-Solver++ 2M and 3M, UniPC, Adams-Bashforth.

With lambda = log(alpha / sigma), half of the log-SNR, and D = E[x1 | x_t], the ODE has the exact solution

    x_t = (sigma_t / sigma_s) x_s + sigma_t * integral of e^lambda D dlambda from lambda_s to lambda_t.

All but the last of these solvers replace D by a polynomial in lambda, with the coefficients of Lu et al. 2022
(arXiv 2211.01095) and Zhao et al. 2023 (arXiv 2302.04867):

    ddim       constant, the value at s. Equal to Euler's method on the OT path.
    dpmpp_2m   linear, from the last two values ("midpoint" in diffusers).
    dpmpp_3m   quadratic, from the last three values, but with half of the quadratic term, as in the authors'
               code and in diffusers.
    exp_ab3    the same with the full quadratic term: the exponential Adams-Bashforth method.
    unipc      dpmpp_2m; once D is known at t, the step to t is repeated with the quadratic through that value
               and the two before it, without a further evaluation (UniPC-2 with B(h) = e^-h - 1).
    ab2        linear extrapolation in t of the velocity itself, from its last two values.

Started from exact values, with steps of O(h) in lambda, these have order 1, 2, 2, 3 and 3; ab2 has order 2
with steps of O(h) in t. dpmpp_3m would have order 3 if it integrated the full quadratic; as published, it has
the order of dpmpp_2m and a smaller error. The order of the complete scheme is limited by its ends:

* The first step has one value of D and is a DDIM step; the second has at most two values. A single DDIM step
  leaves an error of O(h^2) that no later step removes. In unipc, the correction of the first step, with D
  linear, leaves O(h^3).
* The last step, except in ab2, is a DDIM step: sigma nearly vanishes at the end, so h is large there, and
  extrapolating over this step would multiply errors by h. As a single step it also leaves O(h^2) or, where
  sigma = 0 at the end, O(sigma^2) with sigma at the start of the step.

Therefore the complete scheme has order 1 for ddim and 2 for all others; exp_ab3 and unipc have smaller
errors, not a higher order. This holds on grids with steps of O(h) in lambda (log-snr, and edm and cosine away
from the ends) and, for ab2, on a uniform grid. With the other solvers on a uniform grid, the steps in lambda
do not become small at the ends of the OT path, where their errors sum to O(h^2 log 1/h); on the VP path the
last step leaves O(sigma^2) = O(h).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fm_core.method.denoiser import Coefficients, Denoiser, Evaluation

Terms = Sequence[tuple[float, Tensor]]
"""Terms of a sum, as (factor, tensor)."""
VALUES = {"ddim": 1, "dpmpp_3m": 3, "exp_ab3": 3}
"""Number of values of D that a step uses; 2 for the others."""
QUADRATIC = {"dpmpp_3m": 0.5, "exp_ab3": 1.0}
"""Fraction of the quadratic term that is applied."""


class Multistep:
    """Multistep solver, with the values of earlier steps that its next step needs.

    Args:
        method: ddim, dpmpp_2m, dpmpp_3m, exp_ab3, unipc or ab2.
        denoiser: evaluates the velocity.
    """

    def __init__(self, method: str, denoiser: Denoiser) -> None:
        self._method, self._denoiser = method, denoiser
        self._values = list[Tensor]()
        """D, or the velocity for ab2, at the last times, newest first."""
        self._times = list[float]()
        """lambda at these times, or t for ab2, newest first."""
        self._last: tuple[Evaluation, Tensor | None] | None = None
        """For unipc: the evaluation at the start of the last step, and the correction of its state."""

    def add_exact(self, t: float, x: Tensor) -> None:
        """Add the exact state x [N, ...] at a time before the first step; call in the order of the times."""
        self._remember(t, self._denoiser(t, x))

    def step(self, t: float, to: float, x: Tensor, euler: bool = False) -> Tensor:
        """Step from the state x at t to the state [N, ...] at time `to`; a DDIM step if `euler`."""
        evaluation = self._denoiser(t, x)
        correction = self._correction(evaluation) if self._method == "unipc" else None
        self._remember(t, evaluation)
        if self._method == "ab2" and not euler:
            return self._adams_bashforth(t, to, x)
        self._last = evaluation, correction
        target = Coefficients.at(self._denoiser.path, to)
        plain = _ddim(evaluation, correction, target)
        order = min(VALUES.get(self._method, 2), len(self._values))
        h = target.half_log_snr - self._times[0]
        if euler or order == 1 or math.isinf(h):
            return plain
        if order == 2:
            terms = _second_order(self._values, self._times, h)
        else:
            terms = _third_order(self._values, self._times, h, QUADRATIC[self._method])
        return _add(plain, target.alpha, terms)

    def _remember(self, t: float, evaluation: Evaluation) -> None:
        velocity = self._method == "ab2"
        self._values = [evaluation.velocity if velocity else evaluation.data, *self._values[:2]]
        self._times = [t if velocity else evaluation.at.half_log_snr, *self._times[:2]]

    def _adams_bashforth(self, t: float, to: float, x: Tensor) -> Tensor:
        h, newest = to - t, self._values[0]
        if len(self._values) == 1:
            return torch.add(x, newest, alpha=h)
        ratio = h / (t - self._times[1])
        return _add(x, h, [(1 + ratio / 2, newest), (-ratio / 2, self._values[1])])

    def _correction(self, evaluation: Evaluation) -> Tensor | None:
        """Correction of the state at an evaluation: the last step is repeated with the value of D there."""
        if self._last is None:
            return None
        (began, correction), at = self._last, evaluation.at
        h = at.half_log_snr - self._times[0]
        terms = _corrector(self._values, self._times, h, evaluation.data)
        return _add(_ddim(began, correction, at), at.alpha, terms) - evaluation.x


def _ddim(evaluation: Evaluation, correction: Tensor | None, to: Coefficients) -> Tensor:
    """DDIM step from the state of an evaluation plus a correction, with D as evaluated."""
    plain = evaluation.euler(to)
    if correction is None:
        return plain
    return torch.add(plain, correction, alpha=to.sigma / evaluation.at.sigma)


def _second_order(values: Sequence[Tensor], times: Sequence[float], h: float) -> Terms:
    """Terms that a step of h in lambda adds to DDIM's, divided by alpha, if D is linear ("midpoint")."""
    factor = -math.expm1(-h) / 2 * h / (times[0] - times[1])
    return [(factor, values[0]), (-factor, values[1])]


def _third_order(values: Sequence[Tensor], times: Sequence[float], h: float, quadratic: float) -> Terms:
    """Terms like `_second_order` for a quadratic D; the quadratic term is multiplied by `quadratic`."""
    near, far = times[0] - times[1], times[1] - times[2]
    first = math.expm1(-h) / h + 1
    second = quadratic * (2 * (math.expm1(-h) + h) / h**2 - 1)
    # d1 and d2 of Lu et al., in units of h, as factors of the two differences between neighbors. A value at
    # lambda = -inf, where the OT path begins, has no effect, because its difference is divided by infinity.
    share = 0.0 if math.isinf(far) else near / (near + far)
    spread = h / (near + far)
    of_near = first * (1 + share) - second * spread
    of_far = -first * share + second * spread
    a, b = of_near * h / near, of_far * h / far
    return [(a, values[0]), (b - a, values[1]), (-b, values[2])]


def _corrector(values: Sequence[Tensor], times: Sequence[float], h: float, value: Tensor) -> Terms:
    """Terms that a step of h in lambda adds to DDIM's, divided by alpha, if D at its end is `value`."""
    factor = -math.expm1(-h)
    if len(values) == 1:
        return [(factor / 2, value), (-factor / 2, values[0])]
    # Weights of the differences from the two other values that integrate a quadratic exactly.
    linear = (factor / h - 1) / -factor
    quadratic = 2 * ((factor / h - 1) / -h - 0.5) / -factor
    ratio = (times[1] - times[0]) / h
    earlier = 0.0 if math.isinf(ratio) else (linear - quadratic) / (1 - ratio)
    of_value, of_earlier = factor * (linear - earlier), factor * earlier / ratio
    return [(of_value, value), (-of_value - of_earlier, values[0]), (of_earlier, values[1])]


def _add(x: Tensor, factor: float, terms: Terms) -> Tensor:
    """Add a factor times a sum of terms to x."""
    for weight, tensor in terms:
        x = torch.add(x, tensor, alpha=factor * weight)
    return x
