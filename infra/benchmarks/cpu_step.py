"""Time of a small UNet's training step on a CPU, compared with published image examples.

python infra/benchmarks/cpu_step.py
python infra/benchmarks/cpu_step.py --size small --batch 32
"""

import json
import sys

import torch
from interleaved import (
    WORK,
    Contender,
    make_parser,
    measure,
    parse_options,
    print_result,
    report,
    step_arguments,
)
from peers import peers_python

CONTENDERS = (
    Contender("ours", "fm train's loop, DeepSpeed ZeRO-1, one process"),
    Contender("compiled", "the same with train.speed.compile"),
    Contender("torchcfm", "as in its CIFAR-10 example"),
    Contender("flow-matching", "as in its image example, DDP with one process"),
)
GOALS = {"torchcfm": "at most 1.0", "flow-matching": "at most 1.0"}


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--size", default="digits", choices=("digits", "small"))
    step_arguments(parser, steps=20)
    options = parse_options(parser)
    task = {key: getattr(options, key) for key in ("size", "batch", "warmup", "steps", "blocks")}
    measurements = measure("cpu_step.py", CONTENDERS, options, task, peers_python(WORK / "peers"))
    for base in ("ours", "compiled"):
        if base in measurements:
            others = [item for item in CONTENDERS if item.name == base or item.name in GOALS]
            report(others, measurements, base, "seconds a step", options, GOALS, suffix=f"-{base}")


def child(task: dict) -> None:
    import program
    import same_work

    if task["contender"] in ("ours", "compiled"):
        blocks = program.loop(task, {"compile": task["contender"] == "compiled"})
    else:
        trainer = {"torchcfm": same_work.torchcfm, "flow-matching": same_work.flow_matching}
        blocks = trainer[task["contender"]](task, torch.device("cpu"))
    print_result(blocks, peak_bytes=same_work.peak_bytes(torch.device("cpu")))


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
