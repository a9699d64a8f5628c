"""A path that fails in its first micro-batch."""

from fm_core.method.paths import OptimalTransport


class Failing(OptimalTransport):
    def sample(self, x0, x1, t):
        raise ZeroDivisionError("a number\nof two lines")
