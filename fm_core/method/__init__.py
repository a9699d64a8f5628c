"""The mathematics of flow matching: tensors in, tensors out.

Conventions, stated here once: t = 0 is noise, t = 1 is data, and x_t = alpha_t x1 + sigma_t x0 with
x0 ~ N(0, I). x0, x1 and x_t are [N, ...], t is [N] or a scalar, a label is int64 [N] or None; a network is
called as network(t, x, label). Time and path arithmetic are float32 or better. Equation numbers are those of
Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747).

* paths, affine: alpha_t, sigma_t, their derivatives and the interval of t.
* objectives, cnf_objective: losses, and the velocity implied by a prediction; cnf_objective has the
  maximum-likelihood objective. compatibility: the paths on which each objective is defined.
* flow_map, meanflow: networks with two times, their displacement and objectives. time_pairs: pairs of times
  in training. forward_derivative: the derivative of a network along a trajectory.
* couplings, minibatch_ot: pairing of x0 with x1. timestep_samplers: the distribution of t in training.
* solver, time_grid: settings of solvers and of their step times. ode: ODE solutions, NFE and trajectories.
  step_loop, multistep_solvers, stochastic_samplers: fixed-step methods on a time grid.
* denoiser: E[x1 | x_t] and E[x0 | x_t] from a velocity. guidance: guidance of a velocity, classifier-free or
  by a weaker model.
* likelihood, divergence: log-densities. bits_per_dim, dequantization: likelihoods of uint8 images.
* registry: lookup of components by configuration name or import path. types: shared type aliases.
"""
