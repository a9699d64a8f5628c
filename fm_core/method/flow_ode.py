"""Maximum-likelihood training of a continuous normalising flow (Chen et al. 2018, Grathwohl et al. 2019).

The network is the velocity, as in flow matching, but the loss is -log p(x1), found by solving the ODE from
data to noise (likelihood.py) and differentiated by the adjoint method: a second ODE in place of stored
activations.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from fm_core.errors import UserError
from fm_core.method.couplings import Coupling, Independent
from fm_core.method.divergence import Divergence, Exact, Hutchinson
from fm_core.method.likelihood import normal_log_density
from fm_core.method.objectives import Objective
from fm_core.method.ode import Solver, State, integrate
from fm_core.method.paths import Path, PathSample
from fm_core.method.types import Network


class MaximumLikelihood(Objective):
    """-log p(x1) / d, in nats a dimension.

    Of the path it takes the interval and the source only. The number of forwards depends on the data, so
    under data parallelism nothing collective may happen inside the network (ZeRO stage 3 would hang).

    Args:
        path: gives the interval and the source's standard deviation.
        method, rtol, atol, steps: the solver, forward and adjoint; as in `Solver`.
        divergence: "hutchinson", one Rademacher probe an example, or "exact" for a few dimensions.

    Raises:
        UserError: from `Solver`, or an unknown divergence.
    """

    name: ClassVar[str] = "maximum-likelihood"
    takes_gradients: ClassVar[bool] = True

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
        if self.solver.method == "scipy_solver":
            raise UserError("maximum-likelihood: scipy_solver cannot be differentiated")
        if divergence not in ("hutchinson", "exact"):
            raise UserError(f"maximum-likelihood: divergence is hutchinson or exact, not {divergence!r}")
        self.divergence = divergence

    def check_coupling(self, coupling: Coupling) -> None:
        """Take the independent coupling only.

        Raises:
            UserError: another one, under which the probe, which is the signs of x0, depends on x1.
        """
        if not isinstance(coupling, Independent):
            raise UserError(
                f"{self.name} cannot be used with the coupling {coupling.name}: the probe of its trace is "
                "the signs of x0, which would depend on x1; use independent"
            )

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """The prediction itself."""
        return prediction

    def loss(self, network: Network, sample: PathSample, label: Tensor | None = None) -> Tensor:
        """-log p(x1) / d of each example, [N]; uses x1, and the signs of x0 as the probe.

        Those signs are Rademacher, keyed by stream position like x0 itself, and independent of x1 under the
        independent coupling (`check_coupling`).

        Raises:
            TypeError: the network is not a torch module, so that its parameters are not known to the adjoint.
        """
        if not isinstance(network, nn.Module):
            raise TypeError("maximum-likelihood needs a torch.nn.Module: the adjoint wants its parameters")
        start, end = self.interval
        dimension = sample.x1[0].numel()
        velocity, divergence = self.velocity(network, label), self._divergence(sample)

        def field(t: Tensor, state: State) -> State:
            u, trace = divergence.with_velocity(velocity, t, state[0])
            return u, trace / dimension

        initial = (sample.x1, sample.x1.new_zeros(sample.x1.shape[0], 1))
        parameters = tuple(network.parameters())
        ode = partial(odeint_adjoint, adjoint_params=parameters, **self._adjoint_options(end))
        run = integrate(field, initial, (end, start), self.solver, gradients=True, ode=ode)
        x0, change = run.states[0][-1], run.states[1][-1, :, 0]
        return -(normal_log_density(x0, self.path.source_std).to(x0.dtype) / dimension + change)

    def _divergence(self, sample: PathSample) -> Divergence:
        if self.divergence == "exact":
            return Exact()
        return Hutchinson(torch.where(sample.x0 >= 0, 1.0, -1.0).to(sample.x0.dtype)[None])

    def _adjoint_options(self, end: float) -> dict[str, object]:
        """Options of the adjoint's own solve, from noise back to data."""
        if not self.solver.adaptive:
            return {}
        # torchdiffeq runs our backward solve in -t, so the adjoint must stop at -end. The parameters' part of
        # the adjoint is an integral that nothing depends on: leaving it out of the norm saves steps (Kidger
        # et al. 2021).
        return {"adjoint_options": {"step_t": torch.tensor([-end], dtype=torch.float64), "norm": "seminorm"}}
