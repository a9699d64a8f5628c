"""Faster networks for sampling: bfloat16 or TF32 with a float32 ODE state, compiled for one batch size."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fm_core.config import SampleSection


def accelerated(network: nn.Module, sample: SampleSection) -> nn.Module:
    """The network with sample.precision and sample.compile applied; t, x and its output stay float32.

    Converts the weights of the given network in place.
    """
    if sample.precision == "bf16":
        network = network.to(torch.bfloat16)
    return Compiled(network, sample.batch, sample.cuda_graphs) if sample.compile else network


@contextmanager
def matmul_precision(tf32: bool = False) -> Generator[None]:
    """Compute float32 matrix products and convolutions in full precision, or in TF32 on GPUs that support it.

    torch's default is TF32 (10 bits of mantissa) for convolutions, and float32 for matrix products.
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
    """A network compiled for batches of one size; batches of another size run uncompiled."""

    def __init__(self, network: nn.Module, batch: int, cuda_graphs: bool) -> None:
        super().__init__()
        self.network, self.batch, self.cuda_graphs = network, batch, cuda_graphs
        mode = "reduce-overhead" if cuda_graphs else "default"
        self.compiled = torch.compile(network, dynamic=False, fullgraph=True, mode=mode)

    def forward(self, t: Tensor, x: Tensor, label: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """Evaluate the network at times t [N], and s [N] with two times, and images x [N, C, S, S]."""
        times = () if s is None else (s,)
        if len(x) != self.batch:
            return self.network(t, x, label, *times)
        y = cast(Tensor, self.compiled(t, x, label, *times))
        # A CUDA graph reuses its output buffer, but solvers retain several slopes.
        return y.clone() if self.cuda_graphs else y
