"""The run directory: status, leases, history, progress, requests to stop."""
