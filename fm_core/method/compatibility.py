"""Which objective goes with which path, and over which interval of t.

    objective            optimal-transport  variance-preserving  variance-exploding  cosine
    flow-matching        [0, 1]             [0, 1 - 1e-5]        [0, 1]              [0, 1]
    score-matching       refused            [0, 1 - 1e-5]        [0, 1]              refused
    scoreflow            refused            [0, 1 - 1e-5]        [0, 1]              refused
    noise-prediction     refused            [0, 1 - 1e-5]        [0, 1]              refused
    data-prediction      [0, 1 - 1e-3]      [0, 1 - 1e-5]        [0, 1]              [0, 1 - 6.4e-4]
    maximum-likelihood   [0, 1]             [0, 1 - 1e-5]        [0, 1]              [0, 1]

The rules behind the table, which also judge paths and objectives from outside (`supported_pairs` in named.py
computes it, and a test holds it to the text above):

* The score and the noise give a velocity by division by alpha_t. Where alpha_t = 0 the ODE's noise end is
  lost; a start a little later would be from the wrong law, with the network's error blown up by 1 / alpha_t:
  refused. ScoreFlow's weight, g_t^2, is infinite there too, and it must not be negative: noise must only grow
  towards t = 0, as in a diffusion.
* The data give a velocity by division by sigma_t. Stopping early only leaves noise of standard deviation
  sigma_t on the sample, so the interval is cut where sigma_t falls below 1e-3: an eighth of a grey level, and
  where the paper's epsilon cuts the VP path.
* Maximum likelihood ignores alpha_t and sigma_t and takes the path's interval and source only.
"""

import torch

from fm_core.errors import UserError
from fm_core.method.paths import Path
from fm_core.method.types import Interval

ALPHA_FLOOR = 1e-3
SIGMA_FLOOR = 1e-3


def require_positive_alpha(objective: str, path: Path) -> Interval:
    """The path's interval, if alpha_t stays above ALPHA_FLOOR on it.

    Raises:
        UserError: it does not.
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


def require_diffusion(objective: str, path: Path) -> Interval:
    """The path's interval, if alpha_t is positive and g_t^2 not negative on it.

    Raises:
        UserError: it is not.
    """
    interval = require_positive_alpha(objective, path)
    t = torch.linspace(*interval, 1001, dtype=torch.float64)
    if (path.diffusion(t) < 0).any():
        raise UserError(
            f"{objective} cannot be used on the path {path.name or type(path).__name__}: its weight g_t^2 is "
            "negative where sigma_t / alpha_t grows; use score-matching, or a diffusion path"
        )
    return interval


def cut_where_sigma_vanishes(objective: str, path: Path) -> Interval:
    """The path's interval up to the first t where sigma_t falls below SIGMA_FLOOR.

    Raises:
        UserError: it is below from the start.
    """
    start, end = path.interval

    def noisy(t: float) -> bool:
        return float(path.sigma(torch.tensor(t, dtype=torch.float64))) >= SIGMA_FLOOR

    if not noisy(start):
        raise UserError(
            f"{objective} cannot be used on the path {path.name or type(path).__name__}: its velocity "
            f"divides by sigma_t, which is below {SIGMA_FLOOR} from t = {start} on; use flow-matching"
        )
    if noisy(end):
        return path.interval
    low, high = start, end
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if noisy(middle) else (low, middle)
    return (start, low)
