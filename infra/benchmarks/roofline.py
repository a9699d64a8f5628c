"""Roofline estimate of the time of a training step, from the operations and bytes of the ATen graph.

    python infra/benchmarks/roofline.py
    python infra/benchmarks/roofline.py --size DiT-B/4 --batch 128 --page infra/docs/benchmarks.md

A forward and a backward pass in bf16 run on the meta device, so nothing is computed and no GPU is needed.
torch's counter returns the FLOPs of each operation; its bytes are the sizes of its inputs and outputs. In
eager mode, each operation is a kernel. When compiled, operations other than matrix products, convolutions and
attention are fused if one uses the result of another and no product lies between them. A fused kernel neither
reads its own results nor writes results that no other kernel reads.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu import write_table
from same_work import SIZES, model_section
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fm_core.models.flops import TRAINING_PASSES, flops_per_image, parameter_count
from fm_core.training.mfu import PEAK_TFLOPS

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
"""Memory bandwidth in bytes/s, from the vendor's data sheets."""
ATTAINED_FLOPS, ATTAINED_BANDWIDTH = 0.7, 0.85
"""Assumed fractions of the peaks that large matrix products and large copies attain."""
LAUNCH = 6e-6
"""Assumed host time in seconds for one eager operation, including its share of autograd."""
OPTIMIZER_BYTES = 54
"""Bytes per parameter and step after the backward pass, on one rank: gradient to float32 6, norm 4, AdamW
with float32 weights and moments 28, weights to bf16 4, EMA 12."""
MARKERS = "<!-- roofline.py: begin -->", "<!-- roofline.py: end -->"


@dataclass
class Kernel:
    """One operation of the graph: its FLOPs, and the bytes of each storage that it reads or writes."""

    flops: float
    product: bool
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    level: int = 0


class Recorder(TorchDispatchMode):
    """Recorder of all operations that compute; views and allocations are not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._alive: list[Any] = []  # keeps objects alive, so that no id is reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        reads, writes = self._sizes((args, kwargs)), self._sizes(out)
        mutates = func._schema.is_mutable
        if not writes or (not mutates and writes.keys() <= reads.keys()) or func.__name__.startswith("empty"):
            return out
        count = flop_registry.get(func._overloadpacket)
        flops = float(count(*args, **(kwargs or {}), out_val=out)) if count else 0.0
        self.kernels.append(Kernel(flops, count is not None, reads, writes))
        return out

    def _sizes(self, tree: Any) -> dict[int, int]:
        sizes: dict[int, int] = {}
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive.append(storage)
                read = min(tensor.numel() * tensor.element_size(), storage.nbytes())
                sizes[storage._cdata] = min(sizes.get(storage._cdata, 0) + read, storage.nbytes())
        return sizes


def training_graph(network: torch.nn.Module, shape: tuple[int, ...], batch: int) -> list[Kernel]:
    """Record the operations of a network's forward and backward pass on the meta device, in bf16."""
    x = torch.empty(batch, *shape, dtype=torch.bfloat16, device="meta")
    t = torch.empty(batch, device="meta")
    functional = torch.nn.functional
    standard = functional.scaled_dot_product_attention

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    functional.scaled_dot_product_attention = flash  # meta tensors would use the slow formula
    try:
        with Recorder() as recorder:
            (network(t, x) - x).float().square().mean().backward()
    finally:
        functional.scaled_dot_product_attention = standard
    return recorder.kernels


