"""The evaluate stage: scores of samples and of the model."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fm_core.config import RunConfig
from fm_core.errors import StopRequested, UserError
from fm_core.evaluation.dataset_likelihood import combine, write_bits
from fm_core.evaluation.evaluation_run import CHECK, CURVE, LIKELIHOOD, SAMPLES, VALIDATION, EvaluationRun
from fm_core.evaluation.features.extractor_set import outputs_of
from fm_core.evaluation.further_scores import further_records
from fm_core.evaluation.memorization_scores import memorization_records
from fm_core.evaluation.metrics.frechet import frechet_distance_of_features
from fm_core.evaluation.metrics.sampling_error import InfluenceTerms
from fm_core.evaluation.nfe_curve import check_curve, curve_record
from fm_core.evaluation.paired_error import write_terms
from fm_core.evaluation.protocol_scores import protocol_records
from fm_core.evaluation.recognition import class_accuracy_record
from fm_core.evaluation.reference import reference_check
from fm_core.evaluation.reference_statistics import write_statistics
from fm_core.evaluation.run_protocol import run_protocol
from fm_core.evaluation.score_output import statements, write_scores
from fm_core.evaluation.scores import Parts, concatenate, cost_record, image_scores, likelihood_record
from fm_core.evaluation.torch_threads import cpu_threads
from fm_core.launch.dispatch import device_count, world
from fm_core.launch.exit_records import stopped_at
from fm_core.launch.online_eval import MIN_IMAGES
from fm_core.launch.supervisor import StageJob, supervise
from fm_core.report.score_text import summary
from fm_core.run.directory import RunDirectory
from fm_core.run.lease import Lease
from fm_core.run.progress import Observer, Progress, ProgressPhases, no_progress
from fm_core.run.resource_limits import available_cores
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.run.stop_file import mark_stop_handled, pending_request, refuse_pending_request
from fm_core.sampling.checkpoint_source import PINNED_GUIDE, pin_weights, unpin_weights
from fm_core.sampling.guide_model import guide_file, used_guide
from fm_core.sampling.sample_protocol import draw_of
from fm_core.sampling.solver_check import check_guidance
from fm_core.stages.resolve import resolve
from fm_core.storage.atomic_files import read_json, write_json

CLASSIFIER = "training the classifier"
CLASSIFIER_WEIGHT = 25_000.0
"""Approximate cost of training the classifier for the progress bar, in images of feature extraction."""
ODE_OF_FLOW_MAP = "the ODE whose velocity is u(t, t, x), not the flow map"
"""What the likelihood of a model with two times is that of."""
LOCAL_KINDS = frozenset({"debug", "local"})
"""Values of launch.kind with processes on this host; with others, the job runs where training does."""


def evaluate(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Score the samples of the configuration; existing scores of the same protocol are kept.

    Raises:
        UserError: the samples are incomplete or of another data set, or the feature extractor is missing or
            has changed.
        StopRequested: the stage was asked to stop.
        RuntimeError: the job failed.
    """
    config = resolve(config)
    if config.launch.kind == "debug" and config.evaluate.processes not in (None, 1):
        raise UserError(
            f"evaluate.processes {config.evaluate.processes}: launch.kind debug runs one process; "
            "leave it out or set it to 1"
        )
    with cpu_threads(world(config.launch)[1] if device_count() == 0 else available_cores()):
        return run_stage_function("evaluate", config, observe, lambda run, show: _evaluate(config, run, show))


