"""Checkpoints: on-disk format, catalog, save and load, upload. No other package knows their file names."""
