"""Samples and a model to scores."""

import time
from collections.abc import Callable
from os import cpu_count
from typing import Any

import torch
from torch import Tensor

from fm_core.config import RunConfig
from fm_core.data.manifest import Manifest, load_manifest
from fm_core.errors import UserError
from fm_core.evaluation.extractor import RECIPE, Extractor, data_set_extractor, first_images
from fm_core.evaluation.likelihood import data_set_bits
from fm_core.evaluation.reference import reference_moments
from fm_core.evaluation.scores import frechet_record, likelihood_record, recognition_record
from fm_core.evaluation.threads import cpu_threads
from fm_core.run.directory import RunDirectory, environment, fingerprint
from fm_core.run.files import read_json, write_json
from fm_core.run.launch import device_count, world
from fm_core.run.progress import Observer, Progress, unobserved
from fm_core.sampling.model import Model, checkpoint_step, load_model, weights_file
from fm_core.sampling.store import SampleSet, protocol_of
from fm_core.stages.phases import Phases
from fm_core.stages.record import recorded
from fm_core.stages.result import StageResult

HELD_OUT_IMAGES = 50_000
CLASSIFIER = "training the classifier"
REFERENCE = "features of the training images"
SAMPLES = "features of the samples"
LIKELIHOOD = "bits per dimension of held-out images"
LEAST_IMAGES = 4


def evaluate(config: RunConfig, observe: Observer = unobserved) -> StageResult:
    """Score the samples of the configuration; scores that are there for the same protocol are kept.

    Raises UserError if the samples are not complete, are of another data set, or the data set has
    no labels to train the classifier on.
    """
    with cpu_threads(world(config.launch)[1] if device_count() == 0 else cpu_count() or 1):
        return recorded("evaluate", config, observe, lambda run, show: _evaluate(config, run, show))


def _evaluate(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest = load_manifest(config.data.root, config.data.name)
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), device)
    samples = SampleSet(config, step, protocol_of(config, model.weights_sha256))
    done = samples.done()
    if min(samples.images, manifest.splits["val"].images) < LEAST_IMAGES:
        raise UserError(
            f"a Fréchet distance and its error need at least {LEAST_IMAGES} samples and held-out images; "
            "see sample.images and data.validation_images"
        )
    if done is None:
        raise UserError(f"{samples.store.url} is not complete; run fm sample first")
    if model.data_version != manifest.version:
        raise UserError(
            f"{run.checkpoints} was trained on version {model.data_version[:12]} of the data; "
            f"{config.data.name} is now {manifest.version[:12]}"
        )
    judged_by = [config.evaluate.model_dump(mode="json"), manifest.version, RECIPE]
    key = f"{samples.key}-{fingerprint(judged_by)[:6]}"
    path = run.evaluation(step, key)
    scores = read_json(path)
    state = "verified" if scores else "done"
    if scores is None:
        phases = Phases("evaluate", observe, _weights(config, manifest))
        extractor = data_set_extractor(config.data.root, manifest, device, _classifier_progress(phases))
        scores = _scores(config, manifest, model, samples, extractor, device, phases)
        scores["nfe"] |= {"mean": done["nfe"]["mean"], "batch_size": done["nfe"]["batch_size"]}
        write_json(path, {**scores, "seconds": round(time.monotonic() - began, 3)})
    observe(Progress("evaluate", 100, 100, "%", summary(scores)))
    return StageResult(
        stage="evaluate",
        state=state,
        seconds=0.0,
        summary=summary(scores),
        paths={"scores": str(path)},
        counts=_counts(scores),
        hashes={"features": scores["protocol"]["features_sha256"]},
    )


def summary(scores: dict[str, Any]) -> str:
    """The scores in one line."""
    frechet, held_out = scores["frechet_distance"], scores["frechet_distance_of_held_out"]
    known = scores["recognised"]
    line = (
        f"Fréchet distance ({frechet['features']} features, {frechet['images']} images) "
        f"{frechet['value']:.2f} ± {frechet['stderr']:.2f}, real held-out images {held_out['value']:.2f}; "
        f"{known['value']:.1%} recognised (real: {known['held_out']:.1%}); NFE {scores['nfe']['mean']:.0f}"
    )
    bits = scores.get("bits_per_dim")
    return line + (f"; {bits['value']:.3f} ± {bits['stderr']:.3f} bits/dim" if bits else "")


