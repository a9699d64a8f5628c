"""The report stage: the results of a run on one HTML page."""

from pathlib import Path
from typing import Any

import torch

from fm_core.config import RunConfig, dump_yaml
from fm_core.data.manifest import Manifest, load_manifest
from fm_core.errors import UserError
from fm_core.evaluation.features.classifier_features import MAX_IMAGES, first_images
from fm_core.report.html import FINGERPRINT_MARK, Figure, PageSection, Table, data_uri, page
from fm_core.report.image_grids import animation, grid, nearest, png, strip
from fm_core.report.memorization_table import HEAD, NOTE, memorization_rows, memorization_verdict
from fm_core.report.model_card import pairs_text
from fm_core.report.plots import loss_curve
from fm_core.report.score_table import WARNING, ScoreEntry, compare_scores, scores_section
from fm_core.run.directory import RunDirectory, step_name
from fm_core.run.progress import Observer, Progress, no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.sampling.checkpoint_source import Model, checkpoint_step, load_model, weights_file
from fm_core.sampling.guide_model import guide_record
from fm_core.sampling.sample_protocol import protocol_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.stages.resolve import resolve
from fm_core.storage.atomic_files import read_json, read_lines, write_text
from fm_core.storage.hashing import fingerprint


def report(config: RunConfig, observe: Observer = no_progress) -> StageResult:
    """Write report.html, unless its content has not changed.

    Raises:
        UserError: the run has no complete samples.
    """
    config = resolve(config)
    return run_stage_function("report", config, observe, lambda run, show: _report(config, run, show))


def _report(config: RunConfig, run: RunDirectory, observe: Observer) -> StageResult:
    manifest = load_manifest(config.data.root, config.data.name)
    metrics = read_lines(run.metrics)
    step = checkpoint_step(config)
    model = load_model(weights_file(config, step), torch.device("cpu"), config)
    protocol = protocol_of(config, model.weights_sha256, model.generator, guide_record(config))
    samples = SampleSet(config, step, protocol)
    done = samples.done()
    if done is None or not metrics:
        raise UserError(f"{samples.store.url} is not complete; run fm sample first")
    run.begin()
    scores = [record for path in _score_files(run, step, samples.key) if (record := read_json(path))]
    others = sorted(str(path.relative_to(run.path)) for path in run.path.glob("evaluation/*/*.json"))
    content = [metrics[-1], done, scores, others, manifest.version, config.model_dump(mode="json")]
    mark = f"{FINGERPRINT_MARK}{fingerprint(content)} -->\n"
    current = run.report.exists() and run.report.read_text(encoding="utf-8").endswith(mark)
    state = "verified" if current else "done"
    if state == "done":
        observe(Progress("report", 0, 1, "page", "drawing"))
        sections = [
            *(section for record in scores for section in _score_sections(record)),
            *_all_scores(run),
            _samples_section(config, manifest, samples),
            PageSection(
                "Loss",
                [Figure(data_uri(loss_curve(metrics)), "training loss against images seen", plot=True)],
            ),
            _history_section(run),
            _data_section(manifest, model),
            PageSection("Environment", [_environment_table(run)]),
            PageSection("Configuration", [], text=dump_yaml(config)),
        ]
        trained = f"{model.images_seen:,} images seen in {step:,} steps"
        lead = f"{trained}; {done['images']:,} samples. Directory: {run.path}"
        write_text(run.report, page(f"Flow matching: {config.run.name}", lead, sections) + mark)
    observe(Progress("report", 1, 1, "page", str(run.report)))
    return StageResult(
        stage="report", state=state, seconds=0.0, summary=str(run.report), paths={"report": str(run.report)}
    )


def _score_sections(record: dict[str, Any]) -> list[PageSection]:
    """Scores, and memorization where it was scored."""
    sections = [scores_section(record)]
    if rows := memorization_rows(record):
        note = f"{memorization_verdict(record)} {NOTE}".strip()
        sections.append(PageSection("Memorization", [Table(HEAD, rows)], note))
    return sections


