"""Gaussian mixtures in closed form along any path: density, score, velocity, conditional means.

With data x1 ~ sum_k w_k N(m_k, diag(v_k)), x_t is a mixture of N(alpha m_k, diag(alpha^2 v_k + sigma^2)).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_core.method.affine import Affine
from fm_core.method.objectives import DataPrediction, FlowMatching, NoisePrediction, ScoreFlow, ScoreMatching
from fm_core.method.paths import (
    Cosine,
    OptimalTransport,
    Path,
    VarianceExploding,
    VariancePreserving,
)

PATHS = {
    "optimal-transport": OptimalTransport(),
    "variance-preserving": VariancePreserving(),
    "variance-exploding": VarianceExploding(),
    "cosine": Cosine(),
    "affine": Affine(lambda t: 0.1 + 0.9 * t**2, lambda t: (1 - t) ** 2 + 0.05),
}
REGRESSIONS = {
    cls.name: cls for cls in (FlowMatching, ScoreMatching, ScoreFlow, NoisePrediction, DataPrediction)
}
DIFFUSION = ("variance-preserving", "variance-exploding", "affine")
PAIRS = [
    (objective, path)
    for objective in REGRESSIONS
    for path in PATHS
    if objective in ("flow-matching", "data-prediction") or path in DIFFUSION
]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Mixture:
    weights: Tensor  # [K]
    means: Tensor  # [K, D]
    variances: Tensor  # [K, D]
    path: Path

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of the components at t, [N, K, D]."""
        alpha, sigma = self.path.alpha(t)[:, None, None], self.path.sigma(t)[:, None, None]
        return alpha * self.means, alpha**2 * self.variances + sigma**2

    def log_components(self, t: Tensor, x: Tensor) -> Tensor:
        """log w_k N(x; ...), [N, K]."""
        means, variances = self._at(t)
        exponent = -0.5 * ((x[:, None] - means) ** 2 / variances + variances.log() + math.log(2 * math.pi))
        return self.weights.log() + exponent.sum(-1)

    def log_density(self, t: Tensor, x: Tensor) -> Tensor:
        return self.log_components(t, x).logsumexp(1)

    def distribution(self, t: Tensor, x: Tensor) -> Tensor:
        """P(X_t <= x) in one dimension, [N]."""
        means, variances = self._at(t)
        z = (x[:, None] - means) / variances.sqrt()
        return (self.weights * torch.special.ndtr(z[..., 0])).sum(1)

    def score(self, t: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            total = self.log_density(t, leaf).sum()
            return torch.autograd.grad(total, leaf, create_graph=x.requires_grad)[0]

    def posteriors(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior of x1 given x_t = x: weights [N, K], means and variances [N, K, D]."""
        means, variances = self._at(t)
        alpha, sigma = self.path.alpha(t)[:, None, None], self.path.sigma(t)[:, None, None]
        posterior = self.means + alpha * self.variances / variances * (x[:, None] - means)
        return self.log_components(t, x).softmax(1), posterior, self.variances * sigma**2 / variances

    def data(self, t: Tensor, x: Tensor) -> Tensor:
        """E[x1 | x_t = x]."""
        weights, means, _ = self.posteriors(t, x)
        return (weights[..., None] * means).sum(1)

    def noise(self, t: Tensor, x: Tensor) -> Tensor:
        """E[x0 | x_t = x], from the components, so that sigma = 0 does not divide."""
        means, variances = self._at(t)
        weights = self.log_components(t, x).softmax(1)[..., None]
        sigma = self.path.sigma(t)[:, None, None]
        return (weights * sigma * (x[:, None] - means) / variances).sum(1)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """E[alpha' x1 + sigma' x0 | x_t = x]."""
        t = t.expand(x.shape[0])
        d_alpha, d_sigma = self.path.d_alpha(t)[:, None], self.path.d_sigma(t)[:, None]
        return d_alpha * self.data(t, x) + d_sigma * self.noise(t, x)

    def prediction(self, objective: str):
        """The exact network of an objective."""
        exact = {
            "flow-matching": self.velocity,
            "score-matching": self.score,
            "scoreflow": self.score,
            "noise-prediction": self.noise,
            "data-prediction": self.data,
        }[objective]
        return lambda t, x, label: exact(t, x)


def gaussian(path: Path) -> Mixture:
    return Mixture(double(1.0), double(0.4, -0.7, 0.2)[None], double(0.5, 0.1, 0.8)[None], path)


def line(path: Path) -> Mixture:
    return Mixture(double(0.3, 0.7), double(-0.8, 0.6)[:, None], double(0.05, 0.15)[:, None], path)


def plane(path: Path) -> Mixture:
    means = torch.stack([double(-0.6, 0.5), double(0.7, 0.6), double(0.1, -0.8)])
    variances = torch.stack([double(0.10, 0.20), double(0.15, 0.08), double(0.30, 0.12)])
    return Mixture(double(0.2, 0.5, 0.3), means, variances, path)


def two_components(path: Path, mean: float = 0.7, variance: float = 0.05):
    """Velocity for data from two components at -mean and mean along each dimension, in few operations."""

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        t = t.reshape(1)
        alpha, sigma = path.alpha(t), path.sigma(t)
        total = alpha**2 * variance + sigma**2
        nearer = mean * torch.tanh(alpha * mean * x / total)
        data = (alpha * variance * x + sigma**2 * nearer) / total
        noise = sigma * (x - alpha * nearer) / total
        return path.d_alpha(t) * data + path.d_sigma(t) * noise

    return velocity


def pushforward(mixture, interval):
    """Mean and per-unit-of-source deviation, [D], of the flow of Gaussian data with a diagonal covariance."""
    ends = torch.tensor(interval, dtype=torch.float64)
    alpha, sigma = mixture.path.alpha(ends)[:, None], mixture.path.sigma(ends)[:, None]
    std = (alpha**2 * mixture.variances + sigma**2).sqrt()
    ratio = std[1] / std[0]
    return (alpha[1] * mixture.means - ratio * alpha[0] * mixture.means)[0], ratio
