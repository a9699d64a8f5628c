"""Sweeps: combinations of values of configuration keys, sampled and scored, and the best of them."""
