"""Training in 2-D: a small network in one process, without DeepSpeed."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from fm_core.config import Toy2dSection
from fm_core.method.objectives import Objective
from fm_core.method.paths import PathSample
from fm_core.method.time_pairs import NUMBERS, SecondTimes, draw_time_pairs
from fm_core.method.timestep_samplers import Uniform
from fm_core.models.mlp import MLP
from fm_core.reproduce.toy2d.checkerboard import by_position, points
from fm_core.storage.keyed_random import KeyedRandom, Purpose

CURVE_POINTS = 100
"""Number of points of the saved loss curve."""
STEPS_DRAWN_TOGETHER = 32
"""Number of steps whose random numbers are drawn together; per-step draws take a tenth of a step's time."""

Examples = Callable[[int, int], PathSample]


def initial_network(toy: Toy2dSection, seed: int, two_times: bool = False) -> MLP:
    """The network with its initial weights, which depend only on the seed and not on the objective.

    The embedding of a second time begins at zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(dimensions=2, width=toy.width, layers=toy.layers, two_times=two_times)


def draw(objective: Objective, random: KeyedRandom, first: int, count: int) -> PathSample:
    """The training examples of the stream positions first, first + 1, ...

    Data x1, noise x0 and the quantile of t are functions of the position and do not depend on the objective.
    Times are uniform on the objective's interval and the coupling is independent, as in eq. 14. A flow map
    has second times.
    """
    x1 = points(random, first, count)
    x0 = by_position(random.normal, Purpose.NOISE, first, count, (2,))
    u = by_position(random.uniform, Purpose.TIME, first, count)
    times = Uniform(objective.interval)
    if objective.equal_times is None:
        return objective.path.sample(x0, x1, times.times(u))
    more = by_position(random.uniform, Purpose.SECOND_TIME, first, count, (NUMBERS,))
    t, second = draw_time_pairs(times, u, more, objective.equal_times)
    return replace(objective.path.sample(x0, x1, t), second=second)


def split(sample: PathSample, size: int) -> list[PathSample]:
    """Split a sample into batches of `size` examples each."""
    parts = (part.split(size) for part in (sample.x_t, sample.velocity, sample.x0, sample.x1, sample.t))
    batches = [PathSample(*batch) for batch in zip(*parts, strict=True)]
    second = sample.second
    if second is None:
        return batches
    s, fractions = second.s.split(size), second.split.split(size)
    apart = [
        second.apart[(second.apart >= first) & (second.apart < first + size)] - first
        for first in range(0, len(sample.t), size)
    ]
    pairs = zip(s, fractions, apart, strict=True)
    return [replace(batch, second=SecondTimes(*each)) for batch, each in zip(batches, pairs, strict=True)]


def fit(
    network: nn.Module,
    objective: Objective,
    toy: Toy2dSection,
    steps: int,
    examples: Examples,
    on_step: Callable[[int, float], None],
) -> list[float]:
    """Train the network in place for `steps` steps; returns the mean loss of each hundredth of training.

    `examples` returns the training examples of the stream positions first, first + 1, ..., given the first
    and their number. `on_step` is called with the number of finished steps and the loss of the last one.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(network.parameters(), toy.learning_rate, weight_decay=0.0, fused=True)
    losses, samples = list[float](), list[PathSample]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = toy.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        if step % STEPS_DRAWN_TOGETHER == 0:
            drawn = min(STEPS_DRAWN_TOGETHER, steps - step)
            samples = split(examples(step * toy.batch, drawn * toy.batch), toy.batch)
        loss = objective.loss(network, samples[step % STEPS_DRAWN_TOGETHER]).mean()
        losses.append(_finite(loss, step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), toy.gradient_clip, error_if_nonfinite=True)
        optimizer.step()
        on_step(step + 1, losses[-1])
    return _averaged(losses)


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ArithmeticError(f"the loss of step {step + 1} is {value}")
    return value


def _averaged(losses: list[float]) -> list[float]:
    """Means over at most CURVE_POINTS intervals of nearly equal length."""
    edges = [round(point * len(losses) / CURVE_POINTS) for point in range(CURVE_POINTS + 1)]
    intervals = [losses[a:b] for a, b in pairwise(edges) if b > a]
    return [sum(interval) / len(interval) for interval in intervals]
