"""Cost estimate of a comparison from its configuration alone; nothing is started or written."""

from dataclasses import dataclass

import torch

from fm_core.config import RunConfig
from fm_core.data.manifest import load_manifest
from fm_core.data.shard_plan import image_shape_and_classes
from fm_core.data.sources import open_source
from fm_core.errors import UserError
from fm_core.reproduce.experiment_cost import (
    Assumptions,
    ExperimentCost,
    image_experiment_cost,
    toy_experiment_cost,
)
from fm_core.reproduce.experiments import experiments_of, seeds_of
from fm_core.reproduce.paper_results import paper_results
from fm_core.reproduce.toy2d.experiment_2d import few_steps_of, toy_experiments
from fm_core.run.stage_functions import Rules
from fm_core.training.cost_model import size
from fm_core.training.mfu import peak_tflops

DEFAULT_PEAK = {"bf16": 989e12, "TF32": 494e12, "float32": 67e12}
"""FLOP/s of an H100 or H200 (SXM, dense), used if this machine has no GPU with a known peak for the type."""
LATENCY_BOUND_PARAMETERS = 10_000_000
"""Smaller networks are bound by kernel launches, so the peak of a device does not predict their speed."""
NFE_UNIT = 100
"""Number of evaluations per which hours are stated if the actual number is unknown."""
SECONDS_PER_HOUR = 3600
PRECISION = (
    "the peak is that of the training's type; likelihoods are solved in float32, and so are samples unless "
    "sample.precision says otherwise: their hours are a lower bound"
)
HEAD = ("objective", "runs", "steps", "training FLOPs", "training, h", "samples, h", "bits/dim, h")
STORED = ("checkpoints", "samples")


