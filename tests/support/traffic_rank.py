"""Bytes sent per step under each ZeRO stage, under rank_launch.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fm_core.config import TrainSection
from fm_core.models.mlp import MLP
from fm_core.storage.atomic_files import write_json
from fm_core.training.engine import initialize_process_group, make_engine

# Passes of a ring algorithm over the largest of the tensors.
COLLECTIVES = {
    "all_reduce": 2,
    "all_gather_into_tensor": 1,
    "reduce_scatter_tensor": 1,
    "broadcast": 1,
    "reduce": 1,
}
SENT = {"bytes": 0.0, "inside": 0}


def count(name):
    """Make a collective add up the bytes that this rank sends by it."""
    inner = getattr(dist, name)

    def counted(*arguments, **options):
        if not SENT["inside"]:
            given = [each for each in (*arguments, *options.values()) if isinstance(each, torch.Tensor)]
            size = max((each.numel() * each.element_size() for each in given), default=0)
            ranks = dist.get_world_size()
            SENT["bytes"] += size * COLLECTIVES[name] * (ranks - 1) / ranks
        SENT["inside"] += 1
        try:
            return inner(*arguments, **options)
        finally:
            SENT["inside"] -= 1

    setattr(dist, name, counted)


def sent_in_a_step(device, stage, accumulated, precision="bf16"):
    section = TrainSection.model_validate(
        {
            "global_batch": 8 * accumulated,
            "micro_batch": 4,
            "zero_stage": stage,
            "precision": precision,
        }
    )
    torch.manual_seed(0)
    network = MLP(width=512, layers=4)
    parameters = sum(weight.numel() for weight in network.parameters())
    engine = make_engine(network, section, device)
    for _ in range(3):
        SENT["bytes"] = 0.0
        for _ in range(accumulated):
            t, x = torch.rand(4), torch.randn(4, 2)
            engine.backward((engine(t, x) - x).square().mean())
            engine.step()
    return {"parameters": parameters, "bytes": SENT["bytes"]}


def main():
    for name in COLLECTIVES:
        count(name)
    device = initialize_process_group()
    results = {
        f"{stage}-{accumulated}": sent_in_a_step(device, stage, accumulated)
        for stage in (1, 2, 3)
        for accumulated in (1, 3)
    }
    results["fp32"] = sent_in_a_step(device, 1, 1, "fp32")
    if dist.get_rank() == 0:
        write_json(Path(sys.argv[1]) / "traffic.json", results)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
