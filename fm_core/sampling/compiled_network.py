"""The same field in less time: bfloat16 or TF32 with a float32 state, compiled for one batch size."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fm_core.config import SampleSection


def accelerated(network: nn.Module, sample: SampleSection) -> nn.Module:
    """The network as sample.precision and sample.compile want it; t, x and what it returns stay float32.

    The network's own weights are converted.
    """
    if sample.precision == "bf16":
        network = network.to(torch.bfloat16)
    return Compiled(network, sample.batch, sample.cuda_graphs) if sample.compile else network


@contextmanager
def matmul_precision(tf32: bool = False) -> Generator[None]:
    """Multiply and convolve float32 with all its bits, or with TF32's, on GPUs that have it.

    torch's own default is TF32 (10 bits of mantissa) in convolutions, and float32 in products of matrices.
    """
    convolutions, matrices = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(matrices)


class Compiled(nn.Module):
    """A network compiled for batches of one size; a rest of another size takes the plain way."""

    def __init__(self, network: nn.Module, batch: int, cuda_graphs: bool) -> None:
        super().__init__()
        self.network, self.batch, self.cuda_graphs = network, batch, cuda_graphs
        mode = "reduce-overhead" if cuda_graphs else "default"
        self.compiled = torch.compile(network, dynamic=False, fullgraph=True, mode=mode)

    def forward(self, t: Tensor, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Evaluate the network at times t [N] and images x [N, C, S, S]."""
        if len(x) != self.batch:
            return self.network(t, x, label)
        y = cast(Tensor, self.compiled(t, x, label))
        # A graph writes where it wrote before, and solvers keep several slopes.
        return y.clone() if self.cuda_graphs else y
