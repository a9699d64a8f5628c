"""Helpers of the tests: fakes, injected faults, small runs and scripts that run in processes of their own."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Repository root: the PYTHONPATH of the processes that tests start."""
