"""What a comparison will take, from its configuration alone: nothing is started and nothing written."""

from dataclasses import dataclass

import torch

from fm_core.config import RunConfig
from fm_core.data.manifest import load_manifest
from fm_core.data.sources import open_source
from fm_core.errors import UserError
from fm_core.reproduce.experiment_cost import (
    ExperimentCost,
    Stated,
    image_experiment_cost,
    toy_experiment_cost,
)
from fm_core.reproduce.experiments import experiments_of, objective_of
from fm_core.reproduce.paper_results import paper_results
from fm_core.reproduce.toy2d.comparison_2d import check
from fm_core.stages.preflight import images_of, rules
from fm_core.training.cost_model import size
from fm_core.training.mfu import peak_tflops

ASSUMED = {"bf16": 989e12, "TF32": 494e12, "float32": 67e12}
"""FLOP/s of an H100 or H200 (SXM, dense), where this machine has no GPU whose peak is known in that type."""
SMALL = 10_000_000
"""Networks of fewer parameters are bound by the starts of their operations and come nowhere near a peak."""
PER = 100
"""Evaluations by which hours are told where nobody knows how many there will be."""
HOUR = 3600
PRECISION = (
    "a peak is that of the training's type; likelihoods are solved in float32, and so are samples unless "
    "sample.precision says otherwise: their hours are a lower bound"
)
HEAD = ("objective", "runs", "steps", "training FLOPs", "training, h", "samples, h", "bits/dim, h")
STORED = ("checkpoints", "samples")


