"""The stages as functions, passed to comparisons and sweeps, which must not import them.

A separate process (reproduce/parallel.py) loads the same functions from the entry point.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Protocol

from fm_core.config import RunConfig
from fm_core.run.progress import Observer, no_progress
from fm_core.run.results import StageResult

Rule = Callable[[], None]
"""Raises UserError with a one-line message if there is a problem."""
Rules = Callable[[RunConfig, Sequence[str]], Iterator[tuple[str, Rule]]]
"""The preflight rules of a configuration for the stages of these names, by name."""


class StageFunction(Protocol):
    """A stage as a function."""

    def __call__(self, config: RunConfig, observe: Observer = no_progress, /) -> StageResult:
        """Run the stage, or verify its existing results."""
        ...


class CheckedModel(Protocol):
    """A model whose samples were checked."""

    def trained_on_noise_of(self, seed: int) -> bool:
        """Whether samples of this seed begin at the noise of the model's training pairs."""
        ...


@dataclass(frozen=True)
class StageFunctions:
    """The stages by name, and their preflight rules."""

    shard: StageFunction
    train: StageFunction
    sample: StageFunction
    evaluate: StageFunction
    rules: Rules
    with_checkpoints: Callable[[RunConfig], RunConfig]
    """Sets the steps of the checkpoints that samples are made from, and makes averages from snapshots."""
    check_samples: Callable[[RunConfig], "CheckedModel"]
    """The model of `with_checkpoints`. Raises UserError if it cannot give the samples of a configuration."""
    entry_point: str
    """`module:attribute` of a function that returns an equal object in another process."""

    @classmethod
    def load(cls, entry_point: str) -> "StageFunctions":
        """Call the function at an entry point and return its result."""
        return resolve_name(entry_point)()
