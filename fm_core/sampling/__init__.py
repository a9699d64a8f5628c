"""Sampling of trained models by image index, and the public Python API."""
