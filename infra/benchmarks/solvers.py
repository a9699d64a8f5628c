"""Sampling throughput of one network against flow-matching's ODESolver and torchcfm's sampling script.

    pip install --no-deps --target peers flow-matching==1.0.10 torchdyn==1.0.6
    python infra/benchmarks/solvers.py --peers peers [--device cuda] [--batch 64] [--size 32] [--repeats 5]

The same weights, noise, tolerances and device for all; torchcfm's script uses torchdyn's NeuralODE for Euler
and torchdiffeq's odeint for dopri5, and so does this. What NeuralODE's package imports and does not use here
(Lightning, torchsde, torchcde, torchvision) is left out. Ours is timed with what it adds: counting, keeping
to the interval, the check for numbers that are not finite. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from data_peers import Absent
from torchdiffeq import odeint

from fm_core.config import MethodSection, ModelSection
from fm_core.method.solve import Solver, solve
from fm_core.models.build import build_method, build_network

UNUSED = ("pytorch_lightning", "torchsde", "torchcde", "torchvision")
STEPS, TOLERANCE = 20, 1e-4


def network_of(size, channels, device):
    """A U-Net whose field has some curvature: random weights, the last layer scaled up from zero."""
    torch.manual_seed(0)
    section = ModelSection(channels=channels, channel_multipliers=(1, 2), attention_resolutions=())
    network = build_network(section, (3, size, size), classes=0)
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    return network.to(device).eval().requires_grad_(False)


def contestants(network):
    """Solver -> name -> function of the noise that gives images."""
    from flow_matching.solver import ODESolver
    from torchdyn.core import NeuralODE

    objective = build_method(MethodSection()).objective
    velocity = objective.velocity(network)

    def field(t, x, *_, **__):
        return network(t.to(x.dtype).expand(len(x)), x)

    theirs = ODESolver(velocity_model=lambda x, t: field(t, x))
    euler = NeuralODE(field, solver="euler", sensitivity="adjoint")
    grid = torch.linspace(0, 1, STEPS + 1)
    ends = torch.linspace(0, 1, 2)
    tolerances = {"rtol": TOLERANCE, "atol": TOLERANCE}
    return {
        f"euler, {STEPS} steps": {
            "ours": lambda x: solve(velocity, x, (0.0, 1.0), Solver("euler", steps=STEPS)).x,
            "flow-matching": lambda x: theirs.sample(x, step_size=1 / STEPS, method="euler"),
            "torchcfm": lambda x: euler.trajectory(x, t_span=grid.to(x))[-1],
        },
        f"dopri5 at {TOLERANCE:g}": {
            "ours": lambda x: solve(velocity, x, (0.0, 1.0), Solver("dopri5", TOLERANCE, TOLERANCE)).x,
            "flow-matching": lambda x: theirs.sample(x, step_size=None, method="dopri5", **tolerances),
            "torchcfm": lambda x: odeint(field, x, ends.to(x), method="dopri5", **tolerances)[-1],
        },
    }


def seconds_of(sample, x):
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        images = sample(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, images


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", required=True, help="folder that pip --target filled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    sys.meta_path.insert(0, Absent(UNUSED))
    sys.path.append(asked.peers)
    network = network_of(asked.size, asked.channels, asked.device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(asked.batch, 3, asked.size, asked.size, generator=generator).to(asked.device)
    found = {}
    for solver, samplers in contestants(network).items():
        seconds, images = {name: [] for name in samplers}, {}
        for repeat in range(asked.repeats + 1):  # the first is for warming up
            for name, sample in samplers.items():
                took, images[name] = seconds_of(sample, noise)
                if repeat:
                    seconds[name].append(took)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        found[solver] = {
            "images_per_s": {name: asked.batch / took for name, took in median.items()},
            "ours_over_theirs": {
                name: took / median["ours"] for name, took in median.items() if name != "ours"
            },
            "largest_difference": {
                name: (images[name] - images["ours"]).abs().amax().item() for name in images if name != "ours"
            },
        }
        print(solver, found[solver], flush=True)
    settings = {"device": asked.device, "batch": asked.batch, "size": asked.size, "channels": asked.channels}
    print(json.dumps({**settings, "threads": torch.get_num_threads(), "torch": torch.__version__, **found}))


if __name__ == "__main__":
    main()
