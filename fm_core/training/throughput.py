"""Measured training throughput of a network on this machine, to estimate the duration of a run."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from fm_core.config import RunConfig
from fm_core.models.build import build_method, build_network
from fm_core.models.flops import TRAINING_PASSES
from fm_core.training.engine import use_bf16

MEASURED_SECONDS = 3.0
"""Duration of the measurement in seconds, without its first step."""
CPU_BATCH = 8
"""Images per step of the measurement on a CPU, where larger batches are hardly faster per image."""


@dataclass(frozen=True)
class Throughput:
    """Training throughput of this host."""

    images_per_s: float
    """Images per second over all devices."""
    devices: int
    """Number of GPUs, or 1 for all CPU cores together."""
    device: str
    """Name of a device, or the number of CPU cores."""
    micro_batch: int | None
    """Largest number of images of one forward pass that fit into a GPU; None on a CPU."""


def measure_throughput(
    config: RunConfig, image_shape: tuple[int, int, int], classes: int, batch: int
) -> Throughput:
    """Train for a few seconds on random images and measure the throughput; no files are written.

    `image_shape` is (channels, height, width); `batch` is the number of images per process and step. One GPU
    is measured and scaled to all GPUs of the host. Raises UserError if the network cannot be built.
    """
    if not torch.cuda.is_available():
        rate = _images_per_s(config, image_shape, classes, min(batch, CPU_BATCH), torch.device("cpu"))
        threads = torch.get_num_threads()
        return Throughput(rate, 1, "1 CPU thread" if threads == 1 else f"{threads} CPU threads", None)
    gpus, device = torch.cuda.device_count(), torch.device("cuda")
    while True:
        try:
            rate = _images_per_s(config, image_shape, classes, batch, device)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            torch.cuda.empty_cache()
        else:
            return Throughput(rate * gpus, gpus, torch.cuda.get_device_name(device), batch)


def _images_per_s(
    config: RunConfig, image_shape: tuple[int, int, int], classes: int, batch: int, device: torch.device
) -> float:
    dtype = torch.bfloat16 if use_bf16(config.train, device) else torch.float32
    generator_state = torch.get_rng_state()
    try:
        objective = build_method(config.method).objective
        network = build_network(
            config.model,
            image_shape,
            classes,
            config.train.gradient_checkpointing,
            objective.two_times,
        )
        network.to(device=device, dtype=dtype)
        optimizer = torch.optim.AdamW(network.parameters())
        images = torch.randn(batch, *image_shape, device=device)
        t = torch.rand(batch, device=device)
        label = (
            torch.zeros(batch, dtype=torch.int64, device=device) if config.model.class_conditional else None
        )

        def step() -> None:
            output: Any = network(t, images, label)
            output.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        step()  # the first step allocates memory and chooses kernels
        steps, started = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - started < MEASURED_SECONDS:
            step()
            steps += 1
        # Passes that the objective adds are not measured, but counted.
        slower = 1 + objective.extra_forwards / TRAINING_PASSES
        return steps * batch / (time.perf_counter() - started) / slower
    finally:
        torch.set_rng_state(generator_state)
