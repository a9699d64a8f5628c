"""Multilayer perceptron of the paper's 2-D experiments."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fm_core.models.layers import Linear, at_least_float32


class MLP(nn.Module):
    """Velocity network for points: (t [N], x [N, ...] of `dimensions` values each, label) -> shape of x.

    Time is an additional input coordinate, 2t - 1. `layers` hidden layers of `width` units (SiLU) are
    followed by a linear layer initialized to zero. With `classes` > 0 an embedding of the label is added to
    the first hidden layer; label `classes`, or None, is the null label. With `two_times` a linear function of
    s - t, initialized to zero, is added there too; s [N] is the second time, by default t.

    Raises:
        ValueError: fewer than one layer, points of another dimension, labels given to a network without
            classes, or a second time to a network with one time.
    """

    def __init__(
        self,
        dimensions: int = 2,
        width: int = 512,
        layers: int = 5,
        classes: int = 0,
        two_times: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"an MLP has at least one hidden layer, not {layers}")
        self.dimensions = dimensions
        self.classes = classes
        self.first = nn.Linear(dimensions + 1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.last = nn.Linear(width, dimensions)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.label = nn.Embedding(classes + 1, width) if classes > 0 else None
        self.second_time = Linear(1, width, zero=True) if two_times else None

    def forward(self, t: Tensor, x: Tensor, label: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """Evaluate the network at times t [N], and s [N] with two times, and points x [N, ...]."""
        points = at_least_float32(x.flatten(1))
        if points.shape[1] != self.dimensions:
            raise ValueError(f"the network is for {self.dimensions} dimensions, these are {points.shape[1]}")
        time = 2 * at_least_float32(t)[:, None] - 1
        h = self.first(torch.cat([points, time], dim=1).to(self.first.weight.dtype))
        if self.label is not None:
            if label is None:
                label = torch.full(t.shape, self.classes, dtype=torch.int64, device=t.device)
            h = h + self.label(label)
        elif label is not None:
            raise ValueError("labels were given to a network without classes: pass label=None")
        if self.second_time is not None:
            length = torch.zeros_like(t) if s is None else s - t
            h = h + self.second_time(length[:, None].to(self.first.weight.dtype))
        elif s is not None:
            raise ValueError("a second time was given to a network with one time: pass s=None")
        for layer in self.hidden:
            h = layer(F.silu(h))
        return self.last(F.silu(h)).to(x.dtype).view_as(x)
