"""Flow maps: networks with two times, which move a point along the ODE's trajectory in one evaluation.

The network predicts the average velocity over the interval from t to s >= t,

    u(t, s, x_t) = 1 / (s - t) * integral from t to s of v(r, x_r) dr,   u(t, t, x) = v(t, x),

where v is the velocity of the ODE and x_r its trajectory. The flow map is x_s = x_t + displacement(t, s, x_t)
with the displacement (s - t) u(t, s, x_t). Boffi et al. (2024), "Flow map matching"; Geng et al. (2025),
"Mean Flows for One-step Generative Modeling" (arXiv 2505.13447), whose t = 1 is noise and whose r is our s.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from fm_core.errors import UserError
from fm_core.method.compatibility import require_unit_scale
from fm_core.method.objectives import Objective
from fm_core.method.paths import Path, PathSample, expand_like
from fm_core.method.time_pairs import SecondTimes
from fm_core.method.types import Interval, Network, Velocity

WEIGHT_FLOOR = 1e-3
"""The constant c of the adaptive weight, for a squared residual that is averaged over dimensions."""

# displacement(t, s, x) with t and s scalar or [N], x [N, ...] -> x_s - x_t, [N, ...], in the dtype of x
Displacement = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FlowMapVelocity:
    """The velocity u(t, t, x) of a network with two times, and its displacement.

    Args:
        network: network(t, x, label, s).
        label: int64 [N] or None.
    """

    network: Network
    label: Tensor | None = None

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity [N, ...] at t, scalar or [N], and x [N, ...], in the dtype of x."""
        return self._average(t, t, x)

    def displacement(self, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
        """x_s - x_t for x = x_t [N, ...] and times t and s, each scalar or [N]; one network evaluation."""
        length = (s.to(x.dtype) - t.to(x.dtype)).expand(x.shape[0])
        return expand_like(length, x) * self._average(t, s, x)

    def _average(self, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
        t, s = (time.to(x.dtype).expand(x.shape[0]) for time in (t, s))
        return self.network(t, x, self.label, s).to(x.dtype)


class FlowMap(Objective):
    """Base class of objectives of flow maps: regression of u(t, s, x_t) on a target without gradients.

    A subclass defines the target of the examples with s > t. For those with s = t it is the conditional
    velocity, as in flow matching, so u(t, t, x) becomes the velocity v(t, x).

    With a guidance scale w other than 1, the velocity whose flow map is learned is that of classifier-free
    guidance, w v(t, x, label) + (1 - w) v(t, x, no label): the second term is the network's own prediction,
    without label. Its optimum is the guided velocity, and the model is sampled without guidance.

    Args:
        path: an affine path on which alpha_t and sigma_t stay below 2.
        equal_times: fraction of the examples with s = t.
        weight_power: p of the adaptive weight 1 / (r + 0.001)^p, where r is the squared residual of an
            example; it multiplies the gradient, and the reported loss is r. 0 turns it off; then the optimum
            is the exact flow map. A positive power weights examples with large noise less.
        guidance: the guidance scale w that is learned; 1 is none.

    Raises:
        UserError: the path is refused, or an option is out of range.
    """

    predicts_velocity: ClassVar[bool] = True
    forwards_apart: ClassVar[float] = 0.0
    """Forward passes without gradients for each example with s > t."""

    def __init__(
        self, path: Path, equal_times: float = 0.75, weight_power: float = 1.0, guidance: float = 1.0
    ) -> None:
        super().__init__(path)
        if not 0 <= equal_times <= 1:
            raise UserError(f"{self.name}: equal_times must lie in [0, 1], not {equal_times}")
        if not 0 <= weight_power <= 2:
            raise UserError(f"{self.name}: weight_power must lie in [0, 2], not {weight_power}")
        if not guidance > 0:
            raise UserError(f"{self.name}: guidance must be positive (1 is no guidance), not {guidance}")
        self.equal_times = equal_times
        self.weight_power, self.guidance = weight_power, guidance
        self.extra_forwards = (1 - equal_times) * self.forwards_apart + (guidance != 1)

    @classmethod
    def interval_on(cls, path: Path) -> Interval:
        """The path's interval; refuses paths whose alpha_t or sigma_t exceeds 2."""
        return require_unit_scale(cls.name, path)

    def velocity_from(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Return the prediction, which is the velocity where s = t."""
        return prediction

    def velocity(self, network: Network, label: Tensor | None = None) -> Velocity:
        """The velocity u(t, t, x) of a network, which also has its displacement."""
        return FlowMapVelocity(network, label)

    def displacement(self, network: Network, label: Tensor | None = None) -> Displacement:
        """The displacement (t, s, x) -> x_s - x_t of a network; one evaluation per call."""
        return FlowMapVelocity(network, label).displacement

    def loss(self, network: Network, sample: PathSample, label: Tensor | None = None) -> Tensor:
        """Squared residual of each example, [N], averaged over dimensions; gradients have the weight.

        Raises:
            ValueError: the sample has no second times.
        """
        square = self.residual(network, sample, label).square().flatten(1).mean(1)
        value = square.detach()
        return value + (value + WEIGHT_FLOOR) ** -self.weight_power * (square - value)

    def residual(self, network: Network, sample: PathSample, label: Tensor | None = None) -> Tensor:
        """u(t, s, x_t) minus its target, [N, ...]; the target has no gradients.

        Raises:
            ValueError: the sample has no second times.
        """
        second = sample.second
        if second is None:
            raise ValueError(f"{self.name} needs samples with a second time")
        prediction = network(sample.t, sample.x_t, label, second.s).to(sample.x_t.dtype)
        with torch.no_grad():
            target = self._target(plain_function(network), sample, second, label)
        return prediction - target

    @abstractmethod
    def target_apart(
        self, network: Network, sample: PathSample, second: SecondTimes, label: Tensor | None
    ) -> Tensor:
        """The target of examples with s > t, [M, ...], from the network without gradients.

        The velocity of the sample is that whose flow map is learned: conditional, or guided.
        """

    def _target(
        self, network: Network, sample: PathSample, second: SecondTimes, label: Tensor | None
    ) -> Tensor:
        velocity = self._guided(network, sample, label)
        apart = second.apart
        if len(apart) == 0:
            return velocity
        x_t, x0, x1, t = (part[apart] for part in (sample.x_t, sample.x0, sample.x1, sample.t))
        chosen = PathSample(x_t, velocity[apart], x0, x1, t)
        times = SecondTimes(second.s[apart], second.split[apart], apart)
        target = self.target_apart(network, chosen, times, None if label is None else label[apart])
        return velocity.index_copy(0, apart, target)

    def _guided(self, network: Network, sample: PathSample, label: Tensor | None) -> Tensor:
        """The conditional velocity [N, ...], guided if there is a scale; without labels the optimum is v."""
        if self.guidance == 1 or label is None:
            return sample.velocity
        unlabeled = network(sample.t, sample.x_t, None, sample.t).to(sample.x_t.dtype)
        return torch.lerp(unlabeled, sample.velocity, self.guidance)


def plain_function(network: Network) -> Network:
    """The forward function of a network's module, without its wrapper: a data-parallel engine, a compiler.

    Gradients are not recorded through it, so hooks of the wrapper are not needed; a compiled module would not
    support forward-mode differentiation.
    """
    module = getattr(network, "module", network)
    return cast(Network, module.forward) if isinstance(module, nn.Module) else module
