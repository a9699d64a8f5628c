"""The mathematics of flow matching: tensors in, tensors out.

Conventions, stated here once: t = 0 is noise, t = 1 is data, and x_t = alpha_t x1 + sigma_t x0 with
x0 ~ N(0, I). x0, x1 and x_t are [N, ...], t is [N] or a scalar, a label is int64 [N] or None; a network is
called as network(t, x, label). Time and path arithmetic are float32 or better. Equation numbers are those of
Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747).

* paths, affine: alpha_t, sigma_t, their derivatives and the interval of t.
* objectives, cnf_objective: losses, and the velocity that a prediction stands for; the second is the
  maximum-likelihood objective. compatibility: which objective is defined on which path.
* couplings, minibatch_ot: which x0 goes with which x1. timestep_samplers: the distribution of t in training.
* solver, time_grid: solvers and the times of their steps, with all settings. ode: solutions, NFE and
  trajectories. step_loop, multistep_solvers, stochastic_samplers: fixed steps on a grid.
* denoiser: E[x1 | x_t] and E[x0 | x_t] from a velocity. guidance: classifier-free guidance of a velocity.
* likelihood, divergence: log-densities. bits_per_dim, dequantization: the same for uint8 images.
* registry: parts by their names in configuration files, or by import path. types: shared type aliases.
"""
