"""Model FLOPs utilization (MFU) and memory of a training step."""

import psutil
import torch

from fm_core.models.flops import TRAINING_PASSES

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
}
"""Dense bfloat16 matrix products with float32 accumulation, TFLOP/s, from the vendor's data sheets.

The first key that is contained in the device's name is used.
"""


def peak_tflops(device_name: str) -> float | None:
    """The device's bfloat16 peak in TFLOP/s; None if it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def utilization(
    images_per_s: float,
    flops: float,
    devices: int,
    device_name: str | None,
    bf16: bool,
    extra_forwards: float = 0.0,
) -> dict[str, float]:
    """The speed entries of a metrics line: TFLOP/s of one device and, if its peak is known, the MFU.

    Args:
        images_per_s: over all devices.
        flops: FLOPs of one forward pass for one image; recomputation (gradient checkpointing) is not counted.
        devices: processes that train.
        device_name: the GPU's name; None on a CPU.
        bf16: whether the network computes in bfloat16; float32 peaks are not in the table.
        extra_forwards: forward passes that the objective adds for one image.
    """
    tflops = images_per_s * flops * (TRAINING_PASSES + extra_forwards) / devices / 1e12
    peak = peak_tflops(device_name) if device_name and bf16 else None
    return {"tflops_per_device": tflops} | ({"mfu": tflops / peak} if peak else {})


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process on its GPU in bytes; without a GPU its current resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
