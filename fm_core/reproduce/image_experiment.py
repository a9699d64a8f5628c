"""One experiment on images: a normal run from training to scores, and the images of its page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_core.checkpoint.weights_file import read_recipe
from fm_core.config import ImagesSection, ReproduceSection, RunConfig, parse_config
from fm_core.evaluation.torch_threads import cpu_threads
from fm_core.launch.dispatch import world
from fm_core.method.ode import Solver
from fm_core.reproduce.experiments import Experiment
from fm_core.reproduce.few_steps import few_step_scores
from fm_core.run.artifact_cache import ArtifactCache
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress
from fm_core.run.stage_functions import StageFunction, StageFunctions
from fm_core.sampling.checkpoint_source import checkpoint_step, checkpoint_steps, load_model, weights_file
from fm_core.sampling.generate import Draw, generate
from fm_core.sampling.guide_model import guide_record
from fm_core.sampling.sample_protocol import protocol_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.storage.atomic_files import read_json
from fm_core.storage.keyed_random import generator_of
from fm_core.training.lr_schedule import crossed

PROGRESS_WEIGHTS = {
    "train": 600,
    "curves": 200,
    "sample": 100,
    "evaluate": 80,
    "few evaluations": 100,
    "pictures": 20,
}
"""Parts of an experiment's work, for the progress bar."""
PROGRESS_PARTS = sum(PROGRESS_WEIGHTS.values())
OnProgress = Callable[[int, str], None]
"""Called with the number of finished PROGRESS_PARTS and a message about the current work."""


def run_experiment(
    experiment: Experiment, reproduce: ReproduceSection, on_progress: OnProgress, stages: StageFunctions
) -> dict[str, Any]:
    """Run one experiment, or verify it if it is complete; returns its record for results.json.

    Raises UserError, StopRequested and RuntimeError like the stages.
    """
    config, settings = experiment.config, reproduce.images
    trained = stages.train(config, _stage_observer("train", experiment, on_progress))
    observe = _stage_observer("curves", experiment, on_progress)
    curve = _training_curve(experiment, settings.curve_images, observe, stages.evaluate)
    sampled = stages.sample(config, _stage_observer("sample", experiment, on_progress))
    scored = stages.evaluate(config, _stage_observer("evaluate", experiment, on_progress))
    observe = _stage_observer("few evaluations", experiment, on_progress)
    scores = read_json(Path(scored.paths["scores"])) or {}
    few_steps = few_step_scores(experiment, reproduce.few_steps, scores, observe, stages)
    images_sha256 = _cache_low_nfe_images(experiment, settings)
    trajectories_sha256 = _cache_trajectories(experiment, sampled.hashes["weights"])
    on_progress(PROGRESS_PARTS, f"{experiment.title}: pictures")
    return {
        "cell": experiment.section.name,
        "title": experiment.title,
        "run": experiment.name,
        "seed": experiment.seed,
        "steps": int(trained.counts["steps"]),
        "images_seen": int(trained.counts["images_seen"]),
        "fewer_steps": experiment.section.steps is not None,
        "scores": scores,
        "scores_file": scored.paths["scores"],
        "while_training": curve,
        **({"few_steps": few_steps} if few_steps else {}),
        "pictures_sha256": images_sha256,
        **({"trajectories_sha256": trajectories_sha256} if trajectories_sha256 else {}),
    }


def sample_images_of(experiment: Experiment) -> dict[str, Tensor]:
    """Images of a complete experiment for the page.

    `images` uint8 [budgets, n, C, H, W], samples with few evaluations; `levels`, the number of intensity
    levels; and, if trajectories of samples are saved, `trajectory` uint8 [T, n, C, H, W].
    """
    cache = _image_cache(experiment.config)
    trajectories = cache.tensors("trajectories") if cache.read("trajectories", "trajectories") else {}
    return {**cache.tensors("pictures"), **trajectories}


