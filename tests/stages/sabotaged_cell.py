"""An objective from outside that fails at its first step."""

from fm_core.method.objectives import FlowMatching


class Broken(FlowMatching):
    """Flow matching without a loss."""

    def loss(self, network, sample, label=None):
        raise ArithmeticError("no loss today")
