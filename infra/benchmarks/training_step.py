"""Time of the ImageNet-64 UNet's training step on one device, compared with a reference trainer.

    python infra/benchmarks/training_step.py                          # on a GPU
    python infra/benchmarks/training_step.py --device cpu --size small --batch 8 --steps 2 --blocks 2

As in flow_matching's image example, the reference uses torchcfm's UNet of the same size, DDP, fp16 autocast
with GradScaler, NCHW, eager mode, and .item() at each step; plain-bf16 is the same in bf16. On a CPU, all
contenders use float32 without autocast. cudnn.benchmark is enabled for all contenders.
"""

import json
import sys
from statistics import median

import torch
from interleaved import (
    WORK,
    Contender,
    device_arguments,
    make_parser,
    measure,
    parse_options,
    print_result,
    report,
    step_arguments,
)
from peers import peers_python

SPEED = {
    "ours": {"compile": True, "cudnn_benchmark": True},
    "ours-channels-last": {"compile": True, "compile_channels_last": True, "cudnn_benchmark": True},
    "ours-eager": {"cudnn_benchmark": True},
    "no-switch": {},
    "compile-only": {"compile": True},
    "not-fused": {"fused_optimizer": False},
}
"""Settings of train.speed for this project's training loop."""
GOALS = {"reference": "at most 0.50 on an H200", "plain-bf16": "below 1", "ours-eager": "below 1"}


def contenders(device: str) -> tuple[Contender, ...]:
    """List all contenders, with the precision that they use on a device."""
    gpu = device == "cuda"
    loop = f"the program's loop, {'bf16' if gpu else 'float32'}"
    reference = "fp16 autocast, GradScaler" if gpu else "float32"
    plain = Contender("plain-bf16", "torchcfm's UNet in bf16 autocast, otherwise like the reference")
    return (
        Contender("ours", f"{loop}, compiled"),
        Contender("ours-channels-last", f"{loop}, compiled, with train.speed.compile_channels_last"),
        Contender("ours-eager", f"{loop}, eager"),
        *((plain,) if gpu else ()),
        Contender("reference", f"{reference}, DDP, NCHW, eager"),
    )


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    device_arguments(parser, ("imagenet64", "small", "digits"))
    step_arguments(parser, steps=10)
    options = parse_options(parser)
    keys = ("device", "size", "batch", "warmup", "steps", "blocks")
    task = {key: getattr(options, key) for key in keys}
    sides = contenders(options.device)
    measurements = measure("training_step.py", sides, options, task, peers_python(WORK / "peers"))
    report(sides, measurements, "ours", "seconds a step", options, GOALS)
    for name, rows in measurements.items():
        rate, peak = (median(float(str(row[key])) for row in rows) for key in ("images_per_s", "peak_bytes"))
        mfu = [float(str(row["mfu"])) for row in rows if row["mfu"]]
        share = f"MFU {median(mfu):.1%}, " if mfu else ""
        print(f"{name}: {rate:,.1f} images/s, {share}peak memory {peak / 1e9:,.2f} GB")
    print("goals: MFU of ours 40% on an H200; peak memory not above the reference's")


def child(task: dict) -> None:
    import program
    import same_work

    from fm_core.training.mfu import peak_tflops

    device = torch.device(task["device"], 0) if task["device"] == "cuda" else torch.device("cpu")
    losses = {}
    if task["contender"] in ("reference", "plain-bf16"):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        autocast = torch.float16 if task["contender"] == "reference" else torch.bfloat16
        blocks = same_work.flow_matching(task, device, autocast)
    else:
        lines = program.loop_lines(task, SPEED[task["contender"]])
        blocks = program.block_seconds(lines, task)
        losses = {"losses": [after["loss"] for _, after in lines]}
    rate = task["batch"] / median(blocks)
    flops = 3 * program.forward_flops(task["size"]) * rate
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    print_result(
        blocks,
        images_per_s=rate,
        flops_per_s=flops,
        mfu=flops / peak / 1e12 if peak else None,
        peak_bytes=same_work.peak_bytes(device),
        **losses,
    )


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
