"""The run directory: status, lock, completion, launching."""