def _training_curve(
    experiment: Experiment, images: int, observe: Observer, evaluate: StageFunction
) -> list[dict[str, float]]:
    """Distance and NFE at every regular checkpoint (a stop may have saved others); empty for 0 images."""
    if not images:
        return []
    train = experiment.config.train
    every, batch = train.checkpoint_images, train.global_batch
    steps = [
        step
        for step in checkpoint_steps(experiment.config)
        if crossed(every, step * batch, batch) or step * batch >= train.images
    ]
    points: list[dict[str, float]] = []
    for number, step in enumerate(steps):
        config = _checkpoint_config(experiment.config, step, images)
        scores = read_json(Path(evaluate(config).paths["scores"])) or {}
        distance = scores["frechet_distance"]
        points.append(
            {
                "images_seen": scores["images_seen"],
                "frechet_distance": distance["value"],
                "stderr": distance["stderr"],
                "nfe": scores["nfe"]["mean"],
            }
        )
        observe(Progress("reproduce", number + 1, len(steps), "checkpoints"))
    return points


def _checkpoint_config(config: RunConfig, step: int, images: int) -> RunConfig:
    """The configuration that scores one checkpoint of a run: `images` images, Fréchet distance only."""
    tree = config.model_dump(mode="json")
    tree["sample"] |= {"step": step, "images": images}
    tree["evaluate"]["likelihood"]["images"] = 0
    tree["evaluate"]["nfe_curve"]["images"] = 0
    tree["evaluate"] |= {"metrics": ["frechet_distance"], "samples": "sampler", "extractors": []}
    return parse_config(tree, where=f"{config.run.name} at step {step}")


def _cache_low_nfe_images(experiment: Experiment, settings: ImagesSection) -> str:
    """Save samples with few evaluations, uint8 [budgets, n, C, H, W]; returns the SHA-256 of the file."""
    step = checkpoint_steps(experiment.config)[-1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(weights_file(experiment.config, step), device, experiment.config)
    seed = experiment.config.sample.seed
    recipe: dict[str, Any] = {
        "weights": model.weights_sha256,
        "nfe": list(settings.shown_nfe),
        "images": settings.shown_images,
        "seed": seed,
    }
    cache = _image_cache(experiment.config)
    cached = cache.read("pictures", "pictures")
    if cached and cached.record["recipe"] == recipe:
        return cached.tensors_sha256
    with cpu_threads(world(experiment.config.launch)[1]):
        samples = [
            generate(
                model, Draw(Solver("midpoint", steps=nfe // 2), seed), 0, settings.shown_images, device
            ).images
            for nfe in settings.shown_nfe
        ]
    tensors = {"images": torch.stack(samples), "levels": torch.tensor(model.quantizer.levels)}
    return cache.write("pictures", "pictures", {"recipe": recipe}, tensors).tensors_sha256


def _cache_trajectories(experiment: Experiment, weights_sha256: str) -> str:
    """Save the trajectories of the first samples; returns the file's SHA-256, empty if there are none."""
    config = experiment.config
    step = checkpoint_step(config)
    file = weights_file(config, step)
    generator = generator_of(read_recipe(file), str(file))
    protocol = protocol_of(config, weights_sha256, generator, guide_record(config))
    samples = SampleSet(config, step, protocol)
    recipe = {"weights": weights_sha256, "samples": samples.key, "images": samples.trajectories}
    cache = _image_cache(config)
    cached = cache.read("trajectories", "trajectories")
    if cached and cached.record["recipe"] == recipe:
        return cached.tensors_sha256
    trajectory = samples.trajectory()
    if trajectory is None:
        return ""
    tensors = {"trajectory": trajectory}
    return cache.write("trajectories", "trajectories", {"recipe": recipe}, tensors).tensors_sha256


def _image_cache(config: RunConfig) -> ArtifactCache:
    return ArtifactCache(RunDirectory(config).path / "pictures")


def _stage_observer(stage: str, experiment: Experiment, on_progress: OnProgress) -> Observer:
    """The observer of one stage of an experiment."""
    before = sum(list(PROGRESS_WEIGHTS.values())[: list(PROGRESS_WEIGHTS).index(stage)])

    def show(progress: Progress) -> None:
        message = f"{experiment.title}: {progress.stage} {progress.message}".rstrip()
        on_progress(before + int(PROGRESS_WEIGHTS[stage] * progress.fraction), message)

    return show
