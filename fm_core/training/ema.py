"""Exponential moving averages (EMA) of the weights: constant decays and power-function profiles.

Each rank averages only its own partitions of the optimizer's float32 weights, which takes no communication
and 1/ranks of the memory for each average. The averages are updated only after applied steps, and are exact
under every ZeRO stage.

Power-function averages are those of EDM2, section 3: after n steps such an average weighs the weights of step
τ in proportion to τ^γ. Its relative width σ, the profile's standard deviation divided by its length, depends
only on γ: 0.05 covers about the last twentieth of training, 0.10 twice that. Training keeps about two widths.
Because profiles of several steps and widths span many others, any other width is approximated by the linear
combination of stored averages whose profile is nearest in the mean square.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fm_core.config import TrainSection
from fm_core.training.zero_state import Shards, float32_partitions

POWER = "ema-power-"
"""Prefix of the names of power-function averages, followed by the width."""
Decay = Callable[[int], float]
"""Decay of an update as a function of the number of steps applied before it."""
WIDEST = 0.28
"""Largest relative width; a profile that weighs all steps equally has 12^-1/2 = 0.289, the upper bound."""


class ModelEMA:
    """Several moving averages, by name, each partitioned like the optimizer's weights."""

    def __init__(self, engine: Any, decays: Mapping[str, Decay]) -> None:
        """Start from the current weights; `decays` gives the decay of each average by applied steps."""
        self.engine, self.decays = engine, decays
        self.shards: dict[str, Shards] = {
            name: [part.clone() for part in float32_partitions(engine)] for name in decays
        }

    @torch.no_grad()
    def update(self, applied_steps: int) -> None:
        """Add (1 - decay) (weights - average) to each, after a step that follows `applied_steps` others."""
        weights = float32_partitions(self.engine)
        for name, shards in self.shards.items():
            step = 1 - self.decays[name](applied_steps)
            for shard, weight in zip(shards, weights, strict=True):
                shard.lerp_(weight, step)


def ema_decay(decay: float, applied_steps: int, warmup: bool) -> float:
    """Decay after `applied_steps` optimizer steps; warm-up lets the average forget the initial weights."""
    return min(decay, (1 + applied_steps) / (10 + applied_steps)) if warmup else decay


def ema_decays(train: TrainSection) -> dict[str, Decay]:
    """Every average of a run: ema-<decay>, and ema-power-<width> for power-function averages."""
    decays: dict[str, Decay] = {
        f"ema-{decay:g}": partial(ema_decay, decay, warmup=train.ema_warmup) for decay in train.ema_decays
    }
    for width in train.ema_power_widths:
        decays[power_name(width)] = partial(power_decay, power_exponent(width))
    return decays


def power_name(width: float) -> str:
    """Name of a power-function average, and of its file."""
    return f"{POWER}{width:g}"


@dataclass(frozen=True)
class Profile:
    """Weights of past steps in an average: τ^γ for 0 < τ <= steps, with integral 1."""

    steps: float
    """Applied steps at the end of the profile."""
    exponent: float
    """The exponent γ."""


def power_exponent(width: float) -> float:
    """The exponent γ of a relative width σ, from σ² = (γ + 1) / ((γ + 2)² (γ + 3)).

    Raises ValueError outside 0 < σ <= 0.28.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"a relative width must be between 0 and {WIDEST}, not {width}")
    s = width**-2
    # σ² (γ + 2)² (γ + 3) = γ + 1, as a polynomial in γ; the largest root is the narrow profile.
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6 * max(1.0, abs(root))))


def power_decay(exponent: float, applied_steps: int) -> float:
    """Decay of a power-function average after `applied_steps` steps.

    It is 0 after no step, so that the initial weights do not enter the average.
    """
    return (applied_steps / (applied_steps + 1)) ** (exponent + 1)


def combination(stored: Sequence[Profile], target: Profile) -> NDArray[np.float64]:
    """Coefficients [n] of the combination of stored averages nearest to the target; they sum to 1.

    Raises ValueError if there are none.
    """
    if not stored:
        raise ValueError("there is no snapshot to combine")
    gram = np.array([[_overlap(a, b) for b in stored] for a in stored])
    right = np.array([_overlap(a, target) for a in stored])
    # The profiles are nearly linearly dependent: normalize them and solve for the smallest coefficients.
    scale = 1 / np.sqrt(np.diag(gram))
    solved, *_ = np.linalg.lstsq(gram * np.outer(scale, scale), right * scale, rcond=1e-12)
    coefficients = solved * scale
    return coefficients / coefficients.sum()


def mismatch(stored: Sequence[Profile], coefficients: NDArray[np.float64], target: Profile) -> float:
    """Relative root-mean-square distance of the combined profile from the target."""
    gram = np.array([[_overlap(a, b) for b in stored] for a in stored])
    right = np.array([_overlap(a, target) for a in stored])
    own = _overlap(target, target)
    square = coefficients @ gram @ coefficients - 2 * coefficients @ right + own
    return float(np.sqrt(max(0.0, square) / own))


def _overlap(a: Profile, b: Profile) -> float:
    """∫ p_a p_b, both (γ + 1) τ^γ / steps^(γ + 1) up to their steps; in logarithms to avoid overflow."""
    first, last = sorted((a, b), key=lambda profile: profile.steps)
    total = a.exponent + b.exponent + 1
    factor = (a.exponent + 1) * (b.exponent + 1) / total
    ratio = np.log(first.steps / last.steps) * last.exponent
    return float(factor * np.exp(ratio) / last.steps)
