"""Names, settings and number of evaluations of solvers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.time_grid import UNIFORM, TimeGrid

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "implicit_adams")
INACCURATE = ("explicit_adams",)
"""Methods of torchdiffeq 0.2.5 that silently return wrong results for some numbers of steps."""
MULTISTEP = ("ddim", "dpmpp_2m", "dpmpp_3m", "exp_ab3", "unipc", "ab2")
"""Methods with one evaluation per step, implemented in `multistep_solvers`."""
SAMPLERS = ("sde", "edm")
"""Methods that add noise in each step unless it is turned off, implemented in `stochastic_samplers`."""
FLOW_MAP = "flow_map"
"""One displacement of a network with two times per step, implemented in `step_loop`."""
METHODS = (*ADAPTIVE, *FIXED, *MULTISTEP, *SAMPLERS, FLOW_MAP)
ALIASES = {"heun": "heun2"}
EVALUATIONS_PER_STEP = {
    **{"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4},
    **dict.fromkeys(MULTISTEP, 1),
    **{"sde": 1, "edm": 2, FLOW_MAP: 1},
}
"""Evaluations of the vector field per step, for methods with a fixed number. The last step takes one
evaluation in edm, and in any method on a grid that ends with an Euler step."""
DIFFUSIONS = ("sbdm", "constant", "sigma", "linear", "decreasing", "increasing-decreasing")


@dataclass(frozen=True)
class Diffusion:
    """Diffusion coefficient D(t) of the reverse SDE, dx = (u + D s) dt + sqrt(2 D) dW, s = grad log p_t.

    The marginals equal those of the ODE for every D. Names and formulas of D are from SiT (Ma et al. 2024),
    with t = 0 as noise:

        sbdm        scale g_t^2 / 2: the SDE of the diffusion with these marginals, for scale 1
        constant    scale
        sigma       scale sigma_t
        linear      scale (1 - t)
        decreasing  (scale cos(pi t) + 1)^2 / 4
        increasing-decreasing   scale sin(pi t)^2

    Args:
        form: one of these names, or a nonnegative function of t, float64 [M] -> [M].
        scale: the factor; 0 gives the ODE, except for decreasing.

    Raises:
        UserError: the name is unknown, or the scale is negative.
    """

    form: str | Callable[[Tensor], Tensor] = "sbdm"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.form, str) and self.form not in DIFFUSIONS:
            raise UserError(f"unknown diffusion {self.form!r}; allowed: {', '.join(DIFFUSIONS)}")
        if not 0 <= self.scale < math.inf:
            raise UserError(f"the scale of a diffusion must be at least 0, not {self.scale}")

    @property
    def record(self) -> dict[str, Any]:
        """Name and scale, for a protocol."""
        form = self.form if isinstance(self.form, str) else getattr(self.form, "__qualname__", "a function")
        return {"diffusion": form, "scale": self.scale}


@dataclass(frozen=True)
class Churn:
    """Noise that EDM's sampler adds before each step (Karras et al. 2022, algorithm 2).

    Args:
        amount: S_churn; 0 adds none.
        low, high: S_tmin and S_tmax; noise is added where sigma_t / alpha_t is between them.
        noise: S_noise, the standard deviation of the added noise.

    Raises:
        UserError: a value is out of range.
    """

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.amount < math.inf and 0 <= self.low < self.high and 0 < self.noise < math.inf):
            raise UserError(
                f"churn must be at least 0, its noise positive, and its bounds increase, not {self}"
            )

    @property
    def record(self) -> dict[str, Any]:
        """The settings that differ from those of EDM's deterministic sampler, for a protocol."""
        bounds = {
            "churn_min": (self.low, 0.0),
            "churn_max": (self.high, math.inf),
            "churn_noise": (self.noise, 1.0),
        }
        return {"churn": self.amount} | {
            name: value for name, (value, none) in bounds.items() if value != none
        }


