"""Checkpoints: on-disk format, catalog, save and load, upload. The only room that knows their file names."""
