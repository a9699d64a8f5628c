"""Time grids of fixed-step solvers: the N + 1 times at which N steps begin and end.

With nu = sigma_t / alpha_t, the noise-to-signal ratio, which decreases with t, and log-SNR = -2 log nu:

    uniform   equal steps in t
    log-snr   equal steps in log-SNR
    edm       equal steps in nu^(1/rho) (Karras et al. 2022, eq. 5)
    cosine    equal steps in the angle arctan(alpha_t / sigma_t): t itself on the cosine path, and the CosMap
              of Esser et al. 2024 on the OT path
    shift     with s the remaining fraction of the interval, s' = shift s / (1 + (shift - 1) s) for uniform s
              (Esser et al. 2024, eq. 23); a shift above 1 puts more steps near the noise
    list      explicit times

Every grid begins at the start of the interval and ends at its end. log-snr and edm place their times between
two bounds of nu, because nu is infinite at the start of some paths (OT: alpha_0 = 0), and zero or nearly zero
at the end. If nu exceeds the upper bound at the start of the interval, the first time, at which nu would
equal the bound, is replaced by this start. If nu is below the lower bound at the end of the interval, nu
equals the bound at the second-to-last time, and every solver takes the last step as one Euler step in the x1
form, alpha_t E[x1] + sigma_t E[x0].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.paths import Path
from fm_core.method.types import Interval

GRIDS = ("uniform", "log-snr", "edm", "cosine", "shift", "list")
BOUNDS = {"log-snr": (1e-3, 1e3), "edm": (0.002, 80.0)}
"""Default bounds of nu. log-snr: one of alpha_t and sigma_t is 1e-3 of the other, as at the floors of
`compatibility`; the VP path lies within these bounds. edm: EDM's sigma_min and sigma_max."""
RHO = 7.0
"""Default rho of the edm grid, as in EDM."""
ENDS_AGREE = 1e-6
"""Largest distance between the ends of a list and the ends of the interval."""


@dataclass(frozen=True)
class GridTimes:
    """The times of a grid on an interval."""

    times: tuple[float, ...]  # N + 1 times, from the start of the interval to its end
    euler_last: bool  # whether the last interval must be one Euler step in the x1 form


@dataclass(frozen=True)
class TimeGrid:
    """A time grid with its settings; settings that it would ignore are refused.

    Args:
        name: one of GRIDS.
        rho: for edm only; 7 by default.
        shift: for shift only, which requires it; 1 is uniform.
        bounds: for log-snr and edm only: smallest and largest nu = sigma_t / alpha_t.
        times: for list only: at least two times, increasing.

    Raises:
        UserError: the name is unknown, or a setting is missing, ignored or out of range.
    """

    name: str = "uniform"
    rho: float | None = None
    shift: float | None = None
    bounds: tuple[float, float] | None = None
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in GRIDS:
            raise UserError(
                f"unknown time grid {self.name!r}; allowed: {', '.join(GRIDS[:-1])}, or a list of times"
            )
        owners = {"rho": ("edm",), "shift": ("shift",), "bounds": ("log-snr", "edm"), "times": ("list",)}
        for setting, grids in owners.items():
            if getattr(self, setting) not in (None, ()) and self.name not in grids:
                raise UserError(
                    f"time grid {self.name} would ignore {setting}, which is of {' and '.join(grids)}"
                )
        if self.name == "edm":
            object.__setattr__(self, "rho", RHO if self.rho is None else self.rho)
        if self.name in BOUNDS:
            object.__setattr__(
                self, "bounds", BOUNDS[self.name] if self.bounds is None else tuple(self.bounds)
            )
        self._check_values()

    def _check_values(self) -> None:
        if self.rho is not None and not 0 < self.rho < math.inf:
            raise UserError(f"time grid edm: rho must be positive, not {self.rho}")
        if self.name == "shift" and not (self.shift and 0 < self.shift < math.inf):
            raise UserError(f"time grid shift needs a positive shift, e.g. 3, not {self.shift}")
        if self.bounds is not None and not 0 < self.bounds[0] < self.bounds[1] < math.inf:
            raise UserError(f"time grid {self.name}: bounds must be positive and increase, not {self.bounds}")
        if self.name == "list" and (len(self.times) < 2 or any(b <= a for a, b in pairwise(self.times))):
            raise UserError(f"a time grid needs at least two times that increase, not {list(self.times)}")

    @property
    def needs_path(self) -> bool:
        """Whether the times depend on alpha_t and sigma_t."""
        return self.name in ("log-snr", "edm", "cosine")

    @property
    def record(self) -> dict[str, Any]:
        """Settings that determine the times on a given path and interval, for a protocol."""
        settings = {"rho": self.rho, "shift": self.shift, "bounds": self.bounds, "times": self.times}
        chosen = {name: value for name, value in settings.items() if value not in (None, ())}
        return {"name": self.name} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()
        }

    def on(self, interval: Interval, steps: int, path: Path | None = None) -> GridTimes:
        """The times of `steps` steps from interval[0] to interval[1], increasing.

        Raises:
            UserError: the list does not start and end where the interval does, log-SNR does not increase on
                the path, or the times are not distinct.
            ValueError: the grid needs the path, and none was passed.
        """
        start, end = interval
        if self.name == "list":
            return GridTimes((start, *self._inner_times(interval), end), euler_last=False)
        if self.needs_path:
            if path is None:
                raise ValueError(f"time grid {self.name} needs the path")
            return _by_log_snr(self, interval, steps, path)
        shift = self.shift or 1.0
        left = [1 - i / steps for i in range(1, steps)]
        shares = [1 - shift * s / (1 + (shift - 1) * s) for s in left]
        return _distinct(self.name, (start, *(start + (end - start) * share for share in shares), end))

    def _inner_times(self, interval: Interval) -> Sequence[float]:
        ends = (self.times[0], self.times[-1])
        if max(abs(a - b) for a, b in zip(ends, interval, strict=True)) > ENDS_AGREE:
            raise UserError(
                f"the time grid runs from {ends[0]:g} to {ends[1]!r}, and the interval of this objective and "
                f"path from {interval[0]:g} to {interval[1]!r}; begin and end the list there"
            )
        return self.times[1:-1]