@dataclass(frozen=True)
class Solver:
    """A solver with every setting that affects its result; settings that it ignores are refused.

    Args:
        method: an adaptive method of torchdiffeq (ADAPTIVE), a fixed-step method of torchdiffeq (FIXED, or
            heun), a multistep method (MULTISTEP), a sampler that adds noise (SAMPLERS), or FLOW_MAP.
        rtol: relative tolerance, for adaptive methods and implicit_adams only; default 1e-5, as in the paper.
        atol: absolute tolerance, likewise.
        steps: number of steps; required by all but adaptive methods, which refuse it. A list of times
            determines it.
        error_norm: the norm of the error that adaptive methods keep below 1. "batch": the RMS over the batch.
            "worst": the largest RMS of an example. With either, the steps depend on the batch.
        grid: the times of the steps.
        diffusion: the diffusion coefficient; for sde only.
        churn: the noise added before each step; for edm only.

    Raises:
        UserError: the method is unknown or inaccurate in torchdiffeq, a setting is missing, or the method
            would ignore one.
    """

    method: str = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    error_norm: Literal["batch", "worst"] = "batch"
    grid: TimeGrid = UNIFORM
    diffusion: Diffusion | None = None
    churn: Churn | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", ALIASES.get(self.method, self.method))
        if self.method in INACCURATE:
            # For dx/dt = -x from 1 it returns 0.4170 after 40 steps; the exact value is exp(-1) = 0.3679.
            raise UserError(f"solver {self.method} of torchdiffeq is inaccurate; use implicit_adams")
        if self.method not in METHODS:
            raise UserError(f"unknown solver {self.method!r}; allowed: {', '.join(METHODS)}, heun")
        if self.error_norm not in ("batch", "worst"):
            raise UserError(
                f"solver {self.method}: error_norm must be batch or worst, not {self.error_norm!r}"
            )
        self._set_tolerances()
        self._set_steps()
        self._set_noise()

    @property
    def adaptive(self) -> bool:
        """Whether the method has an adaptive step size."""
        return self.method in ADAPTIVE

    @property
    def record(self) -> dict[str, Any]:
        """Method and settings, for a protocol; settings of later versions only where they have an effect."""
        accuracy = {"rtol": self.rtol, "atol": self.atol, "steps": self.steps}
        noise = self.diffusion or self.churn
        return {
            "solver": self.method,
            **{name: value for name, value in accuracy.items() if value is not None},
            **({"error_norm": self.error_norm} if self.error_norm != "batch" else {}),
            **({"grid": self.grid.record} if self.grid != UNIFORM else {}),
            **({"stochastic": noise.record} if noise is not None and self.stochastic else {}),
        }

    @property
    def plain(self) -> bool:
        """Whether torchdiffeq integrates with adaptive or equal steps."""
        return self.method in (*ADAPTIVE, *FIXED) and self.grid == UNIFORM

    def require_plain(self, what: str) -> None:
        """Raise UserError unless the solver is `plain`; `what` names the feature that needs this."""
        if not self.plain:
            grid = "" if self.grid == UNIFORM else f" on the time grid {self.grid.name}"
            raise UserError(
                f"solver {self.method}{grid} is for sampling; {what} needs a method of torchdiffeq with "
                "adaptive or equal steps, such as dopri5 or midpoint"
            )

    @property
    def needs_path(self) -> bool:
        """Whether the method or its grid depends on alpha_t and sigma_t."""
        return self.method in (*MULTISTEP, *SAMPLERS) or self.grid.needs_path

    @property
    def stochastic(self) -> bool:
        """Whether the result depends on noise in addition to the initial state."""
        if self.churn is not None:
            return self.churn.amount > 0
        return self.diffusion is not None and (
            self.diffusion.scale > 0 or self.diffusion.form == "decreasing"
        )

    def _set_tolerances(self) -> None:
        if self.adaptive or self.method == "implicit_adams":
            for name in ("rtol", "atol"):
                value = getattr(self, name)
                object.__setattr__(self, name, 1e-5 if value is None else value)
                if not getattr(self, name) > 0:
                    raise UserError(f"solver {self.method}: {name} must be positive, not {value}")
        elif self.rtol is not None or self.atol is not None:
            raise UserError(f"solver {self.method} has a fixed step size and would ignore rtol and atol")
        if self.error_norm != "batch" and (not self.adaptive or self.method == "scipy_solver"):
            raise UserError(f"solver {self.method} would ignore error_norm")

    def _set_steps(self) -> None:
        if self.adaptive and self.steps is not None:
            raise UserError(f"solver {self.method} chooses its own steps and would ignore steps={self.steps}")
        if self.grid != UNIFORM and (self.adaptive or self.method == "implicit_adams"):
            reason = "chooses its own steps" if self.adaptive else "takes equal steps"
            raise UserError(f"solver {self.method} {reason} and would ignore the time grid {self.grid.name}")
        if self.grid.times:
            steps = len(self.grid.times) - 1
            if self.steps not in (None, steps):
                raise UserError(
                    f"steps is {self.steps}, but the time grid has {steps} steps; give one of the two"
                )
            object.__setattr__(self, "steps", steps)
        if not self.adaptive and (self.steps is None or self.steps < 1):
            raise UserError(f"solver {self.method} needs steps, at least 1, not {self.steps}")

    def _set_noise(self) -> None:
        for name, method, default in (("diffusion", "sde", Diffusion()), ("churn", "edm", Churn())):
            if self.method == method:
                object.__setattr__(self, name, getattr(self, name) or default)
            elif getattr(self, name) is not None:
                raise UserError(f"solver {self.method} would ignore {name}, which is of {method}")
