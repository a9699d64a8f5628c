"""Shared type aliases: interval of t, network, velocity and noise, with their shapes."""

from collections.abc import Callable

from torch import Tensor

# (start, end) of t.
Interval = tuple[float, float]

# network(t [N], x [N, ...], label int64 [N] or None) -> tensor shaped like x. A network of a flow map takes a
# fourth argument, the second time s [N]; without it s = t.
Network = Callable[..., Tensor]

# velocity(t scalar or [N], x [N, ...]) -> tensor shaped like x. Optional attributes: `forwards`, the largest
# number of network evaluations per call; `evaluations_at(t, dtype)`, the number for a call at t; `jumps`, the
# times at which the velocity is not continuous; `displacement(t, s, x)`, the change of x from t to s.
Velocity = Callable[[Tensor, Tensor], Tensor]

# Network evaluations per image: of the network, and of the weaker network that guides it
Evaluations = tuple[int, int]

# noise(step number) -> standard normal noise in the shape, and on the device, of the state [N, ...]
NoiseSource = Callable[[int], Tensor]