def fused(kernels: list[Kernel]) -> list[Kernel]:
    """Fuse kernels: products remain separate, other operations are joined within a level of the graph.

    The level of an operation is the largest number of products on a path to it. Two operations of the same
    level can be one kernel, because no product between them depends on the first and feeds the second.
    """
    group = [*range(len(kernels))]

    def root(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    producer: dict[int, int] = {}
    for index, kernel in enumerate(kernels):
        sources = [producer[key] for key in kernel.reads if key in producer]
        kernel.level = max((kernels[n].level + kernels[n].product for n in sources), default=0)
        for n in sources:
            if not kernel.product and not kernels[n].product and kernels[n].level == kernel.level:
                group[root(n)] = root(index)
        producer |= dict.fromkeys(kernel.writes, index)
    readers: dict[int, set[int]] = {}
    joined: dict[int, Kernel] = {}
    for index, kernel in enumerate(kernels):
        number = root(index)
        union = joined.setdefault(number, Kernel(0.0, kernel.product))
        union.flops += kernel.flops
        for key, size in kernel.reads.items():
            readers.setdefault(key, set()).add(number)
            if key not in union.writes:
                union.reads[key] = max(size, union.reads.get(key, 0))
        union.writes |= kernel.writes
    for number, union in joined.items():
        # A result that no kernel reads is an output, such as the gradient of a weight.
        inner = [key for key in union.writes if readers.get(key) == {number}]
        union.writes = {key: size for key, size in union.writes.items() if key not in inner}
    return [*joined.values()]


def size_of(kernels: Iterable[Kernel]) -> float:
    """Total bytes that the kernels read and write."""
    return float(sum(sum(kernel.reads.values()) + sum(kernel.writes.values()) for kernel in kernels))


def seconds(kernels: Iterable[Kernel], peak: float, bandwidth: float) -> float:
    """Time of the kernels executed one after another, each limited by compute or by memory bandwidth."""
    return sum(max(k.flops / peak, size_of([k]) / bandwidth) for k in kernels)


def rows(size: str, batch: int) -> list[str]:
    """Table rows of a network: eager and compiled."""
    with torch.device("meta"):
        from fm_core.models.build import build_network

        network = build_network(model_section(size), SIZES[size]["shape"], 0)
        model_flops = TRAINING_PASSES * flops_per_image(network, SIZES[size]["shape"]) * batch
        network = network.to(torch.bfloat16)
    shape = SIZES[size]["shape"]
    eager = training_graph(network, shape, batch)
    lines = []
    for name, kernels in (("eager", eager), ("compiled", fused(eager))):
        products = [kernel for kernel in kernels if kernel.product]
        others = [kernel for kernel in kernels if not kernel.product]
        optimizer = OPTIMIZER_BYTES * parameter_count(network)
        cells = [
            size,
            name,
            f"{len(products)} + {len(others)}",
            f"{sum(k.flops for k in kernels) / 1e12:.1f}",
        ]
        cells += [f"{size_of(part) / 1e9:.0f}" for part in (products, others)] + [f"{optimizer / 1e9:.0f}"]
        for device, raw in BANDWIDTH.items():
            peak, width = PEAK_TFLOPS[device] * 1e12 * ATTAINED_FLOPS, raw * ATTAINED_BANDWIDTH
            times = [seconds(products, peak, width), seconds(others, peak, width), optimizer / width]
            host = LAUNCH * len(kernels) if name == "eager" else 0.0
            step = max(sum(times), host)
            mfu = model_flops / step / PEAK_TFLOPS[device] / 1e12
            parts = " + ".join(f"{1e3 * value:.1f}" for value in times)
            cells.append(f"{parts} = {1e3 * step:.0f}" + (" (host)" if host > math.fsum(times) else ""))
            cells.append(f"{batch / step:,.0f}, {mfu:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(sizes: Iterable[str], batch: int) -> str:
    """Markdown table of the networks' training steps at a batch size."""
    head = ["network", "", "kernels", "TFLOP", "GB of products", "GB of others", "GB of the optimizer"]
    for device in BANDWIDTH:
        head += [f"{device}: ms", "images/s, MFU"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(line for size in sizes for line in rows(size, batch))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["imagenet64", "DiT-B/4"], choices=tuple(SIZES))
    parser.add_argument("--batch", type=int, default=64, help="images in a step")
    parser.add_argument("--page", type=Path, help="page whose table between the markers is replaced")
    options = parser.parse_args()
    text = table(options.size, options.batch)
    print(text)
    if options.page:
        write_table(options.page, text, MARKERS)


if __name__ == "__main__":
    main()
