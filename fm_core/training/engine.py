"""The DeepSpeed engine: what is asked of it, and nothing it does by itself."""

import os
from typing import Any

import torch
import torch.distributed as dist

from fm_core.config import TrainSection
from fm_core.errors import UserError

BUCKET_ELEMENTS = 25_000_000
"""DeepSpeed's default bucket, 5e8 elements, is more than a whole network of this kind holds."""


def initialize_process_group() -> torch.device:
    """Join the ranks of this job (torchrun's environment): NCCL with GPUs, gloo without."""
    # The shared-memory reduction of DeepSpeed's CPU accelerator compiles C++ for minutes; gloo is enough.
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
    """Images of one forward pass of one rank. UserError if the global batch cannot be divided so."""
    if train.global_batch % ranks:
        raise UserError(
            f"train.global_batch {train.global_batch} does not divide over {ranks} processes; "
            "change it or launch.processes"
        )
    share = train.global_batch // ranks
    micro = train.micro_batch or share
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

    ranks = dist.get_world_size()
    micro = micro_batch_of(train, ranks)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.epsilon,
        weight_decay=train.weight_decay,
        fused=device.type == "cuda",
    )
    bf16 = use_bf16(train, device)
    settings: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.global_batch // ranks // micro,
        "gradient_clipping": train.gradient_clip,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            # Off until an equality test shows that it leaves the losses alone.
            "overlap_comm": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Both synchronise the device at every step.
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": False,
        "steps_per_print": 2**31,
    }
    if bf16:
        # DeepSpeed would add up the gradients of micro-batches in bfloat16.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    if train.compile:
        engine.compile()
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
