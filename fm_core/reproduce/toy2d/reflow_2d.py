"""Reflow in 2-D: pairs of noise and the solution of a trained model, for a student (Liu et al. 2022)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fm_core.method.objectives import Objective
from fm_core.method.ode import Solver, solve
from fm_core.method.paths import PathSample
from fm_core.method.timestep_samplers import Uniform
from fm_core.reproduce.toy2d.checkerboard import by_position
from fm_core.storage.keyed_random import KeyedRandom, Purpose

PAIRS_PER_BATCH = 5_000
"""Number of trajectories that are solved together; adaptive steps depend on it."""
PAIRS_TOLERANCE = 1e-5
"""Relative and absolute tolerance of dopri5."""


@dataclass(frozen=True)
class Pairs:
    """Standard normal x0 and samples x1, each [N, 2]; a sample is the end of the trajectory of its noise."""

    x0: Tensor
    x1: Tensor

    def draw(self, objective: Objective, random: KeyedRandom, first: int, count: int) -> PathSample:
        """The training examples of the stream positions first, first + 1, ...: position p has pair p mod N.

        Times are uniform on the objective's interval, as without pairs.
        """
        numbers = torch.arange(first, first + count) % len(self.x0)
        u = by_position(random.uniform, Purpose.TIME, first, count)
        t = Uniform(objective.interval).times(u)
        return objective.path.sample(self.x0[numbers], self.x1[numbers], t)


def solve_pairs(
    teacher: nn.Module,
    objective: Objective,
    random: KeyedRandom,
    count: int,
    on_part: Callable[[int], None] = lambda solved: None,
) -> Pairs:
    """The first `count` noises of a stream, and the teacher's solutions by dopri5 at PAIRS_TOLERANCE.

    `on_part` is called with the number of pairs that are solved, and may raise.

    Raises:
        ArithmeticError: the solver failed.
    """
    x0 = by_position(random.normal, Purpose.NOISE, 0, count, (2,))
    solver = Solver("dopri5", rtol=PAIRS_TOLERANCE, atol=PAIRS_TOLERANCE)
    velocity, x1 = objective.velocity(teacher), list[Tensor]()
    for number, part in enumerate(x0.split(PAIRS_PER_BATCH)):
        x1.append(solve(velocity, objective.path.source_std * part, objective.interval, solver).x)
        on_part(min(count, (number + 1) * PAIRS_PER_BATCH))
    return Pairs(x0, torch.cat(x1))
