"""A training step of the ImageNet-64 UNet on one device, against the reference trainer's way.

    python infra/benchmarks/training_step.py                          # on a GPU
    python infra/benchmarks/training_step.py --device cpu --size small --batch 8 --steps 2 --blocks 2

The reference way: torchcfm's UNet of the same size, DDP, fp16 autocast with GradScaler, NCHW, eager, .item()
at each step, as flow_matching's image example does. On a CPU nobody uses autocast and all is float32.
"""

import json
import sys

import torch
from interleaved import (
    WORK,
    Contender,
    answer,
    arguments,
    device_arguments,
    measure,
    parsed,
    report,
    step_arguments,
)
from peers import peers_python

CONTENDERS = (
    Contender("ours", "the program's loop, bf16, compiled, channels-last"),
    Contender("ours-eager", "the program's loop, bf16, eager"),
    Contender("reference", "fp16 autocast, GradScaler, DDP, NCHW, eager"),
)
GOALS = {"reference": "at most 0.50 on an H200", "ours-eager": "below 1"}


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    device_arguments(parser, ("imagenet64", "small", "digits"))
    step_arguments(parser, steps=10)
    options = parsed(parser)
    keys = ("device", "size", "batch", "warmup", "steps", "blocks")
    task = {key: getattr(options, key) for key in keys}
    found = measure("training_step.py", CONTENDERS, options, task, peers_python(WORK / "peers"))
    report(CONTENDERS, found, "ours", "seconds a step", options, GOALS)


def child(task: dict) -> None:
    import program
    import same_work

    device = torch.device(task["device"], 0) if task["device"] == "cuda" else torch.device("cpu")
    if task["contender"] == "reference":
        if device.type == "cuda":
            torch.cuda.set_device(device)
        blocks = same_work.flow_matching(task, device)
    else:
        fast = task["contender"] == "ours"
        blocks = program.loop(task, speed={"compile": fast, "compile_channels_last": fast})
    median = sorted(blocks)[len(blocks) // 2]
    rate = task["batch"] / median
    flops = 3 * program.forward_flops(task["size"]) * rate
    answer(
        blocks,
        images_per_s=rate,
        flops_per_s=flops,
        mfu_of_989_tflops=flops / 989e12 if device.type == "cuda" else None,
        peak_bytes=same_work.peak_bytes(device),
    )


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
