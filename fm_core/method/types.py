"""The shapes of the things that meet here: a network, a velocity, an interval of time."""

from collections.abc import Callable

from torch import Tensor

# (start, end) of t; t = 0 is noise, t = 1 is data.
Interval = tuple[float, float]

# network(t [N], x [N, ...], label int64 [N] or None) -> like x
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# velocity(t scalar or [N], x [N, ...]) -> like x. An attribute `forwards` says how often one call runs the
# network.
Velocity = Callable[[Tensor, Tensor], Tensor]
