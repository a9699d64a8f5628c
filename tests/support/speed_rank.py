"""20 steps of small networks with each performance option, on forked ranks (forked_ranks.py)."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import nn

from fm_core.config import TrainSection
from fm_core.config.performance import PerformanceSection
from fm_core.models.blocks import ResidualBlock
from fm_core.models.layers import Conditioning, Conv2d, GroupNorm32
from fm_core.models.unet import UNet
from fm_core.storage.atomic_files import write_json
from fm_core.training.engine import compile_options, initialize_process_group, make_engine
from tests.support.trainer_lab import full_weights

STEPS, BATCH = 20, 8
PLAIN = {"fused_optimizer": False, "bucket_elements": 10**9}
SWITCHES = {
    "fused": {"fused_optimizer": True},
    "buckets": {"bucket_elements": 1_000},
    "overlap": {"bucket_elements": 1_000, "overlap": True},
}
ALL = {
    "compile": True,
    "compile_channels_last": True,
    "overlap": True,
    # These two do nothing on a CPU: only their harmlessness is tested there.
    "cudnn_benchmark": True,
    "tf32": True,
}


def small_unet(gradient_checkpointing=False):
    torch.manual_seed(0)
    return UNet(
        image_size=8,
        image_channels=1,
        channels=16,
        channel_multipliers=(1,),
        residual_blocks=1,
        attention_resolutions=(),
        head_channels=16,
        dropout=0.0,
        scale_shift=True,
        resample_with_residual_blocks=True,
        gradient_checkpointing=gradient_checkpointing,
    )


class OneBlock(nn.Module):
    """A residual block between two convolutions: the compiler needs minutes for a UNet on a CPU."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conditioning = Conditioning(16, 64)
        self.first = Conv2d(1, 16)
        self.block = ResidualBlock(16, 16, 64, dropout=0.0, scale_shift=True)
        self.last_norm = GroupNorm32(16)
        self.last = Conv2d(16, 1, zero=True)

    def forward(self, t, x):
        h = x.to(dtype=self.first.weight.dtype, memory_format=torch.channels_last)
        h = self.block(self.first(h), self.conditioning(t, None))
        return self.last(self.last_norm(h, activate=True)).to(x.dtype)


def train(device, speed, make=small_unet, **keys):
    """Losses of all steps and whether activations and weights stayed channels-last."""
    options = {"global_batch": BATCH, "learning_rate": 1e-3, "speed": {**PLAIN, **speed}}
    section = TrainSection.model_validate(options | keys)
    engine = make_engine(make(), section, device)
    layout = set()

    def look(module, inputs, output):
        weight = module.weight.permute(0, 3, 1, 2)
        layout.add(weight.is_contiguous(memory_format=torch.channels_last))
        layout.add(output.is_contiguous(memory_format=torch.channels_last))

    convolutions = [module for module in engine.module.modules() if isinstance(module, Conv2d)]
    hooks = [] if section.speed.compile else [module.register_forward_hook(look) for module in convolutions]
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    torch._dynamo.utils.counters.clear()
    for _ in range(STEPS):
        t = torch.rand(BATCH // dist.get_world_size(), generator=generator)
        x = torch.randn(len(t), 1, 8, 8, generator=generator)
        loss = (engine(t, x) - x).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    for hook in hooks:
        hook.remove()
    weights = full_weights(engine)
    return {
        "losses": losses,
        "layout": sorted(layout),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "breaks": [*torch._dynamo.utils.counters["graph_break"]],
        "norm": sum(weight.double().square().sum().item() for weight in weights.values()),
    }


def compile_once():
    """Rank 0 compiles for all; the others find it in the compiler's cache."""
    if dist.get_rank() == 0:
        network = OneBlock()
        section = PerformanceSection.model_validate(ALL)
        network.compile(fullgraph=True, **compile_options(section))
        n = BATCH // dist.get_world_size()
        (network(torch.rand(n), torch.randn(n, 1, 8, 8))).square().mean().backward()
    dist.barrier()


def main(path):
    folder = Path(path)
    device = initialize_process_group()
    results = {f"zero-{stage}": train(device, {}, zero_stage=stage) for stage in (1, 2, 3)}
    results["one block"] = train(device, {}, OneBlock)
    results["imported"] = sorted({"torch._inductor.compile_fx", "torchdiffeq", "scipy"} & {*sys.modules})
    compile_once()
    results["all"] = train(device, ALL, OneBlock)
    results |= {name: train(device, speed) for name, speed in SWITCHES.items()}
    results["overlap-2"] = train(device, SWITCHES["overlap"], zero_stage=2)
    results["checkpointing"] = train(device, {}, partial(small_unet, True), gradient_checkpointing=True)
    results["bf16"] = train(device, {}, precision="bf16")
    results["bf16-overlap"] = train(device, SWITCHES["overlap"], precision="bf16")
    results["one block, bf16"] = train(device, {}, OneBlock, precision="bf16")
    results["bf16-all"] = train(device, ALL, OneBlock, precision="bf16")
    if dist.get_rank() == 0:
        write_json(folder / "results.json", results)
    dist.barrier()