@dataclass(frozen=True)
class Estimate:
    """The cost of a comparison, in words."""

    headline: str
    """All of it in one line."""
    facts: dict[str, str]
    """Name -> what holds for all objectives, and what was assumed."""
    rows: list[tuple[str, ...]]
    """The columns of HEAD and STORED for each objective, and their sum. Hours are those of one device."""

    def text(self) -> str:
        """For a terminal."""
        lines = [self.headline, "", *(f"{name:12} {words}" for name, words in self.facts.items()), ""]
        table = [HEAD + STORED, *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


@dataclass(frozen=True)
class _Objective:
    """One row of the table."""

    title: str
    runs: int
    cost: ExperimentCost
    nfe: float | None
    """Evaluations of dopri5 for a sample, where somebody has told."""


def estimate(
    config: RunConfig,
    peak: float | None = None,
    mfu: float = 0.3,
    images_per_s: float | None = None,
    nfe: float | None = None,
) -> Estimate:
    """Check the configuration of a comparison and say what it takes.

    Args:
        config: of the comparison; its data need not be there.
        peak: FLOP/s of a device; by default this machine's GPU's, if its peak is known, or ASSUMED for the
            type that is trained in; but for networks so small that it says nothing of their time.
        mfu: share of the peak that goes into the network's operations.
        images_per_s: that one device trains on, measured, in place of peak and mfu.
        nfe: evaluations of the network that dopri5 takes for an image; by default the paper's where its
            table has the data set, and otherwise unknown.

    Raises:
        UserError: the comparison cannot be run so, or a number above makes no sense.
    """
    stated = Stated(peak, mfu, images_per_s, nfe)
    objectives = (_of_plane if config.reproduce.kind == "plane" else _of_images)(config, nfe)
    first, thing = objectives[0].cost, "point" if config.reproduce.kind == "plane" else "image"
    device = "as stated"
    if not peak and first.parameters >= SMALL:
        known, device = _peak_here(config)
        stated = Stated(known, mfu, images_per_s, nfe)
    speed = stated.flops_per_s(first.training_flops)
    rate = f"{speed / first.training_flops:,.0f} {thing}s/s a device" if speed else "unknown throughput"
    facts = {
        "network": f"{first.parameters:,} parameters; {first.forward_flops:.4g} FLOPs forward and "
        f"{first.training_flops:.4g} in training for one {thing}",
        "throughput": f"{rate}: {_throughput(stated, device)}",
        "NFE": _nfe(objectives, nfe),
        **({"precision": PRECISION, "data set": _data(config)} if thing == "image" else {}),
        "not counted": "features of images, reading data, saving; logs, scores and pages are small",
    }
    rows = [_row(one.title, [one], stated) for one in objectives] + [_row("sum", objectives, stated)]
    *_, training, samples, likelihood, _, _ = rows[-1]
    stored = sum(one.runs * (one.cost.checkpoint_bytes + one.cost.sample_bytes) for one in objectives)
    hours = (
        f"hours of one device, at {rate}: {training} to train, {samples} to sample, {likelihood} for bits/dim"
    )
    headline = (
        f"{config.run.name}: {len(objectives)} objectives, {rows[-1][1]} runs of {first.parameters:,} "
        f"parameters, {size(stored)} of checkpoints and samples; {hours if speed else 'hours unknown'}"
    )
    return Estimate(headline, facts, rows)


def _peak_here(config: RunConfig) -> tuple[float, str]:
    """The peak of a device for the type that is trained in, and whose it is."""
    exact = "TF32" if config.train.speed.tf32 else "float32"
    kind = exact if config.train.precision == "fp32" else "bf16"
    if torch.cuda.is_available() and kind == "bf16":
        name = torch.cuda.get_device_name(0)
        if known := peak_tflops(name):
            return known * 1e12, f"bf16 on this {name}"
    return ASSUMED[kind], f"assumed: {kind} on an H100 or H200"


def _of_images(config: RunConfig, nfe: float | None) -> list[_Objective]:
    shape, classes = images_of(config)
    paper = paper_results(config.data.name) or {}
    seeds = len(config.reproduce.images.seeds)
    found: list[_Objective] = []
    for cell in experiments_of(config)[: len(config.reproduce.cells)]:
        for _, rule in rules(cell.config, ("train", "sample", "evaluate")):
            rule()
        objective = objective_of(cell.section)
        cost = image_experiment_cost(cell.config, config.reproduce.images, objective, shape, classes)
        row = paper.get(cell.title)
        found.append(_Objective(cell.title, seeds, cost, nfe or (row and row[2])))
    return found


def _of_plane(config: RunConfig, nfe: float | None) -> list[_Objective]:
    plane = config.reproduce.plane
    return [
        _Objective(task.label, 1, toy_experiment_cost(plane, task.objective, task.steps), nfe)
        for task in check(config)
    ]


def _data(config: RunConfig) -> str:
    try:
        manifest = load_manifest(config.data.root, config.data.name)
    except UserError:
        facts = open_source(config.data).facts
        channels, height, width = facts.image_shape
        each = channels * height * width
        if facts.images is None:
            return f"unknown: how many images there are; {each:,} bytes each, the shards are not made"
        return f"{size(facts.images * each)}: {facts.images:,} images of {each:,} bytes; not made yet"
    there = sum(shard.bytes for shard in manifest.shards)
    return f"{size(there)} in {len(manifest.shards)} shards, which are there"


def _throughput(stated: Stated, device: str) -> str:
    if stated.images_per_s:
        return "as stated"
    if stated.peak:
        return f"{stated.mfu:.0%} of {stated.peak / 1e12:,.0f} TFLOP/s ({device}; --peak, --mfu)"
    return "so small a network comes nowhere near a device's peak; measure it and say --images-per-s"


def _nfe(objectives: list[_Objective], nfe: float | None) -> str:
    if nfe:
        return f"{nfe:g} evaluations of dopri5 for a sample and for a likelihood, as stated"
    if all(one.nfe for one in objectives):
        told = ", ".join(f"{one.nfe:g}" for one in objectives)
        return (
            f"{told} evaluations of dopri5 for a sample, the paper's at 1e-5; for a likelihood unknown, "
            f"so its hours are for each {PER} evaluations (--nfe)"
        )
    return f"of dopri5 unknown before training: hours that hang on it are for each {PER} evaluations (--nfe)"


def _row(title: str, objectives: list[_Objective], stated: Stated) -> tuple[str, ...]:
    speed = stated.flops_per_s(objectives[0].cost.training_flops)
    totals = [(one.runs * flops if (flops := one.cost.total_training_flops) else None) for one in objectives]
    fixed = sum(one.runs * one.cost.fixed_flops for one in objectives)
    solved = [(one.runs * one.cost.solved_flops(one.nfe or PER), one.nfe) for one in objectives]
    scored = [(one.runs * one.cost.scored_flops(stated.nfe or PER), stated.nfe) for one in objectives]
    return (
        title,
        str(sum(one.runs for one in objectives)),
        f"{sum(one.runs * one.cost.steps for one in objectives):,}",
        _known(totals, 1.0),
        _known(totals, speed and speed * HOUR),
        _hours(fixed, solved, speed),
        _hours(0.0, scored, speed),
        size(sum(one.runs * one.cost.checkpoint_bytes for one in objectives)),
        size(sum(one.runs * one.cost.sample_bytes for one in objectives)),
    )


def _known(flops: list[float | None], unit: float | None) -> str:
    """The sum of what is known in a unit, and of how many it is not."""
    known = [one for one in flops if one is not None]
    if not known or not unit:
        return "unknown"
    unknown = len(flops) - len(known)
    return f"{sum(known) / unit:,.3g}" + (f" + {unknown} unknown" if unknown else "")


def _hours(fixed: float, solved: list[tuple[float, float | None]], speed: float | None) -> str:
    """Hours for operations, and for those that are either whole or only for each PER evaluations."""
    if not speed:
        return "unknown"
    whole = (fixed + sum(flops for flops, nfe in solved if nfe)) / speed / HOUR
    each = sum(flops for flops, nfe in solved if not nfe) / speed / HOUR
    told = ([f"{whole:,.3g}"] if whole or not each else []) + ([f"{each:,.3g} per {PER} NFE"] if each else [])
    return " + ".join(told)
