"""Evaluation: feature extractors, metrics, reference statistics, bits per dimension, NFE curve."""