def _all_scores(run: RunDirectory) -> list[PageSection]:
    """All scores of the run in one table, if there are several."""
    entries = [
        ScoreEntry(f"{path.parent.name}/{path.stem}", record)
        for path in sorted(run.path.glob("evaluation/*/*.json"))
        if (record := read_json(path))
    ]
    if len(entries) < 2:
        return []
    comparison = compare_scores(entries)
    differences = [WARNING, *comparison.differences] if comparison.differences else []
    note = " ".join([*comparison.notes, *differences])
    return [PageSection("All scores of this run", [comparison.table], note)]


def _score_files(run: RunDirectory, step: int, sample_key: str) -> list[Path]:
    return sorted((run.path / "evaluation" / step_name(step)).glob(f"{sample_key}-*.json"))


def _samples_section(config: RunConfig, manifest: Manifest, samples: SampleSet) -> PageSection:
    shape, levels = manifest.image_shape, manifest.levels
    scale = max(1, 32 // shape[1])
    images = next(samples.read(shape))
    figures = [
        Figure(
            data_uri(png(grid(images[:64], levels, 8, scale))),
            "the first samples, by index",
        )
    ]
    trajectory = samples.trajectory()
    if trajectory is not None:
        caption = "from noise to image: trajectories of the first samples"
        figures.append(Figure(data_uri(animation(trajectory, levels, 8, scale)), caption))
        strips = png(strip(trajectory, levels, 9, scale))
        figures.append(Figure(data_uri(strips), f"{caption}, at nine times"))
    count = min(config.report.neighbors, len(images))
    note = ""
    if count:
        training, _ = first_images(config.data.root, manifest, "train", MAX_IMAGES)
        ids, distances = nearest(images[:count], training)
        pairs = torch.stack([images[:count], training[ids]], dim=1).flatten(0, 1)
        caption = "sample (left) and nearest training image (right), pair by pair"
        figures.append(Figure(data_uri(png(grid(pairs, levels, 8, scale))), caption))
        note = (
            f"Nearest of {len(training):,} training images, by root mean square difference: "
            f"{distances.min():.2f} to {distances.max():.2f} of {levels - 1} intensity levels; "
            "a value near 0 is a copy."
        )
    return PageSection("Samples", figures, note)


def _history_section(run: RunDirectory) -> PageSection:
    rows = [
        [line["began"], line["stage"], line["state"], f"{line['seconds']:.1f} s", line["summary"]]
        for line in read_lines(run.history)
    ]
    note = "Every call of a stage, from logs/stages.jsonl; verified: its results were complete and intact."
    return PageSection("History", [Table(["began (UTC)", "stage", "outcome", "time", "result"], rows)], note)


def _data_section(manifest: Manifest, model: Model) -> PageSection:
    rows = [
        [split, f"{record.images:,}", f"{record.channel_mean[0]:.2f} ± {record.channel_std[0]:.2f}"]
        for split, record in manifest.splits.items()
    ]
    channels, height, width = manifest.image_shape
    note = (
        f"{manifest.name}: {height} × {width} pixels, {channels} channels, {manifest.levels} intensity "
        f"levels, {manifest.class_count or 'no'} classes; version {manifest.version[:16]}."
    )
    if model.pairs:
        note += f" Not trained on these images, but on pairs of noise and sample: {pairs_text(model.pairs)}."
    return PageSection("Data", [Table(["split", "images", "first channel, mean ± deviation"], rows)], note)


def _environment_table(run: RunDirectory) -> Table:
    facts = read_json(run.path / "environment.json") or {}
    flat = {**facts, **facts.get("versions", {})}
    rows = [[key, str(value)] for key, value in flat.items() if key not in ("schema", "versions") and value]
    return Table(["", ""], rows)
