"""The sweep section: values of keys whose combinations are sampled and scored, or trained first."""

from typing import Any, Literal

from pydantic import Field, field_validator

from fm_core.config.section import Section

SweepMetric = Literal["frechet_distance", "kernel_distance", "inception_score", "precision", "recall"]


class SweepSection(Section):
    """Points of a sweep, and how the best of them is chosen."""

    axes: dict[str, tuple[Any, ...]] = {}
    """Values by key, e.g. {sample.guidance: [1, 1.5, 2], sample.solver: [euler, heun2]}; a point is a
    combination of one value of each. The values of a section, e.g. sample, are mappings that set several of
    its keys together. Keys of sample and evaluate give samples and scores of this run; those of train, model
    and method, and run.seed, give a new run for each combination."""
    metric: SweepMetric = "frechet_distance"
    """Score by which the best point is chosen: the lowest distance, or the highest other score."""
    check_seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Seed of the fresh samples on which the best point is scored again; by default the number after the
    largest sample.seed of the points."""
    check_images: int | None = Field(default=None, ge=0)
    """Number of fresh samples; by default sample.images, whose distance is comparable with those of the
    points. 0: the best point is not scored again."""

    @field_validator("axes")
    @classmethod
    def _check_axes(cls, axes: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in axes.items():
            if not values:
                raise ValueError(f"sweep.axes: {key} has no values; give a list of at least one")
        return axes
