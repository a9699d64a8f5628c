"""What a stage and what a check return."""

from dataclasses import dataclass
from typing import Literal

from fm_core.config import Section


class StageResult(Section):
    """A small record of a finished stage; the files it names are the truth."""

    stage: str
    """shard, train, sample, evaluate or report."""
    state: Literal["done", "verified"]
    """done: something was made now; verified: everything was there already and is whole."""
    seconds: float
    """Wall time of this call."""
    summary: str
    """One line for a person, e.g. "1,297 + 500 images in 2 shards"."""
    paths: dict[str, str] = {}
    """Name -> path or URL of what was made."""
    counts: dict[str, float] = {}
    """Name -> number, e.g. {"images": 1000}."""
    hashes: dict[str, str] = {}
    """Name -> hash, e.g. {"data": "..."}."""


@dataclass(frozen=True)
class Check:
    """One line of `fm doctor`."""

    name: str
    """What was looked at."""
    ok: bool
    """Whether it works here."""
    detail: str
    """What was found, in one line; if not ok, what would be right."""
