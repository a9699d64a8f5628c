"""CNF objective: maximum-likelihood training of a continuous normalizing flow (neural ODE, FFJORD).

Chen et al. 2018, Grathwohl et al. 2019. The network predicts the velocity, as in flow matching, but the loss
is -log p(x1), computed by solving the ODE from data to noise (likelihood.py) and differentiated by the
adjoint method, which solves a second ODE instead of storing activations.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fm_core.errors import UserError
from fm_core.method.couplings import Coupling, Independent
from fm_core.method.divergence import Divergence, Exact, Hutchinson
from fm_core.method.likelihood import normal_log_density
from fm_core.method.objectives import Objective
from fm_core.method.ode import Solver, State, integrate
from fm_core.method.paths import Path, PathSample
from fm_core.method.types import Network


class MaximumLikelihood(Objective):
    """Maximum-likelihood objective of a CNF: -log p(x1) / d, in nats per dimension.

    It uses only the interval and the source of the path. The number of forward passes depends on the data, so
    under data parallelism the network must not contain collective operations (ZeRO stage 3 would hang).

    Args:
        path: provides the interval and the source's standard deviation.
        method, rtol, atol, steps: settings of the solver for the forward and the adjoint ODE, as in `Solver`.
        divergence: "hutchinson" (one Rademacher probe per example) or "exact" (for a few dimensions only).

    Raises:
        UserError: `Solver` refuses the settings, or the divergence is unknown.
    """

    name: ClassVar[str] = "maximum-likelihood"
    takes_gradients: ClassVar[bool] = True
    follows_path: ClassVar[bool] = False
    predicts_velocity: ClassVar[bool] = True

    def __init__(
        self,
        path: Path,
        method: str = "dopri5",
        rtol: float | None = None,
        atol: float | None = None,
        steps: int | None = None,
        divergence: str = "hutchinson",
    ) -> None:
        super().__init__(path)
        self.solver = Solver(method, rtol, atol, steps)
        self.solver.require_plain("maximum-likelihood")
        if self.solver.method == "scipy_solver":
            raise UserError("maximum-likelihood: scipy_solver cannot be differentiated")
        if divergence not in ("hutchinson", "exact"):
            raise UserError(f"maximum-likelihood: divergence must be hutchinson or exact, not {divergence!r}")
        self.divergence = divergence

    def check_coupling(self, coupling: Coupling) -> None:
        """Accept the independent coupling only.

        Raises:
            UserError: the coupling is any other; the probe, which is the signs of x0, would depend on x1.
        """
        if not isinstance(coupling, Independent):
            raise UserError(
                f"{self.name} cannot be used with the coupling {coupling.name}: the probe of its trace is "
                "the signs of x0, which would depend on x1; use independent"
            )

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Return the prediction, which is the velocity."""
        return prediction

    def loss(self, network: Network, sample: PathSample, label: Tensor | None = None) -> Tensor:
        """Loss -log p(x1) / d of each example, [N], computed from x1 with the signs of x0 as the probe.

        The signs are Rademacher variables, keyed by stream position like x0 itself, and independent of x1
        under the independent coupling (`check_coupling`).

        Raises:
            TypeError: the network is not a torch module; the adjoint method needs its parameters.
        """
        # Not above, because it imports scipy, which the other objectives do not need.
        from torchdiffeq import odeint_adjoint

        if not isinstance(network, nn.Module):
            raise TypeError(
                "maximum-likelihood needs a torch.nn.Module: the adjoint method needs its parameters"
            )
        start, end = self.interval
        dimension = sample.x1[0].numel()
        velocity, divergence = self.velocity(network, label), self._divergence(sample)

        def field(t: Tensor, state: State) -> State:
            u, trace = divergence.with_velocity(velocity, t, state[0])
            return u, trace / dimension

        initial = (sample.x1, sample.x1.new_zeros(sample.x1.shape[0], 1))
        parameters = tuple(network.parameters())
        ode = partial(odeint_adjoint, adjoint_params=parameters, **self._adjoint_options(end))
        result = integrate(field, initial, (end, start), self.solver, gradients=True, ode=ode)
        x0, change = result.states[0][-1], result.states[1][-1, :, 0]
        return -(normal_log_density(x0, self.path.source_std).to(x0.dtype) / dimension + change)

    def _divergence(self, sample: PathSample) -> Divergence:
        if self.divergence == "exact":
            return Exact()
        return Hutchinson(torch.where(sample.x0 >= 0, 1.0, -1.0).to(sample.x0.dtype)[None])

    def _adjoint_options(self, end: float) -> dict[str, object]:
        """Options of the adjoint ODE, which is solved from noise back to data."""
        if not self.solver.adaptive:
            return {}
        # torchdiffeq solves from end to start in the variable -t, so the adjoint must stop at -end. The part
        # of the adjoint state for the parameters is an integral that the other parts do not depend on:
        # leaving it out of the error norm saves steps (Kidger et al. 2021).
        return {"adjoint_options": {"step_t": torch.tensor([-end], dtype=torch.float64), "norm": "seminorm"}}
