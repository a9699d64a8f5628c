"""Time of the solvers' own arithmetic, compared with one evaluation of the demo's network.

    python infra/benchmarks/solver_arithmetic.py

The first contender evaluates the U-Net of infra/configs/digits.yaml on a batch. The others take solver steps
with a velocity that costs no time, on a state of the same shape. The ratio is the network's time divided by
a solver's time per evaluation: 20 means that the solver adds 5% to the network's time.
"""

import json
import sys
import time

import torch
from interleaved import ROOT, Contender, make_parser, measure, parse_options, print_result, report

SHAPE = (1, 8, 8)
STEPS = 50
SOLVERS = {
    **{
        name: {"method": name} for name in ("midpoint", "ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "ab2", "edm")
    },
    "midpoint-log-snr": {"method": "midpoint", "grid": "log-snr"},
}
CONTENDERS = (
    Contender("network", "one evaluation of the demo's U-Net"),
    *(Contender(name, f"{settings['method']}, per evaluation") for name, settings in SOLVERS.items()),
)


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--batch", type=int, default=250, help="images per batch; 250 is sample.batch")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks per process")
    options = parse_options(parser)
    task = {key: getattr(options, key) for key in ("batch", "blocks")}
    measurements = measure("solver_arithmetic.py", CONTENDERS, options, task)
    goals = dict.fromkeys(SOLVERS, "at least 20")
    report(CONTENDERS, measurements, "network", "seconds an evaluation", options, goals)


def child(task: dict) -> None:
    x = torch.randn(task["batch"], *SHAPE)
    run = network_of_the_demo(x) if task["contender"] == "network" else solver_of(task["contender"], x)
    run()  # warm-up
    seconds = []
    for _ in range(task["blocks"]):
        began = time.perf_counter()
        evaluations = run()
        seconds.append((time.perf_counter() - began) / evaluations)
    print_result(seconds)


def network_of_the_demo(x: torch.Tensor):
    from fm_core.config import load_config
    from fm_core.models.build import build_network

    config = load_config(ROOT / "infra" / "configs" / "digits.yaml")
    network = build_network(config.model, SHAPE, classes=10).eval().requires_grad_(False)
    t = torch.full((len(x),), 0.5)

    def run() -> int:
        network(t, x)
        return 1

    return run


def solver_of(name: str, x: torch.Tensor):
    from fm_core.method.ode import Solver, solve
    from fm_core.method.paths import OptimalTransport
    from fm_core.method.time_grid import grid_of

    settings = {"grid": "uniform", **SOLVERS[name]}
    solver = Solver(settings["method"], steps=STEPS, grid=grid_of(settings["grid"]))
    velocity = torch.randn_like(x)
    return lambda: solve(lambda t, x: velocity, x, (0.0, 1.0), solver, path=OptimalTransport()).nfe


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