@dataclass(frozen=True)
class CostEstimate:
    """The cost of a comparison, as text."""

    headline: str
    """The total cost in one line."""
    facts: dict[str, str]
    """Facts that hold for all objectives, and assumptions, by name."""
    rows: list[tuple[str, ...]]
    """The columns of HEAD and STORED for each objective, and their sum. Hours are for one device."""

    def text(self) -> str:
        """The estimate for a terminal."""
        lines = [self.headline, "", *(f"{name:12} {fact}" for name, fact in self.facts.items()), ""]
        table = [HEAD + STORED, *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


@dataclass(frozen=True)
class _ObjectiveCost:
    """One row of the table."""

    title: str
    runs: int
    cost: ExperimentCost
    nfe: float | None
    """Network evaluations of dopri5 per sample, if known or assumed."""


def estimate(
    config: RunConfig,
    rules: Rules,
    peak: float | None = None,
    mfu: float = 0.3,
    images_per_s: float | None = None,
    nfe: float | None = None,
) -> CostEstimate:
    """Check the configuration of a comparison and estimate its cost.

    Args:
        config: configuration of the comparison; its data need not exist yet.
        rules: the preflight rules of the stages.
        peak: FLOP/s of a device; by default the peak of this machine's GPU, if known, else DEFAULT_PEAK for
            the training data type. Networks bound by latency have no default.
        mfu: fraction of the peak that is spent on the network's operations.
        images_per_s: measured training throughput of one device, instead of peak and mfu.
        nfe: network evaluations per image by dopri5; by default the paper's value if its table contains the
            data set, and otherwise unknown.

    Raises:
        UserError: the configuration is invalid, or a number above is out of range.
    """
    assumptions = Assumptions(peak, mfu, images_per_s, nfe)
    if config.reproduce.kind == "toy2d":
        unit, objectives = "point", _toy_costs(config, nfe)
    else:
        unit, objectives = "image", _image_costs(config, rules, nfe)
    first = objectives[0].cost
    device = "as stated"
    if not peak and first.parameters >= LATENCY_BOUND_PARAMETERS:
        known, device = _device_peak(config)
        assumptions = Assumptions(known, mfu, images_per_s, nfe)
    speed = assumptions.flops_per_s(first.training_flops)
    rate = f"{speed / first.training_flops:,.0f} {unit}s/s a device" if speed else "unknown throughput"
    facts = {
        "network": f"{first.parameters:,} parameters; {first.forward_flops:.4g} FLOPs forward and "
        f"{first.training_flops:.4g} in training for one {unit}",
        "throughput": f"{rate}: {_throughput(assumptions, device)}",
        "NFE": _describe_nfe(objectives, nfe),
        **({"precision": PRECISION, "data set": _describe_data(config)} if unit == "image" else {}),
        "not counted": "feature extraction, reading data, saving; logs, scores and pages are small",
    }
    rows = [_row(objective.title, [objective], speed, nfe) for objective in objectives]
    rows.append(_row("sum", objectives, speed, nfe))
    *_, training, samples, likelihood, _, _ = rows[-1]
    stored = sum(o.runs * (o.cost.checkpoint_bytes + o.cost.sample_bytes) for o in objectives)
    hours = (
        f"hours of one device, at {rate}: {training} to train, {samples} to sample, {likelihood} for bits/dim"
    )
    headline = (
        f"{config.run.name}: {len(objectives)} objectives, {rows[-1][1]} runs of {first.parameters:,} "
        f"parameters, {size(stored)} of checkpoints and samples; {hours if speed else 'hours unknown'}"
    )
    return CostEstimate(headline, facts, rows)


def _device_peak(config: RunConfig) -> tuple[float, str]:
    """The peak of a device for the training data type, and the source of this number."""
    exact = "TF32" if config.train.speed.tf32 else "float32"
    kind = exact if config.train.precision == "fp32" else "bf16"
    if torch.cuda.is_available() and kind == "bf16":
        name = torch.cuda.get_device_name(0)
        if known := peak_tflops(name):
            return known * 1e12, f"bf16 on this {name}"
    return DEFAULT_PEAK[kind], f"assumed: {kind} on an H100 or H200"


def _image_costs(config: RunConfig, rules: Rules, nfe: float | None) -> list[_ObjectiveCost]:
    shape, classes = image_shape_and_classes(config.data)
    paper = paper_results(config.data.name) or {}
    seeds = len(seeds_of(config))
    costs: list[_ObjectiveCost] = []
    for experiment in experiments_of(config)[: len(config.reproduce.cells)]:
        for _, rule in rules(experiment.config, ("train", "sample", "evaluate")):
            rule()
        cost = image_experiment_cost(experiment, config.reproduce, shape, classes)
        row = paper.get(experiment.title)
        costs.append(_ObjectiveCost(experiment.title, seeds, cost, nfe or (row and row[2])))
    return costs


def _toy_costs(config: RunConfig, nfe: float | None) -> list[_ObjectiveCost]:
    toy = config.reproduce.toy2d
    return [
        _ObjectiveCost(
            e.label, 1, toy_experiment_cost(toy, e.objective, e.steps, few_steps_of(config, e), e.pairs), nfe
        )
        for e in toy_experiments(config)
    ]


def _describe_data(config: RunConfig) -> str:
    try:
        manifest = load_manifest(config.data.root, config.data.name)
    except UserError:
        facts = open_source(config.data).facts
        channels, height, width = facts.image_shape
        each = channels * height * width
        if facts.images is None:
            return f"unknown number of images of {each:,} bytes; the shards are not written yet"
        return f"{size(facts.images * each)}: {facts.images:,} images of {each:,} bytes; not written yet"
    total = sum(shard.bytes for shard in manifest.shards)
    return f"{size(total)} in {len(manifest.shards)} shards, already written"


def _throughput(assumptions: Assumptions, device: str) -> str:
    if assumptions.images_per_s:
        return "as stated"
    if assumptions.peak:
        return f"{assumptions.mfu:.0%} of {assumptions.peak / 1e12:,.0f} TFLOP/s ({device}; --peak, --mfu)"
    return "a network this small does not come near a device's peak: measure it and pass --images-per-s"


def _describe_nfe(objectives: list[_ObjectiveCost], nfe: float | None) -> str:
    if nfe:
        return f"{nfe:g} evaluations of dopri5 per sample and per likelihood, as stated"
    if all(objective.nfe for objective in objectives):
        numbers = ", ".join(f"{objective.nfe:g}" for objective in objectives)
        return (
            f"{numbers} evaluations of dopri5 per sample, the paper's at 1e-5; unknown for a likelihood, "
            f"so its hours are per {NFE_UNIT} evaluations (--nfe)"
        )
    return (
        f"of dopri5 unknown before training: hours that depend on it are per {NFE_UNIT} evaluations (--nfe)"
    )


def _row(
    title: str, objectives: list[_ObjectiveCost], speed: float | None, nfe: float | None
) -> tuple[str, ...]:
    """The columns of HEAD and STORED, summed over objectives; `speed` is in operations per second."""
    training = [o.runs * flops if (flops := o.cost.total_training_flops) else None for o in objectives]
    fixed = sum(o.runs * o.cost.fixed_flops for o in objectives)
    solved = [(o.runs * o.cost.solved_flops(o.nfe or NFE_UNIT), o.nfe) for o in objectives]
    scored = [(o.runs * o.cost.scored_flops(nfe or NFE_UNIT), nfe) for o in objectives]
    return (
        title,
        str(sum(o.runs for o in objectives)),
        f"{sum(o.runs * o.cost.steps for o in objectives):,}",
        _sum_of_known(training, 1.0),
        _sum_of_known(training, speed and speed * SECONDS_PER_HOUR),
        _hours(fixed, solved, speed),
        _hours(0.0, scored, speed),
        size(sum(o.runs * o.cost.checkpoint_bytes for o in objectives)),
        size(sum(o.runs * o.cost.sample_bytes for o in objectives)),
    )


def _sum_of_known(flops: list[float | None], unit: float | None) -> str:
    """The sum of the known costs in a unit, and the number of unknown costs."""
    known = [cost for cost in flops if cost is not None]
    if not known or not unit:
        return "unknown"
    unknown = len(flops) - len(known)
    return f"{sum(known) / unit:,.3g}" + (f" + {unknown} unknown" if unknown else "")


def _hours(fixed: float, solved: list[tuple[float, float | None]], speed: float | None) -> str:
    """Hours for operations. Costs with an unknown number of evaluations are stated per NFE_UNIT of them."""
    if not speed:
        return "unknown"
    total = (fixed + sum(flops for flops, nfe in solved if nfe)) / speed / SECONDS_PER_HOUR
    per_unit = sum(flops for flops, nfe in solved if not nfe) / speed / SECONDS_PER_HOUR
    terms = [f"{total:,.3g}"] if total or not per_unit else []
    return " + ".join([*terms, *([f"{per_unit:,.3g} per {NFE_UNIT} NFE"] if per_unit else [])])
