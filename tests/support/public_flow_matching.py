"""Reference values of torchcfm, flow-matching and POT, computed in the virtual environment that has them.

Usage: python -m tests.support.public_flow_matching inputs.npz answers.npz
"""

import sys

import numpy as np
import ot
import torch
from flow_matching.path import AffineProbPath, CondOTProbPath
from flow_matching.path.scheduler import CondOTScheduler, CosineScheduler, VPScheduler
from flow_matching.solver import ODESolver
from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
    VariancePreservingConditionalFlowMatcher,
)


def main(inputs_file, answers_file):
    inputs = {name: torch.from_numpy(value) for name, value in np.load(inputs_file).items()}
    x0, x1, t, x = inputs["x0"], inputs["x1"], inputs["t"], inputs["x"]
    answers = {}

    def matched(name, matcher):
        answers[f"{name}.x_t"] = matcher.compute_mu_t(x0, x1, t)
        answers[f"{name}.velocity"] = matcher.compute_conditional_flow(x0, x1, t, x)

    matched("torchcfm.straight", ConditionalFlowMatcher(sigma=0.0))
    matched("torchcfm.trigonometric", VariancePreservingConditionalFlowMatcher(sigma=0.0))
    for sigma_min in (0.1, 1e-3):
        matcher = TargetConditionalFlowMatcher(sigma=sigma_min)
        sigma = torch.as_tensor(matcher.compute_sigma_t(t))[:, None]
        x_t = matcher.compute_mu_t(x0, x1, t) + sigma * x0
        answers[f"torchcfm.target.{sigma_min}.x_t"] = x_t
        answers[f"torchcfm.target.{sigma_min}.velocity"] = matcher.compute_conditional_flow(x0, x1, t, x_t)

    schedulers = {
        "ot": CondOTScheduler(),
        "vp": VPScheduler(beta_min=0.1, beta_max=20.0),
        "cosine": CosineScheduler(),
    }
    for name, scheduler in schedulers.items():
        path = AffineProbPath(scheduler=scheduler)
        sample = path.sample(x_0=x0, x_1=x1, t=t)
        answers[f"flow_matching.{name}.x_t"], answers[f"flow_matching.{name}.velocity"] = (
            sample.x_t,
            sample.dx_t,
        )
        column = t[:, None]
        answers[f"flow_matching.{name}.from_data"] = path.target_to_velocity(x_1=x1, x_t=x, t=column)
        answers[f"flow_matching.{name}.from_noise"] = path.epsilon_to_velocity(epsilon=x0, x_t=x, t=column)

    sample = CondOTProbPath().sample(x_0=x0, x_1=x1, t=t)
    answers["flow_matching.condot.velocity"] = sample.dx_t
    _, log_density = ODESolver(
        velocity_model=lambda x, t: torch.tanh(x @ inputs["matrix"]) * (1 + t)
    ).compute_likelihood(
        x_1=x1,
        log_p0=lambda x: torch.distributions.Normal(0, 1).log_prob(x).sum(1),
        step_size=0.02,
        method="rk4",
        exact_divergence=True,
    )
    answers["flow_matching.log_density"] = log_density

    uniform = np.full(len(x0), 1 / len(x0))
    cost = ot.dist(x1.numpy(), x0.numpy(), metric="sqeuclidean")
    answers["pot.plan"] = torch.from_numpy(ot.emd(uniform, uniform, cost) * len(x0))
    np.savez(answers_file, **{name: value.detach().numpy() for name, value in answers.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