def _evaluate(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    started = time.monotonic()
    if config.evaluate.samples in (None, "sampler"):
        _check_image_count(config.sample.images)
    # All ranks must use the same checkpoint, even if training adds one in the meantime.
    evaluation = EvaluationRun(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = _with_fixed_step(config, evaluation)
    _check_image_count(evaluation.validation_images)
    if evaluation.model:
        model, curve = evaluation.model, config.evaluate.nfe_curve
        check_curve(curve, model.objective, model.coupling, config.sample.guidance)
        if curve.images and not config.sample.guide.named:
            check_guidance(model.objective, config.sample.guidance, "evaluate.nfe_curve")
    run.begin()
    path = run.path / "evaluation" / evaluation.folder / f"{evaluation.key}.json"
    scores = read_json(path)
    state = "verified" if scores else "done"
    if scores is None:
        weights = {CLASSIFIER: CLASSIFIER_WEIGHT, **evaluation.phase_costs()}
        phases = ProgressPhases("evaluate", observe, weights)
        if (
            Lease(run.path / "lock").holder() is None
        ):  # otherwise the request is meant for the job that holds the lease
            refuse_pending_request(run.path, handled_at={run.path: stopped_at(run.path)})
        evaluation.open(_classifier_progress(phases, run))
        _run_parts(config, run, evaluation, phases, observe)
        scores = _scores(evaluation, lambda terms: write_terms(path, terms))
        if LIKELIHOOD in evaluation.tasks:
            write_bits(evaluation.tasks[LIKELIHOOD].read_all(), path.with_suffix(".bits.jsonl"))
        write_json(path, {**scores, "seconds": round(time.monotonic() - started, 3)})
        evaluation.finish()
    if output := config.evaluate.output:
        write_scores(output, read_json(path) or scores)
    if reference_out := config.evaluate.reference_out:
        _write_reference(evaluation, reference_out)
    observe(Progress("evaluate", 100, 100, "%", summary(scores)))
    return StageResult(
        stage="evaluate",
        state=state,
        seconds=0.0,
        summary=summary(scores),
        paths={"scores": str(path)},
        counts=_counts(scores),
        hashes={"features": scores["protocol"]["features_sha256"]},
        notes=statements(scores),
    )


def _check_image_count(images: int) -> None:
    if images < MIN_IMAGES:
        raise UserError(
            f"a Fréchet distance and its error need at least {MIN_IMAGES} samples and validation images; "
            "see sample.images and data.validation_images"
        )


def _with_fixed_step(config: RunConfig, evaluation: EvaluationRun) -> RunConfig:
    if config.sample.step not in ("latest", "best") or not evaluation.of_model:
        return config
    return config.model_copy(update={"sample": config.sample.model_copy(update={"step": evaluation.step})})


def _run_parts(
    config: RunConfig, run: RunDirectory, evaluation: EvaluationRun, phases: ProgressPhases, observe: Observer
) -> None:
    """Compute all parts, in this process or in several that share them."""
    tasks = evaluation.tasks.values()
    local = config.launch.kind in LOCAL_KINDS
    processes = config.evaluate.processes or (_default_processes(config) if local else None)
    if processes != 1 and any(task.missing() for task in tasks):
        launch = config.launch.model_copy(update={"processes": processes} if processes else {})
        job = StageJob(
            control=run.path / "evaluation" / evaluation.folder / evaluation.key,
            logs=run.path / "logs",
            stage="evaluate",
            worker="fm_core.evaluation.evaluation_worker:evaluate",
            config=config.model_copy(update={"launch": launch}),
            complete=lambda: not any(task.missing() for task in tasks),
        )
        if evaluation.of_model:
            pin_weights(evaluation.weights, job.control)
        if evaluation.of_model and used_guide(config):
            pin_weights(guide_file(config), job.control, PINNED_GUIDE)
        supervise(job, observe)
        unpin_weights(job.control)
        return
    for task in tasks:
        missing = set(task.missing())
        for number, images in enumerate(task.ranges):
            phases.at(task.phase, images.start, task.images, "images")
            _check_stop(run)
            if number in missing:
                task.run(number)


def _default_processes(config: RunConfig) -> int:
    return 1 if config.launch.kind == "debug" else max(1, device_count())


def _scores(evaluation: EvaluationRun, on_terms: Callable[[InfluenceTerms], None]) -> dict[str, Any]:
    tasks, settings, reference = evaluation.tasks, evaluation.settings, evaluation.reference
    samples, held_out = tasks[SAMPLES].read_all(), tasks[VALIDATION].read_all()
    _check_references(evaluation, held_out)
    scores = image_scores(
        samples,
        held_out,
        reference,
        evaluation.extractor,
        settings,
        evaluation.device,
        classes_in_turn=evaluation.classes_in_turn,
        on_terms=on_terms,
    )
    scores |= _class_accuracy(evaluation, samples)
    scores |= protocol_records(samples, reference, evaluation.extractor, settings, evaluation.device)
    scores |= memorization_records(evaluation, samples, held_out)
    head: dict[str, Any] = {"protocol": run_protocol(evaluation, samples)}
    if evaluation.model:
        head |= {"step": evaluation.model.step, "images_seen": evaluation.model.images_seen}
        scores["nfe"] = cost_record(samples, evaluation.source.protocol)
    if LIKELIHOOD in tasks:
        checks = tasks[CHECK].read_all() if CHECK in tasks else []
        likelihood = settings.likelihood
        result = combine(tasks[LIKELIHOOD].read_all(), checks, likelihood.draws)
        tolerances = {"rtol": likelihood.rtol, "atol": likelihood.atol}
        scores["bits_per_dim"] = likelihood_record(result, tolerances)
        if evaluation.model and evaluation.model.objective.two_times:
            scores["bits_per_dim"]["of"] = ODE_OF_FLOW_MAP
    if CURVE in tasks:
        gaussian = reference.gaussian.to(evaluation.device)
        rows = reference.rows if "kernel_distance" in settings.metrics else None
        parts, curve = tasks[CURVE].read_all(), settings.nfe_curve
        pairs = settings.pair_images
        scores["nfe_curve"] = curve_record(parts, curve, gaussian, evaluation.extractor, rows, pairs)
    scores |= further_records(
        evaluation.extractors,
        samples,
        held_out,
        evaluation.references,
        evaluation.device,
        evaluation.classes_in_turn,
    )
    return {**head, **scores}


def _check_references(evaluation: EvaluationRun, held_out: Parts) -> None:
    """Refuse to score if the distance of real images from a reference differs from the recorded one."""
    device, root = evaluation.device, evaluation.config.data.root
    for number, (settings, extractor) in enumerate(evaluation.extractors.members):
        parts = outputs_of(number, held_out) if number else held_out
        real = torch.cat([part["features"] for part in parts]).to(device)
        gaussian = evaluation.references[number].gaussian.to(device)
        distance = frechet_distance_of_features(real, gaussian)
        reference_check(root, evaluation.manifest, extractor, settings.reference, distance, len(real))


def _write_reference(evaluation: EvaluationRun, file: str) -> None:
    if not file.endswith(".npz"):
        raise UserError(f"evaluate.reference_out {file}: expected the name of an .npz file")
    if not hasattr(evaluation, "extractor"):
        evaluation.open(lambda step, steps, loss: None)
    gaussian = evaluation.reference.gaussian
    write_statistics(Path(file), gaussian, evaluation.extractor, evaluation.manifest)


def _counts(scores: dict[str, Any]) -> dict[str, float]:
    keys = (
        "frechet_distance",
        "frechet_distance_of_held_out",
        "kernel_distance",
        "inception_score",
        "classifier_score",
        "precision",
        "recall",
        "recognised",
        "class_accuracy",
        "bits_per_dim",
    )
    counts = {key: scores[key]["value"] for key in keys if key in scores}
    if recognized := scores.get("recognised"):
        counts["recognised_of_held_out"] = recognized["held_out"]
    if classifier := scores.get("classifier"):
        counts["classifier_accuracy"] = classifier["held_out_accuracy"]
    return counts | ({"nfe": scores["nfe"]["mean"]} if "nfe" in scores else {})


def _class_accuracy(evaluation: EvaluationRun, samples: Parts) -> dict[str, Any]:
    """How often the classifier finds the class that was sampled; empty without classes or a classifier."""
    probabilities = concatenate(samples, "probabilities")
    accuracy, model = evaluation.extractor.validation_accuracy, evaluation.model
    if model is None or probabilities is None or accuracy is None:
        return {}
    labels = draw_of(evaluation.config).labels(model, range(len(probabilities)))
    if labels is None:
        return {}
    return {"class_accuracy": class_accuracy_record(probabilities, labels, accuracy)}


def _classifier_progress(phases: ProgressPhases, run: RunDirectory) -> Callable[[int, int, float], None]:
    def show(step: int, steps: int, loss: float) -> None:
        _check_stop(run)
        phases.at(CLASSIFIER, step, steps, f"steps, loss {loss:.3f}")

    return show


def _check_stop(run: RunDirectory) -> None:
    if pending_request(run.path):
        if Lease(run.path / "lock").holder() is None:
            mark_stop_handled(run.path)
        raise StopRequested(f"stopped by {run.stop}; finished parts are kept, run it again to continue")
