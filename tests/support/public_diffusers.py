"""Samples of diffusers' schedulers, computed in the virtual environment that has them.

Usage: python -m tests.support.public_diffusers inputs.npz answers.npz

Each scheduler gets the times of our grid as explicit sigmas, and options with which its first and last
steps are ours: solver_type midpoint, a final step of first order (euler_at_final for DPM-Solver++,
lower_order_final for UniPC), and no lower order before it.
"""

import sys

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)

DPM = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
DPM |= {"lower_order_final": False, "euler_at_final": True, "final_sigmas_type": "zero"}
UNIPC = {"solver_order": 2, "solver_type": "bh2", "predict_x0": True}
UNIPC |= {"lower_order_final": True, "final_sigmas_type": "zero"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def network(matrix):
    """The same network for both sides: E[x0 | x_t] at a time."""
    return lambda t, x: torch.tanh(x @ matrix + 3 * t)


def run(scheduler, sigmas, x, predict):
    """Samples from x; `predict` maps (step, x) to what the scheduler takes."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(sigmas) - 1, 0, -1) - 1
    scheduler.set_begin_index(0)
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(step, x), timestep, x).prev_sample
    return x


def ddim(alpha, x, predict, eta=0.0, noise=None):
    """DDIM with a training schedule that has our times, all of which are used."""
    steps = len(alpha) - 1
    scheduler = DDIMScheduler(num_train_timesteps=steps, clip_sample=False, prediction_type="epsilon")
    scheduler.set_timesteps(steps)
    products = torch.tensor(alpha, dtype=torch.float64) ** 2
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = products[:-1].flip(0), products[-1]
    for step in range(steps):
        fresh = None if noise is None else noise[step]
        timestep = steps - 1 - step
        x = scheduler.step(predict(step, x), timestep, x, eta=eta, variance_noise=fresh).prev_sample
    return x


def main(inputs_file, answers_file):
    inputs = {name: torch.from_numpy(value) for name, value in np.load(inputs_file).items()}
    predicted, x, answers = network(inputs["matrix"]), inputs["x"], {}
    t, sigmas = inputs["ot.t"], inputs["ot.sigma"].tolist()

    def flow(step, x):
        """Noise minus data, from x = alpha data + sigma noise."""
        noise = predicted(t[step], x)
        return noise - (x - sigmas[step] * noise) / (1 - sigmas[step])

    for order in (2, 3):
        scheduler = DPMSolverMultistepScheduler(solver_order=order, **DPM, **FLOW)
        answers[f"ot.dpmpp_{order}m"] = run(scheduler, sigmas, x, flow)
    answers["ot.unipc"] = run(UniPCMultistepScheduler(**UNIPC, **FLOW), sigmas, x, flow)

    nu, alpha = inputs["vp.nu"].tolist(), inputs["vp.alpha"].tolist()

    def noise(step, x):
        return predicted(inputs["vp.t"][step], x)

    for order in (2, 3):
        scheduler = DPMSolverMultistepScheduler(solver_order=order, **DPM)
        answers[f"vp.dpmpp_{order}m"] = run(scheduler, nu, x, noise)
    answers["vp.unipc"] = run(UniPCMultistepScheduler(**UNIPC), nu, x, noise)
    answers["vp.ddim"] = ddim(alpha, x, noise)
    answers["vp.sde"] = ddim(alpha, x, noise, 1.0, inputs["noise"])

    scheduler = LMSDiscreteScheduler()
    step_of = scheduler.step
    scheduler.step = lambda output, timestep, x: step_of(output, timestep, x, order=2)
    scheduler.is_scale_input_called = True
    ve = inputs["ve.sigma"].tolist()
    answers["ve.ab2"] = run(scheduler, ve, ve[0] * x, lambda step, x: predicted(inputs["ve.t"][step], x))
    np.savez(answers_file, **{name: value.numpy() for name, value in answers.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
