"""Atomic files, hashes, locks, local paths, stores at fsspec URLs, keyed random numbers."""
