"""Power-function averages of the weights, and any width of them after training (EDM2, section 3).

After n steps such an average weighs the weights of step τ in proportion to τ^γ. Its relative width σ, the
profile's standard deviation over its length, is a constant of γ: 0.05 looks back on the last twentieth or so,
0.10 on twice that. Training keeps two or so; as profiles of several moments and widths span many others, a
third width is a linear combination of stored ones whose profile is nearest in the mean square.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDEST = 0.28
"""A profile that weighs all steps alike has 12^-1/2 = 0.289; beyond it there is none."""


@dataclass(frozen=True)
class Profile:
    """How an average weighs the past: τ^γ for 0 < τ <= steps, with integral 1."""

    steps: float
    """Applied steps at its end."""
    exponent: float
    """γ."""


def power_exponent(width: float) -> float:
    """γ of a relative width σ: σ² = (γ + 1) / ((γ + 2)² (γ + 3)). ValueError outside 0 < σ <= 0.28."""
    if not 0 < width <= WIDEST:
        raise ValueError(f"a relative width lies between 0 and {WIDEST}, not at {width}")
    s = width**-2
    # σ² (γ + 2)² (γ + 3) = γ + 1, as a polynomial in γ; the largest root is the narrow profile.
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6 * max(1.0, abs(root))))


def power_decay(exponent: float, applied_steps: int) -> float:
    """Decay of the update after `applied_steps` steps; 0 after none, so that the initial weights leave."""
    return (applied_steps / (applied_steps + 1)) ** (exponent + 1)


def combination(kept: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """Coefficients [n] of the kept averages whose sum is nearest to the wanted one, and sums to 1.

    Raises ValueError if nothing is kept.
    """
    if not kept:
        raise ValueError("there is no snapshot to combine")
    gram = np.array([[_overlap(a, b) for b in kept] for a in kept])
    right = np.array([_overlap(a, wanted) for a in kept])
    # The profiles are nearly dependent: scaled to norm one, and solved for the least coefficients.
    scale = 1 / np.sqrt(np.diag(gram))
    solved, *_ = np.linalg.lstsq(gram * np.outer(scale, scale), right * scale, rcond=1e-12)
    coefficients = solved * scale
    return coefficients / coefficients.sum()


def mismatch(kept: Sequence[Profile], coefficients: NDArray[np.float64], wanted: Profile) -> float:
    """Relative root-mean-square distance of a combined profile from the wanted one."""
    gram = np.array([[_overlap(a, b) for b in kept] for a in kept])
    right = np.array([_overlap(a, wanted) for a in kept])
    own = _overlap(wanted, wanted)
    square = coefficients @ gram @ coefficients - 2 * coefficients @ right + own
    return float(np.sqrt(max(0.0, square) / own))


def _overlap(a: Profile, b: Profile) -> float:
    """∫ p_a p_b, both (γ + 1) τ^γ / steps^(γ + 1) up to their steps; by logarithms, as steps^γ overflows."""
    first, last = sorted((a, b), key=lambda profile: profile.steps)
    total = a.exponent + b.exponent + 1
    factor = (a.exponent + 1) * (b.exponent + 1) / total
    ratio = np.log(first.steps / last.steps) * last.exponent
    return float(factor * np.exp(ratio) / last.steps)
