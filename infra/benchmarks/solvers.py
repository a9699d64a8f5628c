"""Sampling throughput of one network, compared with flow-matching's ODESolver and torchcfm's sampling script.

    python infra/benchmarks/solvers.py                          # on a GPU
    python infra/benchmarks/solvers.py --device cpu --size 16 --channels 16 --batch 8

All contenders use the same weights, noise, tolerances and device, in float32 and eager mode. As in torchcfm's
script, torchdyn's NeuralODE is used for Euler and torchdiffeq's odeint for dopri5. Packages that torchdyn
imports but does not use here (Lightning, torchsde, torchcde, torchvision) are replaced by stubs. Our time
includes the additional operations of our solver: counting, clamping to the interval, and the check for
non-finite numbers.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from interleaved import WORK, Contender, make_parser, measure, parse_options, print_result, report
from peers import peers_python

UNUSED = ("pytorch_lightning", "torchsde", "torchcde", "torchvision")
STEPS, TOLERANCE = 20, 1e-4
SOLVERS = {"euler": f"Euler, {STEPS} steps", "dopri5": f"dopri5 at {TOLERANCE:g}"}
SIDES = {"ours": "solve", "flow-matching": "ODESolver", "torchcfm": "NeuralODE or odeint"}
CONTENDERS = tuple(
    Contender(f"{side}-{solver}", f"{call}, {what}")
    for solver, what in SOLVERS.items()
    for side, call in SIDES.items()
)


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--size", type=int, default=32, help="image size in pixels")
    parser.add_argument("--channels", type=int, default=32, help="channels of the network")
    parser.add_argument("--blocks", type=int, default=3, help="timed batches per process")
    options = parse_options(parser)
    task = {key: getattr(options, key) for key in ("device", "batch", "size", "channels", "blocks")}
    measurements = measure("solvers.py", CONTENDERS, options, task, peers_python(WORK / "peers"))
    for solver in SOLVERS:
        contenders = [item for item in CONTENDERS if item.name.endswith(solver) and item.name in measurements]
        if contenders:
            report(
                contenders, measurements, f"ours-{solver}", "seconds an image", options, suffix=f"-{solver}"
            )
    difference = max(float(str(row["largest_difference"])) for rows in measurements.values() for row in rows)
    print(f"largest difference from our images: {difference:.1e} (data range [-1, 1])")


def child(task: dict) -> None:
    side, _, solver = task["contender"].rpartition("-")
    network = network_of(task["size"], task["channels"], task["device"])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(task["batch"], 3, task["size"], task["size"], generator=generator).to(task["device"])
    samplers = {"ours": ours, "flow-matching": flow_matching, "torchcfm": torchcfm}
    sample = samplers[side](network, solver)
    _, expected = seconds_of(ours(network, solver), noise)
    _, images = seconds_of(sample, noise)  # warm-up
    seconds = [seconds_of(sample, noise)[0] / len(noise) for _ in range(task["blocks"])]
    difference = (images - expected).abs().amax().item()
    print_result(seconds, images_per_s=1 / sorted(seconds)[len(seconds) // 2], largest_difference=difference)


def network_of(size: int, channels: int, device: str) -> torch.nn.Module:
    """U-Net with a curved velocity field: random weights, with zero-initialized layers re-initialized."""
    from fm_core.config import ModelSection
    from fm_core.models.build import build_network

    torch.manual_seed(0)
    section = ModelSection(
        channels=channels, channel_multipliers=(1, 2), attention_resolutions=(), head_channels=channels
    )
    network = build_network(section, (3, size, size), classes=0)
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    return network.to(device).eval().requires_grad_(False)


Sample = Callable[[torch.Tensor], torch.Tensor]
"""Function from noise to images."""


def ours(network: torch.nn.Module, solver: str) -> Sample:
    from fm_core.config import MethodSection
    from fm_core.method.ode import Solver, solve
    from fm_core.models.build import build_method

    velocity = build_method(MethodSection()).objective.velocity(network)
    settings = Solver("euler", steps=STEPS) if solver == "euler" else Solver("dopri5", TOLERANCE, TOLERANCE)
    return lambda x: solve(velocity, x, (0.0, 1.0), settings).x


def flow_matching(network: torch.nn.Module, solver: str) -> Sample:
    from flow_matching.solver import ODESolver

    theirs = ODESolver(velocity_model=lambda x, t: network(t.to(x.dtype).expand(len(x)), x))
    if solver == "euler":
        return lambda x: theirs.sample(x, step_size=1 / STEPS, method="euler")
    tolerances = {"rtol": TOLERANCE, "atol": TOLERANCE}
    return lambda x: theirs.sample(x, step_size=None, method="dopri5", **tolerances)


def torchcfm(network: torch.nn.Module, solver: str) -> Sample:
    from data_peers import Absent
    from torchdiffeq import odeint

    def field(t, x, *_, **__):
        return network(t.to(x.dtype).expand(len(x)), x)

    if solver == "euler":
        sys.meta_path.insert(0, Absent(UNUSED))
        from torchdyn.core import NeuralODE

        euler, grid = NeuralODE(field, solver="euler", sensitivity="adjoint"), torch.linspace(0, 1, STEPS + 1)
        return lambda x: euler.trajectory(x, t_span=grid.to(x))[-1]
    ends = torch.linspace(0, 1, 2)
    return lambda x: odeint(field, x, ends.to(x), method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)[-1]


def seconds_of(sample: Sample, x: torch.Tensor) -> tuple[float, torch.Tensor]:
    began = time.perf_counter()
    with torch.no_grad():
        images = sample(x).cpu()  # waits for the device
    return time.perf_counter() - began, images


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
