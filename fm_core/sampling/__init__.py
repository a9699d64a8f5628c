"""Samples of a trained model by image index, and the public Python API."""
