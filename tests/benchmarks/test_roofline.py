"""Operations, bytes and fusion of infra/benchmarks/roofline.py on graphs that can be counted by hand."""

import importlib
from typing import Any

import pytest
import torch

from tests.support import ROOT

BATCH, WIDTH = 8, 16


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module infra/benchmarks/roofline.py."""
    monkeypatch.syspath_prepend(ROOT / "infra" / "benchmarks")
    return importlib.import_module("roofline")


def recorded(roofline: Any, function: Any, *shapes: tuple[int, ...]) -> list[Any]:
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    with roofline.Recorder() as recorder:
        function(*tensors)
    return recorder.kernels


def test_a_product_has_its_flops_and_the_bytes_of_its_inputs_and_output(roofline):
    (product,) = recorded(roofline, lambda a, b: (a @ b).view(-1), (BATCH, WIDTH), (WIDTH, WIDTH))
    assert product.product
    assert product.flops == 2 * BATCH * WIDTH * WIDTH
    assert roofline.size_of([product]) == 4 * (2 * BATCH * WIDTH + WIDTH * WIDTH)


def test_pointwise_operations_are_fused_up_to_the_next_product(roofline):
    def function(x, weight):
        y = torch.sin(x).exp() @ weight
        return (y * 2 + 1).cos()

    kernels = recorded(roofline, function, (BATCH, WIDTH), (WIDTH, WIDTH))
    assert len(kernels) == 6
    before, product, after = roofline.fused(kernels)
    assert [kernel.product for kernel in (before, product, after)] == [False, True, False]
    # Intermediate results of a fused kernel are neither written nor read.
    assert roofline.size_of([before]) == roofline.size_of([after]) == 2 * 4 * BATCH * WIDTH


def test_what_a_later_kernel_reads_is_written(roofline):
    def function(x, weight):
        inner = torch.sin(x)
        return torch.exp(inner) @ weight + inner

    kernels = recorded(roofline, function, (BATCH, WIDTH), (WIDTH, WIDTH))
    first, _, last = roofline.fused(kernels)
    assert roofline.size_of([first]) == 3 * 4 * BATCH * WIDTH  # reads x, writes sin and exp
    assert roofline.size_of([last]) == 3 * 4 * BATCH * WIDTH


def test_a_kernel_takes_the_longer_of_its_two_times(roofline):
    kernel = roofline.Kernel(100.0, True, {1: 30}, {2: 20})
    assert roofline.seconds([kernel], peak=10.0, bandwidth=50.0) == 10.0
    assert roofline.seconds([kernel], peak=1000.0, bandwidth=50.0) == 1.0


def test_a_training_step_has_three_times_the_flops_of_a_forward_pass(roofline):
    """Except the gradient with respect to the image in the first layer, which is not computed."""
    text = roofline.table(["tiny-dit"], 64)
    eager, compiled = [line.split("|") for line in text.splitlines()[2:]]
    sizes = importlib.import_module("same_work").SIZES
    from fm_core.models.build import build_network
    from fm_core.models.flops import flops_per_image

    network = build_network(roofline.model_section("tiny-dit"), sizes["tiny-dit"]["shape"], 0)
    once = flops_per_image(network, sizes["tiny-dit"]["shape"])
    with torch.device("meta"):
        graph = roofline.training_graph(network.to("meta", torch.bfloat16), sizes["tiny-dit"]["shape"], 64)
    assert 2.5 * 64 * once < sum(kernel.flops for kernel in graph) < 3.6 * 64 * once
    assert len(eager) == len(compiled) == 13
    before, after = ([int(number) for number in row[3].split("+")] for row in (eager, compiled))
    assert after[0] == before[0]
    assert after[1] < before[1] / 2