def _scores(
    config: RunConfig,
    manifest: Manifest,
    model: Model,
    samples: SampleSet,
    extractor: Extractor,
    device: torch.device,
    phases: Phases,
) -> dict[str, Any]:
    total = manifest.splits["train"].images
    reference = reference_moments(
        config.data.root,
        manifest,
        extractor,
        lambda n: phases.at(REFERENCE, n, total, "images"),
    )
    features, probabilities = _read_samples(samples, model, extractor, phases)
    real, labels = first_images(config.data.root, manifest, "val", HELD_OUT_IMAGES)
    real_features, real_probabilities = extractor(real)
    # The distance falls with the number of images: only equal numbers compare.
    equal = min(len(features), len(real_features))
    scores: dict[str, Any] = {
        "protocol": _protocol(config, manifest, samples, extractor),
        "step": model.step,
        "images_seen": model.images_seen,
        "frechet_distance": frechet_record(features[:equal], reference, extractor),
        "frechet_distance_of_held_out": frechet_record(real_features[:equal], reference, extractor),
        "recognised": recognition_record(probabilities, real_probabilities),
        "classifier": {"held_out_accuracy": extractor.held_out_accuracy, "held_out_images": len(real)},
        "nfe": {
            key: samples.protocol[key]
            for key in ("solver", "rtol", "atol", "steps")
            if key in samples.protocol
        },
    }
    wanted = min(config.evaluate.likelihood.images, len(real))
    if wanted:

        def on_images(done: int) -> None:
            phases.at(LIKELIHOOD, done, wanted, "images")

        on_images(0)
        pixels, settings, seed = real[:wanted], config.evaluate.likelihood, config.sample.seed
        result = data_set_bits(model, pixels, labels[:wanted], settings, seed, device, on_images)
        scores["bits_per_dim"] = likelihood_record(result)
    return scores


def _read_samples(
    samples: SampleSet, model: Model, extractor: Extractor, phases: Phases
) -> tuple[Tensor, Tensor]:
    features: list[Tensor] = []
    probabilities: list[Tensor] = []
    for batch in samples.read(model.image_shape):
        one, other = extractor(batch)
        features.append(one)
        probabilities.append(other)
        phases.at(SAMPLES, sum(map(len, features)), samples.images, "images")
    return torch.cat(features), torch.cat(probabilities)


def _protocol(
    config: RunConfig, manifest: Manifest, samples: SampleSet, extractor: Extractor
) -> dict[str, Any]:
    versions = environment()["versions"]
    likelihood = config.evaluate.likelihood
    return {
        **samples.protocol,
        "data": manifest.name,
        "data_version": manifest.version,
        "preprocessing": manifest.recipe,
        "reference_split": "train",
        "held_out_split": "val",
        "levels": manifest.levels,
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        **({"likelihood": likelihood.model_dump(mode="json")} if likelihood.images else {}),
        "versions": {name: versions[name] for name in ("torch", "torchdiffeq", "numpy") if name in versions},
    }


def _counts(scores: dict[str, Any]) -> dict[str, float]:
    counts = {
        "frechet_distance": scores["frechet_distance"]["value"],
        "frechet_distance_of_held_out": scores["frechet_distance_of_held_out"]["value"],
        "recognised": scores["recognised"]["value"],
        "recognised_of_held_out": scores["recognised"]["held_out"],
        "classifier_accuracy": scores["classifier"]["held_out_accuracy"],
        "nfe": scores["nfe"]["mean"],
    }
    return counts | ({"bits_per_dim": scores["bits_per_dim"]["value"]} if "bits_per_dim" in scores else {})


def _weights(config: RunConfig, manifest: Manifest) -> dict[str, float]:
    """About how long each part takes, in steps of the classifier."""
    likelihood = config.evaluate.likelihood
    return {
        CLASSIFIER: 500,
        REFERENCE: manifest.splits["train"].images / 50,
        SAMPLES: config.sample.images / 50,
        LIKELIHOOD: 10 * likelihood.images * likelihood.draws,
    }


def _classifier_progress(phases: Phases) -> Callable[[int, int, float], None]:
    return lambda step, steps, loss: phases.at(CLASSIFIER, step, steps, f"steps, loss {loss:.3f}")
