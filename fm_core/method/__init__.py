"""The mathematics: paths, objectives, couplings, velocity, ODE solving, likelihood.

Time runs from t = 0 (noise, x0) to t = 1 (data, x1): x_t = alpha_t x1 + sigma_t x0. Tensors in, tensors out.
"""
