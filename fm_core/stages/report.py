"""The report stage: the results of a run on one HTML page."""

from pathlib import Path
from typing import Any

import torch

from fm_core.config import RunConfig, dump_yaml
from fm_core.data.manifest import load_manifest
from fm_core.errors import UserError
from fm_core.launch.online_eval import read_online_scores
from fm_core.report.file_links import files_below
from fm_core.report.html import FINGERPRINT_MARK, PAGE_VERSION, Fact, PageSection, Table, page, page_pictures
from fm_core.report.memorization_table import HEAD, NOTE, memorization_rows, memorization_verdict
from fm_core.report.score_table import scores_section
from fm_core.report.score_text import distance_title, with_error
from fm_core.run.directory import RunDirectory, step_name
from fm_core.run.progress import Observer, Progress, duration, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.sampling.checkpoint_source import Model, checkpoint_step, load_model, weights_file
from fm_core.sampling.guide_model import guide_record
from fm_core.sampling.sample_protocol import protocol_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.stages.report_sections import (
    all_scores_section,
    cost_section,
    data_section,
    environment_section,
    files_section,
    history_section,
    neighbors_section,
    samples_section,
    training_seconds,
    training_section,
    validation_losses,
)
from fm_core.stages.resolve import resolve
from fm_core.storage.atomic_files import read_json, read_lines, write_text
from fm_core.storage.hashing import fingerprint
from fm_core.storage.store import Store


def report(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Write report.html, unless its content has not changed.

    Raises:
        UserError: the run has no complete samples.
    """
    config = resolve(config)
    return run_stage_function("report", config, observe, lambda run, show: _report(config, run, show))


def report_sections(config: RunConfig) -> list[PageSection]:
    """The sections of a run's report, from its files. Raises UserError like `report`."""
    config = resolve(config)
    run = RunDirectory(config)
    return _sections(config, run, *_model_and_samples(config))


def _report(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    model, samples = _model_and_samples(config)
    done = _complete(run, samples)
    run.begin()
    scores = _scores(run, samples)
    content = [
        PAGE_VERSION,
        read_lines(run.metrics)[-1],
        read_lines(validation_losses(run))[-1:],
        read_online_scores(run.path),
        done,
        scores,
        _result_files(run),
        load_manifest(config.data.root, config.data.name).version,
        config.model_dump(mode="json", exclude={"report": {"pictures"}}),
    ]
    mark = f"{FINGERPRINT_MARK}{fingerprint(content)} -->\n"
    pictures = config.report.pictures
    current = run.report.exists() and run.report.read_text(encoding="utf-8").endswith(mark) and not pictures
    state = "verified" if current else "done"
    if state == "done":
        observe(Progress("report", 0, 1, "page", "drawing"))
        trained = f"{model.images_seen:,} images seen in {samples.step:,} steps"
        lead = f"{trained}; {done['images']:,} samples. Directory: {run.path}"
        sections = _sections(config, run, model, samples)
        facts = _facts(run, scores[0] if scores else {}, done)
        write_text(run.report, page(f"Flow matching: {config.run.name}", lead, sections, facts) + mark)
        if pictures:
            store = Store.at(pictures)
            for name, (picture, _) in page_pictures("report", sections).items():
                store.write_bytes(f"{name}.png", picture)
    observe(Progress("report", 1, 1, "page", str(run.report)))
    return StageResult(
        stage="report", state=state, seconds=0.0, summary=str(run.report), paths={"report": str(run.report)}
    )


def _model_and_samples(config: RunConfig) -> tuple[Model, SampleSet]:
    """The model of the configured checkpoint, and its samples."""
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), torch.device("cpu"), config)
    protocol = protocol_of(config, model.weights_sha256, model.generator, guide_record(config))
    return model, SampleSet(config, step, protocol)


def _complete(run: RunDirectory, samples: SampleSet) -> dict[str, Any]:
    """The record of complete samples. Raises UserError if they are not complete."""
    done = samples.done()
    if done is None or not read_lines(run.metrics):
        raise UserError(f"{samples.store.url} is not complete; run fm sample first")
    return done


def _scores(run: RunDirectory, samples: SampleSet) -> list[dict[str, Any]]:
    folder: Path = run.path / "evaluation" / step_name(samples.step)
    return [record for path in sorted(folder.glob(f"{samples.key}-*.json")) if (record := read_json(path))]


def _result_files(run: RunDirectory) -> list[str]:
    """The files of the run that a stage writes once; logs and status files change at every call."""
    files = [path.relative_to(run.path) for path in files_below(run.path)]
    return [str(path) for path in files if len(path.parts) > 1 and path.parts[0] != "logs"]


def _sections(config: RunConfig, run: RunDirectory, model: Model, samples: SampleSet) -> list[PageSection]:
    manifest = load_manifest(config.data.root, config.data.name)
    done, scores = _complete(run, samples), _scores(run, samples)
    return [
        *samples_section(manifest, samples),
        *(scores_section(record) for record in scores),
        training_section(run),
        *neighbors_section(config, manifest, samples),
        *(section for record in scores for section in _memorization_section(record)),
        *all_scores_section(run),
        cost_section(run, model.images_seen, samples, done),
        history_section(run),
        data_section(manifest, model),
        environment_section(run),
        PageSection("Configuration", [], text=dump_yaml(config), folded=True),
        files_section(run),
    ]


def _memorization_section(record: dict[str, Any]) -> list[PageSection]:
    """Distances to the training images, where they were scored."""
    rows = memorization_rows(record)
    if not rows:
        return []
    note = f"{memorization_verdict(record)} {NOTE}".strip()
    return [PageSection("Memorization", [Table(HEAD, rows)], note)]


def _facts(run: RunDirectory, scores: dict[str, Any], done: dict[str, Any]) -> list[Fact]:
    """The numbers at the top of the page, of those that were computed."""
    facts = list[Fact]()
    if distance := scores.get("frechet_distance"):
        plain = {key: value for key, value in distance.items() if key != "unreliable"}
        mark = "; ± unreliable" if distance.get("unreliable") else ""
        detail = f"{distance['images']:,} samples{mark}"
        facts.append(Fact(distance_title(distance["features"]), with_error(plain, 2), detail))
    if bits := scores.get("bits_per_dim"):
        facts.append(Fact("bits/dim", with_error(bits, 3), f"{bits['images']:,} validation images"))
    solver = done.get("protocol", {}).get("solver", "")
    facts.append(
        Fact("NFE", f"{done['nfe']['mean']:.0f}", f"evaluations of the network per sample, {solver}")
    )
    rate = read_lines(run.metrics)[-1].get("images_per_s")
    speed = f"{rate:,.0f} images/s at the end" if rate else ""
    return [*facts, Fact("training", duration(training_seconds(run)), speed)]
