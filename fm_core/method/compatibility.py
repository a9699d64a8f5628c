"""Compatibility of objectives and paths: the interval of t on which each pair is defined.

    objective            optimal-transport  variance-preserving  variance-exploding  cosine
    flow-matching        [0, 1]             [0, 1 - 1e-5]        [0, 1]              [0, 1]
    score-matching       refused            [0, 1 - 1e-5]        [0, 1]              refused
    scoreflow            refused            [0, 1 - 1e-5]        [0, 1]              refused
    noise-prediction     refused            [0, 1 - 1e-5]        [0, 1]              refused
    data-prediction      [0, 1 - 1e-3]      [0, 1 - 1e-5]        [0, 1]              [0, 1 - 6.4e-4]
    maximum-likelihood   [0, 1]             [0, 1 - 1e-5]        [0, 1]              [0, 1]
    meanflow             [0, 1]             [0, 1 - 1e-5]        refused             [0, 1]
    split-meanflow       [0, 1]             [0, 1 - 1e-5]        refused             [0, 1]

The table follows from these rules, which also apply to user-defined paths and objectives (`supported_pairs`
in registry.py computes the table, and a test compares it with the text above):

* A score or noise prediction is converted to a velocity by division by alpha_t. Where alpha_t = 0 the ODE
  cannot start at noise, and starting slightly later would draw from the wrong distribution, with the
  network's error amplified by 1 / alpha_t, so such a path is refused. ScoreFlow's weight g_t^2 is infinite
  there too, and it must not be negative: noise may only increase towards t = 0, as in a diffusion.
* A data prediction is converted to a velocity by division by sigma_t. Stopping early only leaves noise of
  standard deviation sigma_t on the sample, so the interval ends where sigma_t falls below 1e-3. This is an
  eighth of an intensity level, and the value at which the paper's epsilon ends the VP path.
* Maximum likelihood ignores alpha_t and sigma_t; it uses only the path's interval and source.
* A flow map is regressed over pairs of times with one weight, in the units of x_t. Where alpha_t or sigma_t
  exceeds 2, displacements of different scales would have no common weight, so such a path is refused.
"""

import torch

from fm_core.errors import UserError
from fm_core.method.paths import Path
from fm_core.method.types import Interval

ALPHA_FLOOR = 1e-3
SIGMA_FLOOR = 1e-3
SCALE_LIMIT = 2.0


def require_positive_alpha(objective: str, path: Path) -> Interval:
    """Return the path's interval; refuse a path whose alpha_t falls below ALPHA_FLOOR on it.

    Raises:
        UserError: alpha_t falls below ALPHA_FLOOR.
    """
    start, end = path.interval
    pair = f"{objective} cannot be used on the path {path.name or type(path).__name__}"
    t = torch.linspace(start, end, 1001, dtype=torch.float64)
    alpha = path.alpha(t)
    smallest = int(alpha.argmin())
    if alpha[smallest] < ALPHA_FLOOR:
        raise UserError(
            f"{pair}: its velocity divides by alpha_t, which is {float(alpha[smallest]):.2g} at "
            f"t = {float(t[smallest]):.3g}; use flow-matching or data-prediction, or a diffusion path "
            "(variance-preserving, variance-exploding)"
        )
    return path.interval


def require_diffusion_path(objective: str, path: Path) -> Interval:
    """Return the path's interval; refuse a path that is not a diffusion: alpha_t > 0 and g_t^2 >= 0.

    Raises:
        UserError: alpha_t falls below ALPHA_FLOOR, or g_t^2 is negative.
    """
    interval = require_positive_alpha(objective, path)
    t = torch.linspace(*interval, 1001, dtype=torch.float64)
    if (path.diffusion(t) < 0).any():
        raise UserError(
            f"{objective} cannot be used on the path {path.name or type(path).__name__}: its weight g_t^2 is "
            "negative where sigma_t / alpha_t grows; use score-matching, or a diffusion path"
        )
    return interval


def require_unit_scale(objective: str, path: Path) -> Interval:
    """Return the path's interval; refuse a path whose alpha_t or sigma_t exceeds SCALE_LIMIT on it.

    Raises:
        UserError: alpha_t or sigma_t exceeds SCALE_LIMIT.
    """
    t = torch.linspace(*path.interval, 1001, dtype=torch.float64)
    largest = float(torch.maximum(path.alpha(t), path.sigma(t)).max())
    if largest > SCALE_LIMIT:
        raise UserError(
            f"{objective} cannot be used on the path {path.name or type(path).__name__}: alpha_t or sigma_t "
            f"reaches {largest:.3g}, and displacements over different intervals have no common scale; use "
            "optimal-transport, cosine or variance-preserving"
        )
    return path.interval


def truncate_at_sigma_floor(objective: str, path: Path) -> Interval:
    """Return the path's interval, truncated where sigma_t falls below SIGMA_FLOOR.

    Raises:
        UserError: sigma_t is already below SIGMA_FLOOR at the start.
    """
    start, end = path.interval

    def above_floor(t: float) -> bool:
        return float(path.sigma(torch.tensor(t, dtype=torch.float64))) >= SIGMA_FLOOR

    if not above_floor(start):
        raise UserError(
            f"{objective} cannot be used on the path {path.name or type(path).__name__}: its velocity "
            f"divides by sigma_t, which is below {SIGMA_FLOOR} from t = {start} on; use flow-matching"
        )
    if above_floor(end):
        return path.interval
    low, high = start, end
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if above_floor(middle) else (low, middle)
    return (start, low)
