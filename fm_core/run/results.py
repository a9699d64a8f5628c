"""What a self-test or preflight found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of `fm doctor`."""

    name: str
    """What was looked at."""
    ok: bool
    """Whether it works here."""
    detail: str
    """What was found, in one line; if not ok, what would be right."""
