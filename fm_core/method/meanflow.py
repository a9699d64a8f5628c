"""MeanFlow, by Jacobian-vector products, and SplitMeanFlow, without them.

Both are fixed points of exact identities of the average velocity u (flow_map.py). Differentiating
(s - t) u(t, s, x_t) along the trajectory with s fixed gives MeanFlow's identity,

    u(t, s, x) = v(t, x) + (s - t) (d/dt u + (du/dx) v(t, x)),

and the additivity of displacements that of SplitMeanFlow: for every m = t + split (s - t),

    u(t, s, x) = split u(t, m, x) + (1 - split) u(m, s, x + (m - t) u(t, m, x)).
"""

from typing import ClassVar

from torch import Tensor

from fm_core.errors import UserError
from fm_core.method.flow_map import FlowMap
from fm_core.method.forward_derivative import derivative_along
from fm_core.method.paths import Path, PathSample, expand_like
from fm_core.method.time_pairs import SecondTimes
from fm_core.method.types import Network

TANGENTS = ("network", "conditional")


class MeanFlow(FlowMap):
    """MeanFlow (Geng et al. 2025), with the improved form of the same authors as the default.

    The target is v_t + (s - t) times the derivative of u along the trajectory, with the conditional velocity
    v_t. The two forms differ in the direction dx of that derivative. "conditional", the original: v_t, whose
    noise the product with du/dx amplifies. "network", the improved form (arXiv 2512.02012): the network's own
    u(t, t, x), one more forward pass. The expectation of both targets is that of the marginal velocity,
    because they are linear in it; with the second, only the term v_t is noisy. Published with one evaluation
    on ImageNet 256 x 256: FID 3.43 with the first, 1.72 with the second and changes of the network.

    Args:
        path, equal_times, weight_power, guidance: as of `FlowMap`.
        tangent: "network" or "conditional".

    Raises:
        UserError: as `FlowMap`, or the tangent is unknown.
    """

    name: ClassVar[str] = "meanflow"
    forwards_apart: ClassVar[float] = 2.0

    def __init__(
        self,
        path: Path,
        equal_times: float = 0.75,
        weight_power: float = 1.0,
        guidance: float = 1.0,
        tangent: str = "network",
    ) -> None:
        super().__init__(path, equal_times, weight_power, guidance)
        if tangent not in TANGENTS:
            raise UserError(f"{self.name}: tangent must be {' or '.join(TANGENTS)}, not {tangent!r}")
        self.tangent = tangent
        if tangent == "network":
            self.extra_forwards += 1 - equal_times

    def target_apart(
        self, network: Network, sample: PathSample, second: SecondTimes, label: Tensor | None
    ) -> Tensor:
        """The conditional velocity plus (s - t) times the derivative of u along the trajectory."""
        t, s, x = sample.t, second.s, sample.x_t
        direction = sample.velocity
        if self.tangent == "network":
            direction = network(t, x, label, t).to(x.dtype)
        derivative = derivative_along(network, t, s, x, direction, label)
        return sample.velocity + expand_like(s - t, x) * derivative


class SplitMeanFlow(FlowMap):
    """SplitMeanFlow (Guo et al. 2025, arXiv 2507.16884): interval-splitting consistency, without JVPs.

    The target of u(t, s, x_t) is composed of two evaluations of the network, over the two parts of the
    interval. Why this objective: of those without JVPs it is the one whose exact optimum is the flow map for
    every split. Shortcut models (Frans et al. 2024) are its special case of halved intervals of dyadic
    length, and MeanFlow its limit for a short first part. Published: speech synthesis with one evaluation as
    good as with ten; shortcut models reach FID 10.6 with one evaluation and 7.8 with four on ImageNet 256.

    Args:
        path, equal_times, guidance: as of `FlowMap`. The split is uniform in [0, 1).
        weight_power: as of `FlowMap`, but 0 by default. The residuals of consistency become small, and those
            of flow matching do not: a positive power lets consistency outweigh the velocity, and the map
            degenerates to one that is consistent and wrong.
    """

    name: ClassVar[str] = "split-meanflow"
    forwards_apart: ClassVar[float] = 2.0

    def __init__(
        self, path: Path, equal_times: float = 0.75, weight_power: float = 0.0, guidance: float = 1.0
    ) -> None:
        super().__init__(path, equal_times, weight_power, guidance)

    def target_apart(
        self, network: Network, sample: PathSample, second: SecondTimes, label: Tensor | None
    ) -> Tensor:
        """The average of the network's u over the two parts of the interval, weighted by their lengths."""
        t, s, x = sample.t, second.s, sample.x_t
        middle = t + second.split.to(t.dtype) * (s - t)
        first = network(t, x, label, middle).to(x.dtype)
        at_middle = x + expand_like(middle - t, x) * first
        last = network(middle, at_middle, label, s).to(x.dtype)
        return first.lerp(last, 1 - expand_like(second.split.to(x.dtype), x))
