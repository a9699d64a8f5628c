"""Tiers of the test suite: the default tests, and the extended ones that `infra/test.sh --all` adds.

A test belongs to the extended tier if it uses, directly or through another fixture, one that is named here.
"""

from collections import Counter
from collections.abc import Iterable

import pytest

EXTENDED = {
    "demo": "the demo with its Prefect server and worker",
    "window": "a browser",
    "postgres": "PostgreSQL",
    "pair": "two hosts over ssh",
    "story": "a long story of one run",
    "public_python": "public packages as peers",
    "public_environment": "public packages as peers",
    "benchmark": "benchmarks",
}
"""Fixture -> what it stands for in the summary."""


def tier_of(fixtures: Iterable[str]) -> str | None:
    """What makes a test with these fixtures an extended one; None for a default test."""
    return next((EXTENDED[name] for name in EXTENDED if name in set(fixtures)), None)


def keep_default(items: list[pytest.Item]) -> Counter[str]:
    """Remove extended tests from the items, in place; return how many were removed for each reason."""
    reasons = [tier_of(getattr(item, "fixturenames", ())) for item in items]
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if reason is None]
    return Counter(reason for reason in reasons if reason is not None)


def summary(removed: dict[str, int]) -> str:
    """A line that says what the extended tier would add."""
    parts = ", ".join(f"{what} ({count})" for what, count in sorted(removed.items(), key=lambda x: -x[1]))
    return f"--all adds {sum(removed.values()):,} tests: {parts}"
