"""Checks of a sweep before anything is spent, and the request for fresh samples of its best point."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fm_core.config import RunConfig, merge, parse_config
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from fm_core.launch.online_eval import MIN_IMAGES
from fm_core.method.solver import EVALUATIONS_PER_STEP
from fm_core.report.html import Table
from fm_core.run.directory import RunDirectory
from fm_core.run.stage_functions import CheckedModel, StageFunctions
from fm_core.sampling.sample_protocol import solver_of
from fm_core.storage.hashing import fingerprint
from fm_core.sweep.sweep_points import SweepPoint, points_of

METRICS = {"precision": "precision_recall", "recall": "precision_recall"}
"""Value of sweep.metric -> entry of evaluate.metrics, where their names differ."""
T = TypeVar("T")
RULE_SECTIONS = {"feature extractors": ("evaluate",), "network": ("model", "data")}
"""Preflight rules that may take long, and the sections that they depend on; equal sections are checked once.
"""


def valid_points(config: RunConfig, stages: StageFunctions) -> list[SweepPoint]:
    """The points of a sweep, after the checks of their configurations; nothing is written.

    Raises:
        UserError: the first problem, with the point that has it.
    """
    points = points_of(config)
    for point in points:
        _at(point, lambda point=point: _check_scores(config, point.config))
    _check_seed(config, points)
    _check_rules(points, stages)
    return points


def checked_points(config: RunConfig, stages: StageFunctions) -> list[SweepPoint]:
    """The points of a sweep, after every check that is possible before the first of them starts.

    Points of the sweep's own run get the number of their checkpoint, so that all of them use the same even if
    training adds one, and averages of new widths are made from the snapshots.

    Raises:
        UserError: as `valid_points`, or a model cannot give the samples of a point.
    """
    points = valid_points(config, stages)
    ready = [
        point
        if point.trained
        else point.with_config(_at(point, lambda p=point: stages.with_checkpoints(p.config)))
        for point in points
    ]
    _check_models(config, ready, stages)
    return ready


def check_seed(config: RunConfig, points: Sequence[SweepPoint]) -> int:
    """Seed of the fresh samples: sweep.check_seed, or the number after the largest seed of the points."""
    if config.sweep.check_seed is not None:
        return config.sweep.check_seed
    return max(point.config.sample.seed for point in points) + 1


def check_point(
    config: RunConfig, best: SweepPoint, points: Sequence[SweepPoint], model: CheckedModel
) -> SweepPoint:
    """The best point with fresh samples: another seed, and so other noise for every image.

    Raises:
        UserError: sweep.check_seed is the seed of the pairs that the model of the best point was trained on;
            the default is never such a seed.
    """
    seed = check_seed(config, points)
    while config.sweep.check_seed is None and model.trained_on_noise_of(seed):
        seed += 1
    _check_noise(model, seed, "sweep.check_seed")
    sample: dict[str, Any] = {"seed": seed}
    if config.sweep.check_images is not None:
        sample["images"] = config.sweep.check_images
    tree = merge(best.config.model_dump(mode="json"), {"sample": sample})
    title = f"fresh samples of {best.title}"
    return SweepPoint(best.values, title, parse_config(tree, where=title), trained=False)


def sweep_dry_run(config: RunConfig, stages: StageFunctions) -> str:
    """List the points of a sweep with their runs and the evaluations for their samples. Raises UserError."""
    points = valid_points(config, stages)
    head = ["point", "run", "images", "evaluations per image"]
    rows = [
        [point.title, point.config.run.name, f"{point.config.sample.images:,}", _evaluations(point.config)]
        for point in points
    ]
    trained = {point.config.run.name for point in points if point.trained}
    images = sum(
        point.config.train.images for point in {p.config.run.name: p for p in points if p.trained}.values()
    )
    lines = [f"{len(points)} points: {sum(p.config.sample.images for p in points):,} samples"]
    lines += [f"{len(trained)} runs are trained first, on {images:,} images in all"] if trained else []
    return "\n".join([Table(head, rows).markdown(), *lines])


def _evaluations(config: RunConfig) -> str:
    """Evaluations of the network per image of a solver with a fixed number of steps."""
    solver = solver_of(config)
    each = (solver.steps or 0) * EVALUATIONS_PER_STEP.get(solver.method, 0)
    if not each:
        return "unknown before sampling"
    if config.sample.guidance == 1:
        return f"{each:,}"
    return f"{each:,} to {2 * each:,}" if config.sample.guidance_interval else f"{2 * each:,}"


def _at(point: SweepPoint, check: Callable[[], T]) -> T:
    """Call a check; its UserError gets the title of the point."""
    try:
        return check()
    except UserError as error:
        raise UserError(f"sweep.axes at {point.title}: {error}") from None


def _check_scores(config: RunConfig, point: RunConfig) -> None:
    metric = config.sweep.metric
    if (name := METRICS.get(metric, metric)) not in point.evaluate.metrics:
        raise UserError(f"sweep.metric {metric} needs {name} in evaluate.metrics")
    if metric == "inception_score" and point.evaluate.features == "dinov2":
        raise UserError("sweep.metric inception_score needs class probabilities, which dinov2 does not have")
    if point.evaluate.samples not in (None, "sampler"):
        raise UserError(
            f"evaluate.samples {point.evaluate.samples}: a sweep scores the samples of its points; remove it"
        )


def _check_seed(config: RunConfig, points: Sequence[SweepPoint]) -> None:
    images, seed = config.sweep.check_images, check_seed(config, points)
    if images == 0:
        return
    if images is not None and images < MIN_IMAGES:
        raise UserError(f"sweep.check_images {images}: scores need at least {MIN_IMAGES} images")
    if seed in {point.config.sample.seed for point in points}:
        raise UserError(
            f"sweep.check_seed {seed} is the seed of samples by which the best point is chosen; name another"
        )
    if seed >= 2**31:
        raise UserError("sweep.check_seed: there is no larger seed than those of the points; choose one")


def _check_rules(points: Sequence[SweepPoint], stages: StageFunctions) -> None:
    """Apply the preflight rules to every point."""
    checked: set[tuple[str, str]] = set()
    for point in points:
        tree = point.config.model_dump(mode="json")
        for name, rule in stages.rules(point.config, ("train", "sample", "evaluate")[not point.trained :]):
            key = name, fingerprint([tree[section] for section in RULE_SECTIONS.get(name, tree)])
            if key not in checked:
                _at(point, rule)
            checked.add(key)
        _at(point, lambda point=point: _check_labels(point.config))
        # A run of an earlier sweep may have the same name and other settings.
        _at(point, RunDirectory(point.config).check_identity)


def _check_labels(config: RunConfig) -> None:
    """Check that a classifier can be trained, if the data set exists."""
    if not config.evaluate.trains_classifier:
        return
    try:
        manifest = load_manifest(config.data.root, config.data.name)
    except UserError:
        return  # the shard stage writes it, or the evaluation says what is missing
    if not manifest.class_count:
        raise UserError(
            f"evaluate.features classifier needs labels, and {config.data.name} has none; name another one"
        )


def _check_models(config: RunConfig, points: Sequence[SweepPoint], stages: StageFunctions) -> None:
    """Check that the model of each point of an existing run supports its samples; each model is read once."""
    checked: set[str] = set()
    for point in points:
        sample = point.config.sample
        guided = sample.guidance != 1
        settings = [sample.seed, sample.weights, sample.step, sample.classes, sample.class_mode, guided]
        settings += [sample.guide.model_dump(mode="json"), sample.guidance_interval] if guided else []
        # The preflight rules check solvers, but not with the objective of a file of weights.
        settings += [sample.solver] if sample.weights.endswith(".safetensors") else []
        key = fingerprint(settings)
        if not point.trained and key not in checked:
            model = _at(point, lambda point=point: stages.check_samples(point.config))
            _at(point, lambda model=model, seed=sample.seed: _check_noise(model, seed, "sample.seed"))
            if (fresh := config.sweep.check_seed) is not None:
                _check_noise(model, fresh, "sweep.check_seed")
        checked.add(key)


def _check_noise(model: CheckedModel, seed: int, key: str) -> None:
    if model.trained_on_noise_of(seed):
        raise UserError(
            f"{key} {seed}: the model was trained on pairs with the noise of this seed; use another"
        )