UNIFORM = TimeGrid()


def grid_of(
    grid: str | Sequence[float],
    rho: float | None = None,
    shift: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> TimeGrid:
    """Build a grid from its name or a list of times, and settings; raises UserError like `TimeGrid`."""
    if isinstance(grid, str):
        return TimeGrid(grid, rho, shift, bounds)
    return TimeGrid("list", rho, shift, bounds, tuple(grid))


def half_log_snr(path: Path, t: Tensor) -> Tensor:
    """Half of the log-SNR, lambda = log(alpha_t / sigma_t), float64; infinite where one of the two is 0."""
    t = t.double()
    return torch.log(path.alpha(t)) - torch.log(path.sigma(t))


def _by_log_snr(grid: TimeGrid, interval: Interval, steps: int, path: Path) -> GridTimes:
    ends = half_log_snr(path, torch.tensor(interval, dtype=torch.float64))
    high, low = torch.exp(-ends).tolist()
    lower, upper = grid.bounds or (low, high)
    high, cut = min(high, upper), low < lower
    low = max(low, lower)
    if not high > low:
        raise UserError(
            f"time grid {grid.name}: no time of this path has sigma_t / alpha_t between the bounds {lower:g} "
            f"and {upper:g}"
        )
    # With a cut, the last step is the Euler step, so one step fewer divides the range between the bounds.
    count = steps - cut
    shares = [i / count for i in range(1, steps)] if count else []
    middle = times_at(path, interval, [_half_log_snr_at(grid, high, low, share) for share in shares])
    return _distinct(grid.name, (interval[0], *middle, interval[1]), bool(cut))


def _half_log_snr_at(grid: TimeGrid, high: float, low: float, share: float) -> float:
    """The value of lambda at a fraction `share` of the grid between nu = high and nu = low."""
    if grid.name == "edm":
        power = 1 / (grid.rho or RHO)
        return -math.log((high**power + share * (low**power - high**power)) ** (1 / power))
    if grid.name == "cosine":
        first, last = math.atan2(1, high), math.atan2(1, low)
        return math.log(math.tan(first + share * (last - first)))
    return -(math.log(high) + share * (math.log(low) - math.log(high)))


def times_at(path: Path, interval: Interval, targets: Sequence[float]) -> list[float]:
    """The times at which lambda has these values, by bisection."""
    target = torch.tensor(targets, dtype=torch.float64)
    low, high = torch.full_like(target, interval[0]), torch.full_like(target, interval[1])
    for _ in range(100):
        middle = (low + high) / 2
        below = half_log_snr(path, middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).tolist()


def _distinct(name: str, times: tuple[float, ...], euler_last: bool = False) -> GridTimes:
    if any(b <= a for a, b in pairwise(times)):
        raise UserError(
            f"time grid {name}: {len(times) - 1} steps have no distinct times on this path; take fewer, or "
            "another grid (log-snr, edm and cosine need a path whose log-SNR increases)"
        )
    return GridTimes(times, euler_last)
