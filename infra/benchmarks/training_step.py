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

SPEED = {
    "ours": {"compile": True},
    "ours-channels-last": {"compile": True, "compile_channels_last": True},
    "ours-eager": {},
}
"""train.speed of the program's own loop."""
GOALS = {"reference": "at most 0.50 on an H200", "ours-eager": "below 1"}


def contenders(device: str) -> tuple[Contender, ...]:
    """All sides, as they compute on a device."""
    gpu = device == "cuda"
    loop = f"the program's loop, {'bf16' if gpu else 'float32'}"
    reference = "fp16 autocast, GradScaler" if gpu else "float32"
    return (
        Contender("ours", f"{loop}, compiled"),
        Contender("ours-channels-last", f"{loop}, compiled, with train.speed.compile_channels_last"),
        Contender("ours-eager", f"{loop}, eager"),
        Contender("reference", f"{reference}, DDP, NCHW, eager"),
    )


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    device_arguments(parser, ("imagenet64", "small", "digits"))
    step_arguments(parser, steps=10)
    options = parsed(parser)
    keys = ("device", "size", "batch", "warmup", "steps", "blocks")
    task = {key: getattr(options, key) for key in keys}
    sides = contenders(options.device)
    found = measure("training_step.py", sides, options, task, peers_python(WORK / "peers"))
    report(sides, found, "ours", "seconds a step", options, GOALS)


def child(task: dict) -> None:
    import program
    import same_work

    device = torch.device(task["device"], 0) if task["device"] == "cuda" else torch.device("cpu")
    if task["contender"] == "reference":
        if device.type == "cuda":
            torch.cuda.set_device(device)
        blocks = same_work.flow_matching(task, device)
    else:
        blocks = program.loop(task, SPEED[task["contender"]])
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
