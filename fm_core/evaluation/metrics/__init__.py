"""Metrics on features: Fréchet distance, KID, precision and recall, Inception Score."""
