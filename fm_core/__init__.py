"""Flow matching: every stage of the pipeline, as functions and as commands, without Prefect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from fm_core.sampling.loaded import Loaded


def load(
    where: str | Path,
    weights: str = "ema",
    step: int | Literal["latest", "best"] = "latest",
    device: torch.device | str | None = None,
) -> Loaded:
    """A trained model, its objective and a sampler; see `fm_core.sampling.loaded.load`."""
    from fm_core.sampling import loaded

    return loaded.load(where, weights, step, device)
