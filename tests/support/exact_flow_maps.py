"""Flow maps in closed form, as networks u(t, s, x) with two times, for data of gaussian_mixtures.py."""

import torch


class ExactGaussian:
    """u(t, s, x) of Gaussian data: the flow keeps the standardized coordinate of each dimension."""

    def __init__(self, mixture):
        self.mixture, self.path = mixture, mixture.path

    def _moments(self, t):
        alpha, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        return alpha * self.mixture.means, (alpha**2 * self.mixture.variances + sigma**2).sqrt()

    def __call__(self, t, x, label, s):
        if torch.equal(s, t):
            return self.mixture.velocity(t, x)
        (mean, std), (last_mean, last_std) = self._moments(t), self._moments(s)
        return (last_mean + last_std / std * (x - mean) - x) / (s - t)[:, None]


class ExactLine:
    """u(t, s, x) of a mixture in one dimension: the flow keeps the value of the distribution function."""

    def __init__(self, mixture):
        self.mixture = mixture

    def __call__(self, t, x, label, s):
        if torch.equal(s, t):
            return self.mixture.velocity(t, x)
        value = self.mixture.distribution(t, x)
        low, high = torch.full_like(t, -12.0), torch.full_like(t, 12.0)
        for _ in range(80):  # without derivatives, on values
            middle = (low + high) / 2
            below = self.mixture.distribution(s, middle[:, None]) < value
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        root = ((low + high) / 2)[:, None]
        # A step of Newton's method has the derivative of the inverse function.
        density = self.mixture.log_density(s, root).exp()[:, None]
        moved = root - (self.mixture.distribution(s, root) - value)[:, None] / density
        return (moved - x) / (s - t)[:, None]
