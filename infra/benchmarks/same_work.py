"""The same training step in several trainers.

Every contender trains a UNet of the same blocks and widths on batches of the same shape, with Adam or AdamW,
gradient norm, and EMA of the weights. Our contender (program.py) runs this project's training loop, including
its data, noise, metrics and rank synchronization. The others use batches that are already in memory, which is
less work.

The torchcfm and flow-matching contenders follow the published image examples of their repositories in the
order of steps and calls. They use the UNet in torchcfm's wheel (the ADM UNet, as in both examples).
"""

import copy
import math
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

SIZES = {
    "digits": {
        "shape": (1, 8, 8),
        "model": {
            "channels": 32,
            "channel_multipliers": (1, 2),
            "residual_blocks": 1,
            "attention_resolutions": (),
            "head_channels": 64,
            "resample_with_residual_blocks": False,
        },
    },
    "small": {
        "shape": (3, 8, 8),
        "model": {
            "channels": 128,
            "channel_multipliers": (1, 1),
            "residual_blocks": 1,
            "attention_resolutions": (4,),
            "head_channels": 64,
        },
    },
    "small64": {
        "shape": (3, 64, 64),
        "model": {
            "channels": 16,
            "channel_multipliers": (1, 2),
            "residual_blocks": 1,
            "attention_resolutions": (),
            "head_channels": 16,
        },
    },
    "imagenet64": {"shape": (3, 64, 64), "model": {"size": "imagenet64"}},
    "DiT-B/4": {"shape": (3, 64, 64), "model": {"size": "DiT-B/4"}},
    "tiny-dit": {
        "shape": (3, 8, 8),
        "model": {"kind": "transformer", "width": 32, "depth": 1, "heads": 2, "patch": 4},
    },
}
RATE, CLIP, DECAY = 1e-4, 1.0, 0.9999


def model_section(size: str) -> Any:
    """Model section of the configuration for a size."""
    from fm_core.config import ModelSection

    return ModelSection.model_validate(SIZES[size]["model"])


def public_unet(size: str) -> torch.nn.Module:
    """torchcfm's UNet with the same blocks and widths as ours."""
    from torchcfm.models.unet.unet import UNetModel

    section, shape = model_section(size), SIZES[size]["shape"]
    return UNetModel(
        image_size=shape[1],
        in_channels=shape[0],
        model_channels=section.channels,
        out_channels=shape[0],
        num_res_blocks=section.residual_blocks,
        attention_resolutions=tuple(shape[1] // side for side in section.attention_resolutions),
        channel_mult=section.channel_multipliers,
        num_head_channels=section.head_channels,
        use_scale_shift_norm=section.scale_shift,
        resblock_updown=section.resample_with_residual_blocks,
    )


def reference_network(size: str) -> torch.nn.Module:
    """torchcfm's UNet; for transformers, which no peer provides, our network in float32."""
    from fm_core.models.build import build_network

    section = model_section(size)
    return public_unet(size) if section.kind == "unet" else build_network(section, SIZES[size]["shape"], 0)


def ready_batches(task: dict[str, Any], device: torch.device) -> list[torch.Tensor]:
    """Create batches with values in [0, 1] on the device."""
    shape = (task["batch"], *SIZES[task["size"]]["shape"])
    return [torch.rand(shape, device=device) for _ in range(8)]


def timed(step: Callable[[int], None], task: dict[str, Any], device: torch.device) -> list[float]:
    """Seconds per step for each block of steps, after the warm-up."""
    for number in range(task["warmup"]):
        step(number)
    seconds = []
    for _ in range(task["blocks"]):
        _finish(device)
        began = time.perf_counter()
        for number in range(task["steps"]):
            step(number)
        _finish(device)
        seconds.append((time.perf_counter() - began) / task["steps"])
    return seconds


def torchcfm(task: dict[str, Any], device: torch.device) -> list[float]:
    """Train as in torchcfm's CIFAR-10 example: Adam, warm-up, clipping, EMA over the state dict."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    network = public_unet(task["size"]).to(device)
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 5000) / 5000)
    matcher = ConditionalFlowMatcher(sigma=0.0)
    batches = ready_batches(task, device)

    def step(number: int) -> None:
        optimizer.zero_grad()
        x1 = batches[number % len(batches)] * 2 - 1
        t, x_t, target = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        loss = torch.mean((network(t, x_t) - target) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        weights, averages = network.state_dict(), average.state_dict()
        for name in weights:
            averages[name].data.copy_(averages[name].data * DECAY + weights[name].data * (1 - DECAY))

    return timed(step, task, device)


def flow_matching(
    task: dict[str, Any], device: torch.device, autocast: torch.dtype = torch.float16
) -> list[float]:
    """Train as in flow_matching's image example: DDP, fp16 autocast with GradScaler on a GPU, .item().

    With bfloat16, which needs no GradScaler, everything else is the same.
    """
    from flow_matching.path import CondOTProbPath
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.backends.cudnn.benchmark = True
    network = reference_network(task["size"]).to(device)
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(network, device_ids=ids, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.95))
    gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=gpu and autocast == torch.float16)
    average = [weight.detach().clone() for weight in network.parameters()]
    path, batches = CondOTProbPath(), ready_batches(task, device)

    def step(number: int) -> None:
        optimizer.zero_grad()
        samples = batches[number % len(batches)] * 2 - 1
        t = torch.rand(len(samples), device=device)
        point = path.sample(t=t, x_0=torch.randn_like(samples), x_1=samples)
        with torch.autocast(device.type, autocast, enabled=gpu):
            loss = torch.pow(wrapped(point.t, point.x_t) - point.dx_t, 2).mean()
        if not math.isfinite(loss.item()):
            raise ArithmeticError("the loss is not finite")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.norm(torch.stack([torch.norm(weight.grad) for weight in network.parameters()]))
        scaler.step(optimizer)
        scaler.update()
        for averaged, weight in zip(average, network.parameters(), strict=True):
            averaged.sub_((1 - DECAY) * (averaged - weight.detach()))

    return timed(step, task, device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
