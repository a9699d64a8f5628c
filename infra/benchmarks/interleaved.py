"""Interleaved measurement of contenders, each in its own process, and ratios of their times.

Other load on the machine affects all contenders of a round similarly, so ratios within a round are
meaningful even if times are not. The table shows the median ratio over the rounds, with the minimum and the
maximum.
"""

import argparse
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from fm_core.launch.rank_group import LOOPBACK, rank_group_command

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "benchmarks"


class ChildFailedError(Exception):
    """A measurement process failed; the message is the last error that it printed."""


@dataclass(frozen=True)
class Contender:
    """One contender, shown in one row of the table."""

    name: str
    what: str
    processes: int = 1


def make_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Build a parser with the options common to all benchmarks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of all contenders")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--only", nargs="+", help="names of the contenders to measure")
    parser.add_argument("--json", type=Path, help="file for the measurements; the table is printed")
    return parser


def step_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """Add the options of benchmarks that measure optimizer steps."""
    parser.add_argument("--batch", type=int, default=64, help="images in a step of one process")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first block")
    parser.add_argument("--steps", type=int, default=steps, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks in a process")


def device_arguments(parser: argparse.ArgumentParser, sizes: Sequence[str]) -> None:
    """Add the options of benchmarks that use a GPU by default; the first size is the default."""
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default=sizes[0], choices=sizes)


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options; exit with status 2 if they require a GPU and none is available."""
    import torch

    options = parser.parse_args()
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        parser.exit(
            2, f"{parser.prog}: no GPU here; for a small run: --device cpu (see {parser.prog} --help)\n"
        )
    return options


def measure(
    script: str,
    contenders: Sequence[Contender],
    options: argparse.Namespace,
    task: dict[str, object],
    python: Path | str = sys.executable,
) -> dict[str, list[dict[str, object]]]:
    """Run `script` from this folder for each contender in each round; return the printed results by name."""
    chosen = [item for item in contenders if not options.only or item.name in options.only]
    measurements: dict[str, list[dict[str, object]]] = {item.name: [] for item in chosen}
    for number in range(options.rounds):
        # Rotate the order in each round, so that no contender always follows the same one.
        turn = number % len(chosen)
        for item in chosen[turn:] + chosen[:turn]:
            measurements[item.name].append(child(script, item, options.threads, task, python))
            shown = {key: value for key, value in measurements[item.name][-1].items() if key != "blocks"}
            print(f"round {number + 1} {item.name}: {shown}", file=sys.stderr, flush=True)
    return measurements


def child(
    script: Path | str,
    contender: Contender,
    threads: int,
    task: dict[str, object],
    python: Path | str,
    limit: float | None = None,
) -> dict[str, object]:
    """Run one contender in one process, or in one process per rank, and return its result.

    Raises:
        ChildFailedError: a process failed or printed no result.
        subprocess.TimeoutExpired: the contender took longer than `limit` seconds; its processes are killed.
    """
    command = [str(python)]
    if contender.processes > 1:
        command += rank_group_command([], contender.processes, meet=f"{LOOPBACK}:0")[1:]
    command += [str(HERE / script), json.dumps({**task, "contender": contender.name})]
    inherited = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), *inherited]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        **({} if contender.processes > 1 else single_process_environment()),
        # No contender may use a GPU in a measurement on the CPU.
        **({} if task.get("device") == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    lines = [line for line in output.splitlines() if line.startswith('{"seconds"')]
    if process.returncode or not lines:
        print(errors, file=sys.stderr, flush=True)
        raise ChildFailedError(last_error(errors, process.returncode))
    return json.loads(lines[-1])


def last_error(errors: str, status: int) -> str:
    """Last exception in the standard error of a process, or else its last line, or else its exit status."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b", line)]
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return [f"exit status {status}, no result", *lines[-1:], *exceptions[-1:]][-1]


def single_process_environment() -> dict[str, str]:
    """Environment variables of the only rank of a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def print_result(blocks: Sequence[float], **facts: object) -> None:
    """Print the result of a child process on rank 0: the median seconds over its blocks, and `facts`."""
    if os.environ["RANK"] == "0":
        print(json.dumps({"seconds": statistics.median(blocks), **facts, "blocks": [*blocks]}), flush=True)


def report(
    contenders: Sequence[Contender],
    measurements: dict[str, list[dict[str, object]]],
    base: str,
    unit: str,
    options: argparse.Namespace,
    goals: dict[str, str] | None = None,
    suffix: str = "",
) -> None:
    """Print the table, ratios first, and write the JSON; `base` defaults to the first contender."""
    base = (
        base if base in measurements else next(item.name for item in contenders if item.name in measurements)
    )
    lines = [f"| {base}, time against | ratio | lowest, highest | goal | {unit} |", "|---|---|---|---|---|"]
    for item in contenders:
        if item.name not in measurements:
            continue
        seconds = statistics.median(float(str(row["seconds"])) for row in measurements[item.name])
        ratios = [
            float(str(ours["seconds"])) / float(str(theirs["seconds"]))
            for ours, theirs in zip(measurements.get(base, []), measurements[item.name], strict=False)
        ]
        ratio = f"{statistics.median(ratios):.2f} | {min(ratios):.2f}, {max(ratios):.2f}" if ratios else " | "
        if item.name == base:
            ratio = "1 | "
        goal = (goals or {}).get(item.name, "")
        lines.append(f"| {item.name}: {item.what} | {ratio} | {goal} | {seconds:.4g} |")
    print("\n".join(lines))
    where = options.json or WORK / f"{Path(sys.argv[0]).stem}.json"
    where = where.with_stem(where.stem + suffix)
    where.parent.mkdir(parents=True, exist_ok=True)
    facts = {"contenders": [asdict(item) for item in contenders], "machine": machine(), "found": measurements}
    where.write_text(json.dumps({"command": sys.argv, **facts}, indent=1))
    print(f"\n{where}")


def machine() -> dict[str, object]:
    """Hardware and software versions of this machine."""
    import torch

    names = ("torch", "deepspeed", "torchdiffeq", "numpy")
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "versions": {name: metadata.version(name) for name in names},
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "devices": devices,
    }
