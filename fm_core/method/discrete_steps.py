"""The noise of DDPM's discrete steps as a function of continuous time."""

import math
from collections.abc import Sequence
from functools import cache

from torch import Tensor, zeros_like


@cache
def discrete_coefficients(beta_min: float, beta_max: float, steps: int) -> tuple[float, ...]:
    """Coefficients of s, s^2, ..., s^7 in T(s) = -sum over j < s N of log(1 - beta_j), N = `steps`.

    beta_j increases linearly from beta_min / N to beta_max / N. The logarithm is expanded up to beta_j^6, and
    the sums of j^p are Faulhaber's polynomials in the number of terms. For DDPM's betas the error of T is
    below 1e-10.
    """
    bernoulli = (1.0, -0.5, 1 / 6, 0.0, -1 / 30, 0.0, 1 / 42)
    first, slope = beta_min / steps, (beta_max - beta_min) / steps / (steps - 1)
    coefficients = [0.0] * 7
    for k in range(1, 7):
        for p in range(k + 1):
            factor = math.comb(k, p) * first ** (k - p) * slope**p / k
            for r in range(p + 1):
                term = math.comb(p + 1, r) * bernoulli[r] / (p + 1)
                coefficients[p - r] += factor * term * float(steps) ** (p + 1 - r)
    return tuple(coefficients)


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The value at x of the polynomial with these coefficients, the constant first."""
    value = zeros_like(x)
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value
