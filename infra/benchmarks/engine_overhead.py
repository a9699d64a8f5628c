"""Overhead of the DeepSpeed engine over plain DDP on one machine: 1 and 2 CPU processes with gloo.

    python infra/benchmarks/engine_overhead.py

Both sides use the same UNet, batches, AdamW, clipping and EMA of the weights. One side is this project's
training loop with DeepSpeed ZeRO-1, the other a plain loop with torch's DistributedDataParallel.
"""

import json
import sys

from interleaved import Contender, make_parser, measure, parse_options, print_result, report, step_arguments

CONTENDERS = (
    Contender("zero-1", "the program's loop, DeepSpeed ZeRO-1, 1 process"),
    Contender("ddp", "DistributedDataParallel, 1 process"),
    Contender("zero-1-of-2", "the program's loop, DeepSpeed ZeRO-1, 2 processes", processes=2),
    Contender("ddp-of-2", "DistributedDataParallel, 2 processes", processes=2),
)


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--size", default="digits", choices=("digits", "small"))
    step_arguments(parser, steps=20)
    options = parse_options(parser)
    task = {key: getattr(options, key) for key in ("size", "batch", "warmup", "steps", "blocks")}
    measurements = measure("engine_overhead.py", CONTENDERS, options, task)
    for processes in (1, 2):
        pair = [item for item in CONTENDERS if item.processes == processes and item.name in measurements]
        if len(pair) == 2:
            goals = {pair[1].name: "at most 1.10"}
            report(pair, measurements, pair[0].name, "seconds a step", options, goals, suffix=f"-{processes}")


def child(task: dict) -> None:
    import program

    blocks = program.loop(task) if task["contender"].startswith("zero") else program.plain_ddp(task)
    print_result(blocks)


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
