"""DeepSpeed engine: process group, settings and optimizer."""

import os
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from fm_core.config import TrainSection
from fm_core.config.performance import PerformanceSection
from fm_core.errors import UserError
from fm_core.method.objectives import Objective

SMALLEST_BUCKET, LARGEST_BUCKET = 2**20, 25_000_000
"""Gradient elements. DeepSpeed's default of 5e8 exceeds the parameters of an entire network of this kind."""


def initialize_process_group() -> torch.device:
    """Join the ranks of this job (the environment of their rank group): NCCL with GPUs, gloo without."""
    if not torch.cuda.is_available():
        # Set here, not by the launcher, which may run on a host with other devices.
        os.environ["DS_ACCELERATOR"] = "cpu"
    # The shared-memory reduction of DeepSpeed's CPU accelerator compiles C++ for minutes; gloo is sufficient.
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return device


def micro_batch_of(train: TrainSection, ranks: int) -> int:
    """Images of one forward pass of one rank. UserError if it does not divide the global batch."""
    if train.global_batch % ranks:
        raise UserError(
            f"train.global_batch {train.global_batch} does not divide over {ranks} processes; "
            "change it or launch.processes"
        )
    share = train.global_batch // ranks
    micro = min(train.micro_batch or share, share)
    if share % micro:
        raise UserError(
            f"train.micro_batch {micro} does not divide the {share} images of one process "
            f"(train.global_batch {train.global_batch} over {ranks} processes)"
        )
    return micro


def use_bf16(train: TrainSection, device: torch.device) -> bool:
    """Whether the network's weights are bfloat16 (the optimizer's stay float32)."""
    return train.precision == "bf16" or (train.precision == "auto" and device.type == "cuda")


def make_engine(network: torch.nn.Module, train: TrainSection, device: torch.device) -> Any:
    """Wrap a network and torch.optim.AdamW in a DeepSpeed engine."""
    import deepspeed

    torch.backends.cudnn.benchmark = train.speed.cudnn_benchmark
    torch.set_float32_matmul_precision("high" if train.speed.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = train.speed.tf32
    ranks = dist.get_world_size()
    micro = micro_batch_of(train, ranks)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.epsilon,
        weight_decay=train.weight_decay,
        fused=train.speed.fused_optimizer,
    )
    bf16 = use_bf16(train, device)
    accumulated = train.global_batch // ranks // micro
    bucket = bucket_elements(network, train)
    settings: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": train.gradient_clip,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": train.speed.overlap,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Both would synchronize the device at every step.
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": False,
        "steps_per_print": 2**31,
    }
    if bf16 and accumulated > 1:
        _require_buckets(train)
        # By default DeepSpeed accumulates the gradients of micro-batches in bfloat16.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    _import_muon()
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    if train.speed.compile:
        engine.compile(compile_kwargs=compile_options(train.speed))
    return engine


def _import_muon() -> None:
    """Import DeepSpeed's Muon without compiling it: any optimizer imports it, and compiling takes 1.4 s."""
    switch = "TORCHDYNAMO_DISABLE"
    if switch in os.environ:
        return
    os.environ[switch] = "1"
    try:
        with suppress(ImportError):
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ[switch]


def _require_buckets(train: TrainSection) -> None:
    """Refuse bucket settings that DeepSpeed ignores where ZeRO 1 accumulates in float32 (one message)."""
    for key in ("overlap", "bucket_elements"):
        if train.zero_stage == 1 and getattr(train.speed, key):
            raise UserError(
                f"train.speed.{key} has no effect where ZeRO 1 accumulates micro-batches in bf16: use "
                "train.zero_stage 2, or leave out train.micro_batch"
            )


def bucket_elements(network: torch.nn.Module, train: TrainSection) -> int:
    """Gradient elements per bucket: about an eighth of the network, so that the first one is sent early."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    sized = min(max(parameters // 8, SMALLEST_BUCKET), LARGEST_BUCKET)
    return train.speed.bucket_elements or sized


def compile_options(speed: PerformanceSection) -> dict[str, Any]:
    """Arguments of torch.compile for the network; shapes never change during training."""
    from torch._inductor import list_mode_options

    options = {**list_mode_options(speed.compile_mode)}
    if speed.compile_channels_last:
        # Inductor of torch 2.13 considers only forward convolutions and does not change the backward graph.
        options["force_layout_optimization"] = True
    return {"dynamic": False, "options": options}


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def network_for(objective: Objective, engine: Any) -> Any:
    """The network for an objective's loss: the engine or, if the loss takes gradients itself, its module.

    The engine's hooks would treat a gradient inside the loss as that of the backward pass.
    """
    return engine.module if objective.takes_gradients else engine
