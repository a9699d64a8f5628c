"""Sampling throughput of one network, compared with flow-matching's ODESolver on an eager fp16 network.

    python infra/benchmarks/sampling.py                              # on a GPU
    python infra/benchmarks/sampling.py --device cpu --size small --batch 4 --blocks 1

Both sides have the same random weights (ours through the converter), so that an adaptive solver follows the
same trajectories. On a CPU, both run in float32 and eager mode; --compile compiles ours. `--batch 0` uses the
largest batch size that fits into GPU memory, the same for both sides.
"""

import json
import sys
import time

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
)
from peers import peers_python

SOLVERS = {"midpoint-20": {"method": "midpoint", "steps": 20}, "dopri5": {"method": "dopri5"}}


def contenders(device: str, compiled: bool) -> tuple[Contender, ...]:
    """List both sides with each solver, with the precision that they use on a device."""
    ours = f"float32, {'compiled' if compiled else 'eager'}"
    if device == "cuda":
        ours = "bf16 network compiled with CUDA graphs, float32 state"
    theirs = f"flow-matching's ODESolver, eager {'fp16' if device == 'cuda' else 'float32'}"
    sides = {"ours": ours, "odesolver": theirs}
    return tuple(
        Contender(f"{side}-{solver}", f"{what}, {solver}")
        for solver in SOLVERS
        for side, what in sides.items()
    )


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    device_arguments(parser, ("imagenet64", "small"))
    parser.add_argument("--batch", type=int, default=0, help="images per batch; 0: as many as fit")
    parser.add_argument("--blocks", type=int, default=3, help="timed batches per process")
    parser.add_argument("--compile", action="store_true", help="compile ours on a CPU, too")
    options = parse_options(parser)
    task = {key: getattr(options, key) for key in ("device", "size", "batch", "blocks", "compile")}
    if options.device == "cpu" and not options.batch:
        parser.error("--batch: 0 is for a GPU only; give a number")
    both = contenders(options.device, options.compile)
    measurements = measure("sampling.py", both, options, task, peers_python(WORK / "peers"))
    for solver in SOLVERS:
        pair = [item for item in both if item.name.endswith(solver) and item.name in measurements]
        if pair:
            goals = {f"odesolver-{solver}": "at most 0.50 on an H200"}
            report(
                pair, measurements, f"ours-{solver}", "seconds an image", options, goals, suffix=f"-{solver}"
            )
            print(", ".join(f"{item.name}: NFE {measurements[item.name][0]['nfe']}" for item in pair))


def child(task: dict) -> None:
    side, _, solver = task["contender"].partition("-")
    device = torch.device(task["device"])
    batch = task["batch"] or largest_batch(task, device)
    sample = sampler(task, side, solver, device, batch)
    sample()
    seconds, evaluations = [], 0
    for _ in range(task["blocks"]):
        began = time.perf_counter()
        evaluations = sample()
        seconds.append((time.perf_counter() - began) / batch)
    print_result(seconds, images_per_s=1 / sorted(seconds)[len(seconds) // 2], batch=batch, nfe=evaluations)


def sampler(task: dict, side: str, solver: str, device: torch.device, batch: int):
    """Return a function that samples one batch of images and returns its NFE."""
    import same_work

    torch.manual_seed(0)
    public = same_work.reference_network(task["size"])
    with torch.no_grad():
        for weight in public.parameters():  # many weights are initialized to zero
            weight.add_(0.02 * torch.randn_like(weight))
    x = torch.randn(batch, *same_work.SIZES[task["size"]]["shape"]).to(device)
    make = ours if side == "ours" else odesolver
    return make(task, public, x, SOLVERS[solver])


def ours(task: dict, public: torch.nn.Module, x: torch.Tensor, solver: dict):
    from same_work import SIZES, model_section

    from fm_core.config import MethodSection, SampleSection
    from fm_core.method.ode import Solver, solve
    from fm_core.models.adm_weights import from_adm
    from fm_core.models.build import build_method, build_network
    from fm_core.sampling.compiled_network import accelerated

    section = model_section(task["size"])
    if section.kind == "unet":
        section = section.model_copy(update={"time_scale": 1.0})
        network = build_network(section, SIZES[task["size"]]["shape"], 0)
        network.load_state_dict(from_adm(public.state_dict(), network))
    else:
        network = public
    gpu = x.device.type == "cuda"
    graphs = task.get("cuda_graphs", gpu)
    settings = {"batch": len(x), "compile": gpu or task["compile"], "cuda_graphs": graphs}
    settings["precision"] = "bf16" if gpu else "fp32"
    network = accelerated(network.to(x.device).eval(), SampleSection.model_validate(settings))
    objective = build_method(MethodSection()).objective
    velocity = objective.velocity(network, None)

    def sample() -> int:
        solution = solve(velocity, x, (0.0, 1.0), Solver(**solver))
        solution.x.cpu()
        return solution.nfe

    return sample


def odesolver(task: dict, public: torch.nn.Module, x: torch.Tensor, solver: dict):
    from flow_matching.solver import ODESolver
    from flow_matching.utils import ModelWrapper

    class CountingWrapper(ModelWrapper):
        calls = 0

        def forward(self, x, t, **extras):
            self.calls += 1
            with torch.autocast(x.device.type, torch.float16, enabled=x.device.type == "cuda"):
                return self.model(t.expand(len(x)), x).float()

    wrapped = CountingWrapper(public.to(x.device).eval())
    ode_solver = ODESolver(velocity_model=wrapped)
    step = {"step_size": 1 / solver["steps"]} if "steps" in solver else {"step_size": None}
    grid = torch.tensor([0.0, 1.0], device=x.device)

    def sample() -> int:
        wrapped.calls = 0
        method = solver["method"]
        ode_solver.sample(x_init=x, method=method, time_grid=grid, atol=1e-5, rtol=1e-5, **step).cpu()
        return wrapped.calls

    return sample


def largest_batch(task: dict, device: torch.device) -> int:
    """Half of the largest power of two for which the eager float32 network fits in memory, for both sides.

    The other half is reserved for the slopes that a solver stores and for compiled graphs.
    """
    import same_work

    network, batch = same_work.public_unet(task["size"]).to(device).eval(), 32
    while True:
        try:
            x = torch.randn(2 * batch, *same_work.SIZES[task["size"]]["shape"], device=device)
            with torch.no_grad():
                network(torch.rand(len(x), device=device), x)
        except torch.OutOfMemoryError:
            del network
            torch.cuda.empty_cache()
            return batch // 2
        batch *= 2


if __name__ == "__main__":
    child(json.loads(sys.argv[1])) if sys.argv[1:2] and sys.argv[1].startswith("{") else main()
