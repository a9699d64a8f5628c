"""One cell of a comparison on images: a plain run from training to scores, and what the page shows of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_core.config import ImagesSection, RunConfig, parse_config
from fm_core.evaluation.torch_threads import cpu_threads
from fm_core.launch.dispatch import world
from fm_core.method.ode import Solver
from fm_core.reproduce.experiments import Experiment
from fm_core.run.artifact_cache import ArtifactCache
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Observer, Progress
from fm_core.sampling.checkpoint_source import checkpoint_step, checkpoint_steps, load_model, weights_file
from fm_core.sampling.generate import Draw, generate
from fm_core.sampling.sample_store import SampleSet, protocol_of
from fm_core.stages.evaluate import evaluate
from fm_core.stages.sample import sample
from fm_core.stages.train import train
from fm_core.storage.atomic_files import read_json
from fm_core.training.lr_schedule import crossed

SHARES = {"train": 600, "curves": 200, "sample": 100, "evaluate": 80, "pictures": 20}
"""Parts of a cell's work, for the progress bar."""
PARTS = sum(SHARES.values())
OnParts = Callable[[int, str], None]
"""Hears how many of PARTS are done, and what is done now."""


def run_experiment(cell: Experiment, settings: ImagesSection, on_parts: OnParts) -> dict[str, Any]:
    """Make one run or find it made; its record for results.json.

    Raises UserError, StopRequested and RuntimeError as the stages do.
    """
    trained = train(cell.config, _part("train", cell, on_parts))
    observe = _part("curves", cell, on_parts)
    curve = _curve(cell, settings.curve_images, observe) if settings.curve_images else []
    drawn = sample(cell.config, _part("sample", cell, on_parts))
    scored = evaluate(cell.config, _part("evaluate", cell, on_parts))
    pictures, ways = _pictures(cell, settings), _ways(cell, drawn.hashes["weights"])
    on_parts(PARTS, f"{cell.title}: pictures")
    return {
        "cell": cell.section.name,
        "title": cell.title,
        "run": cell.name,
        "seed": cell.seed,
        "steps": int(trained.counts["steps"]),
        "images_seen": int(trained.counts["images_seen"]),
        "fewer_steps": cell.section.steps is not None,
        "scores": read_json(Path(scored.paths["scores"])) or {},
        "while_training": curve,
        "pictures_sha256": pictures,
        **({"trajectories_sha256": ways} if ways else {}),
    }


def sample_images_of(cell: Experiment) -> dict[str, Tensor]:
    """What a made cell has to show.

    `images` uint8 [budgets, n, C, H, W], samples at few evaluations; `levels`, the number of grey levels;
    and where samples keep their way from noise, `trajectory` uint8 [T, n, C, H, W].
    """
    kept = _kept(cell.config)
    ways = kept.tensors("trajectories") if kept.read("trajectories", "trajectories") else {}
    return {**kept.tensors("pictures"), **ways}


def _curve(cell: Experiment, images: int, observe: Observer) -> list[dict[str, float]]:
    """Distance and NFE at every checkpoint of the grid; a stop may have saved others."""
    train = cell.config.train
    every, batch = train.checkpoint_images, train.global_batch
    steps = [
        step
        for step in checkpoint_steps(cell.config)
        if crossed(every, step * batch, batch) or step * batch >= train.images
    ]
    points: list[dict[str, float]] = []
    for number, step in enumerate(steps):
        config = _at(cell.config, step, images)
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


def _at(config: RunConfig, step: int, images: int) -> RunConfig:
    """The run seen at one checkpoint, by few images and their distance alone."""
    tree = config.model_dump(mode="json")
    tree["sample"] |= {"step": step, "images": images}
    tree["evaluate"]["likelihood"]["images"] = 0
    tree["evaluate"]["nfe_curve"]["images"] = 0
    tree["evaluate"] |= {"metrics": ["frechet_distance"], "samples": "sampler"}
    return parse_config(tree, where=f"{config.run.name} at step {step}")


def _pictures(cell: Experiment, settings: ImagesSection) -> str:
    """Samples at few evaluations, uint8 [budgets, n, C, H, W], kept in the run; the SHA-256 of their file."""
    step = checkpoint_steps(cell.config)[-1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(weights_file(cell.config, step), device)
    recipe: dict[str, Any] = {
        "weights": model.weights_sha256,
        "nfe": list(settings.shown_nfe),
        "images": settings.shown_images,
        "seed": cell.config.sample.seed,
    }
    kept = _kept(cell.config)
    found = kept.read("pictures", "pictures")
    if found and found.record["recipe"] == recipe:
        return found.tensors_sha256
    with cpu_threads(world(cell.config.launch)[1]):
        drawn = [
            generate(
                model,
                Draw(Solver("midpoint", steps=nfe // 2), cell.config.sample.seed),
                0,
                settings.shown_images,
                device,
            ).images
            for nfe in settings.shown_nfe
        ]
    content = {"images": torch.stack(drawn), "levels": torch.tensor(model.quantizer.levels)}
    return kept.write("pictures", "pictures", {"recipe": recipe}, content).tensors_sha256


def _ways(cell: Experiment, weights_sha256: str) -> str:
    """The way from noise of the first samples, kept in the run; SHA-256 of its file, empty without one."""
    samples = SampleSet(cell.config, checkpoint_step(cell.config), protocol_of(cell.config, weights_sha256))
    recipe = {"weights": weights_sha256, "samples": samples.key, "images": samples.trajectories}
    kept = _kept(cell.config)
    found = kept.read("trajectories", "trajectories")
    if found and found.record["recipe"] == recipe:
        return found.tensors_sha256
    way = samples.trajectory()
    if way is None:
        return ""
    return kept.write("trajectories", "trajectories", {"recipe": recipe}, {"trajectory": way}).tensors_sha256


def _kept(config: RunConfig) -> ArtifactCache:
    return ArtifactCache(RunDirectory(config).path / "pictures")


def _part(name: str, cell: Experiment, on_parts: OnParts) -> Observer:
    """The observer of one part of a cell's work."""
    before = sum(list(SHARES.values())[: list(SHARES).index(name)])

    def show(progress: Progress) -> None:
        message = f"{cell.title}: {progress.stage} {progress.message}".rstrip()
        on_parts(before + int(SHARES[name] * progress.fraction), message)

    return show
