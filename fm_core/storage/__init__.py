"""The ground floor: atomic files, hashes, locks, stores at fsspec URLs, keyed randomness."""
