"""Results of stages and of checks."""

from dataclasses import dataclass
from typing import Literal

from fm_core.config import Section


class StageResult(Section):
    """Summary of a finished stage; the files that it names are authoritative."""

    stage: str
    """shard, train, sample, evaluate or report."""
    state: Literal["done", "verified"]
    """done: this call produced something; verified: everything already existed and is intact."""
    seconds: float
    """Wall time of this call."""
    summary: str
    """One line for display, e.g. "1,297 + 500 images in 2 shards"."""
    paths: dict[str, str] = {}
    """Name -> path or URL of each result."""
    counts: dict[str, float] = {}
    """Name -> number, e.g. {"images": 1000}."""
    hashes: dict[str, str] = {}
    """Name -> hash, e.g. {"data": "..."}."""
    notes: dict[str, str] = {}
    """Name -> a line of text, printed below the summary, e.g. {"protocol": "..."}."""


@dataclass(frozen=True)
class Check:
    """One line of `fm doctor`."""

    name: str
    """What was checked."""
    ok: bool
    """Whether it works here."""
    detail: str
    """The finding in one line; if not ok, what would be right."""
