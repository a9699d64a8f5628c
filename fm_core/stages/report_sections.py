"""Sections of a run's report, from the files of the run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_core.config import RunConfig
from fm_core.data.manifest import Manifest
from fm_core.evaluation.features.classifier_features import MAX_IMAGES, first_images
from fm_core.launch.online_eval import read_online_scores
from fm_core.report.file_links import file_links
from fm_core.report.gallery import STRIP_SIDE, Gallery
from fm_core.report.gallery_encoding import (
    PAIRS_BUDGET,
    SAMPLES_BUDGET,
    STRIPS_BUDGET,
    animations,
    gallery,
)
from fm_core.report.html import Figure, PageSection, Table
from fm_core.report.image_grids import nearest
from fm_core.report.model_card import pairs_text
from fm_core.report.plots import distance_curve, loss_curve
from fm_core.report.score_table import ScoreEntry, comparison_section
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import byte_size, duration, three_digits
from fm_core.sampling.checkpoint_source import Model
from fm_core.sampling.sample_store import SampleSet
from fm_core.storage.atomic_files import read_json, read_lines

SAMPLES = 64
"""Maximum number of samples that are shown."""
STRIP_TIMES = 9
"""Number of times of a trajectory that are shown, including the first and the last."""
ROWS = 100
"""Maximum number of rows of a table that grows with every call of a stage; the newest are shown."""


def samples_section(manifest: Manifest, samples: SampleSet) -> list[PageSection]:
    """The first samples and, where trajectories are saved, how they develop from noise."""
    images, labels = _first_samples(manifest, samples, SAMPLES)
    names = [f"sample {number}" for number in range(len(images))]
    caption = "the first samples, by index, not selected ({count} of " + f"{samples.images:,})"
    shown = gallery(
        images[:, None],
        manifest.levels,
        names,
        caption,
        budget=SAMPLES_BUDGET,
        labels=_label_names(manifest, labels),
    )
    sections = [PageSection("Samples", [shown])]
    trajectory = samples.trajectory()
    if trajectory is not None:
        sections.append(PageSection("From noise to images", _trajectories(trajectory, manifest.levels)))
    return sections


def _first_samples(manifest: Manifest, samples: SampleSet, count: int) -> tuple[Tensor, list[int]]:
    """The first images by index, at most `count`, uint8 [n, C, H, W], and their classes if they have any."""
    images, labels = list[Tensor](), list[int]()
    for number in range(samples.batches):
        images.append(samples.read_batch(number, manifest.image_shape))
        classes = samples.read_labels(number)
        labels += [] if classes is None else [int(label) for label in classes]
        if sum(map(len, images)) >= count:
            break
    return torch.cat(images)[:count], labels[:count]


def _label_names(manifest: Manifest, labels: Sequence[int]) -> list[str]:
    names = manifest.class_names or ()
    return [names[label] if 0 <= label < len(names) else str(label) for label in labels]


def _trajectories(trajectory: Tensor, levels: int) -> list[Gallery]:
    """Trajectories of the first samples: animated, and at several times."""
    caption = "from noise to image: trajectories of the first samples"
    moving = animations(trajectory, levels, f"{caption}, animated")
    times = torch.linspace(0, len(trajectory) - 1, STRIP_TIMES).round().long()
    units = trajectory[times].transpose(0, 1)
    names = [f"trajectory of sample {number}" for number in range(len(units))]
    strips = gallery(
        units,
        levels,
        names,
        f"{caption}, at equally spaced times",
        budget=STRIPS_BUDGET,
        least=STRIP_SIDE,
        sequence=True,
    )
    return [moving, strips] if moving else [strips]


def neighbors_section(config: RunConfig, manifest: Manifest, samples: SampleSet) -> list[PageSection]:
    """The first samples beside their nearest training images; nothing for report.neighbors 0."""
    if not config.report.neighbors:
        return []
    images, _ = _first_samples(manifest, samples, config.report.neighbors)
    count, levels = len(images), manifest.levels
    training, _ = first_images(config.data.root, manifest, "train", MAX_IMAGES)
    ids, distances = nearest(images, training)
    pairs = torch.stack([images, training[ids]], dim=1)
    names = [f"sample {number} and its nearest training image" for number in range(count)]
    labels = [f"difference {distance:.2f}" for distance in distances.tolist()]
    caption = "sample (left) and nearest training image (right), pair by pair"
    note = (
        f"Nearest of {len(training):,} training images, by root mean square difference: "
        f"{distances.min():.2f} to {distances.max():.2f} of {levels - 1} intensity levels; "
        "a value near 0 is a copy."
    )
    parts = [gallery(pairs, levels, names, caption, budget=PAIRS_BUDGET, labels=labels)]
    return [PageSection("Nearest neighbors", parts, note)]


def training_section(run: RunDirectory) -> PageSection:
    """Loss during training, and distance where checkpoints were scored during training."""
    metrics, validation = read_lines(run.metrics), read_lines(validation_losses(run))
    caption = "training loss against images seen"
    if any(line["loss"] is not None for line in validation):
        caption += ", and the loss on validation images at checkpoints"
    figures = [Figure(loss_curve(metrics, validation), caption)]
    if scores := read_online_scores(run.path):
        caption = (
            f"Fréchet distance of {scores[-1]['images']:,} samples of each checkpoint that was scored during "
            "training; bars are one standard error"
        )
        figures.append(Figure(distance_curve(scores), caption))
    return PageSection("Training", figures)


def all_scores_section(run: RunDirectory) -> list[PageSection]:
    """All scores of the run in one table, if there are several."""
    entries = [
        ScoreEntry(f"{path.parent.name}/{path.stem}", record)
        for path in sorted(run.path.glob("evaluation/*/*.json"))
        if (record := read_json(path))
    ]
    return [comparison_section("All scores of this run", entries[-ROWS:])] if len(entries) > 1 else []


def validation_losses(run: RunDirectory) -> Path:
    """File of the validation losses, one JSON line for each measurement."""
    return run.metrics.with_name("held_out.jsonl")


def training_seconds(run: RunDirectory) -> float:
    """Wall time of all sessions of training up to the last line of metrics.jsonl."""
    done = read_json(run.train_done) or {}
    lines = read_lines(run.metrics)
    return float(done.get("seconds") or (lines[-1].get("seconds", 0.0) if lines else 0.0))


def cost_section(
    run: RunDirectory, images_seen: int, samples: SampleSet, done: dict[str, Any]
) -> PageSection:
    """Time, devices, images per second and NFE of the stages, as far as the files of the run contain them."""
    calls = read_lines(run.history)
    devices = (read_json(run.path / "environment.json") or {}).get("devices", [])
    unit = "process hours" if any("CPU" in str(device) for device in devices) else "device hours"
    trained = read_json(run.train_done) or {}
    sampled = read_json(samples.control / "job.json") or {}
    seconds = training_seconds(run)
    rows = [_cost_row("train", seconds, trained.get("processes"), images_seen / seconds if seconds else None)]
    own = {"sample": sampled.get("processes")}
    for stage in ("shard", "sample", "evaluate"):
        of_stage = [call for call in calls if call["stage"] == stage and call["state"] != "verified"]
        if not of_stage:
            continue
        total = sum(call["seconds"] for call in of_stage)
        rate = samples.images / total if stage == "sample" and len(of_stage) == 1 and total else None
        row = _cost_row(stage, total, own.get(stage), rate)
        rows.append([*row[:-1], f"{done['nfe']['mean']:.0f}" if stage == "sample" else ""])
    used = [column for column in range(6) if any(row[column] for row in rows)]
    head = ["", "time", "processes", unit, "images/s", "NFE"]
    table = Table([head[column] for column in used], [[row[column] for column in used] for row in rows])
    note = "Training: the time of its steps, over all sessions. Other stages: all calls, with their start."
    return PageSection("Cost", [table], note)


def _cost_row(stage: str, seconds: float, processes: int | None, rate: float | None) -> list[str]:
    return [
        stage,
        duration(seconds) if seconds >= 1 else f"{seconds:.1f} s",
        f"{processes:,}" if processes else "",
        three_digits(processes * seconds / 3600) if processes else "",
        three_digits(rate) if rate else "",
        "",
    ]


def history_section(run: RunDirectory) -> PageSection:
    """The calls of stages, with time and result."""
    lines = read_lines(run.history)
    rows = [
        [line["began"], line["stage"], line["state"], f"{line['seconds']:.1f} s", line["summary"]]
        for line in lines[-ROWS:]
    ]
    which = "Every call" if len(lines) <= ROWS else f"The last {ROWS} of {len(lines):,} calls"
    note = f"{which} of a stage, from logs/stages.jsonl; verified: its results were complete and intact."
    table = Table(["began (UTC)", "stage", "outcome", "time", "result"], rows)
    return PageSection("History", [table], note, folded=True)


def data_section(manifest: Manifest, model: Model) -> PageSection:
    """Splits, image format and version of the data set, and what the model was trained on instead."""
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
    table = Table(["split", "images", "first channel, mean ± deviation"], rows)
    return PageSection("Data", [table], note, folded=True)


def environment_section(run: RunDirectory) -> PageSection:
    """Host, devices and versions that the run was started with."""
    facts = read_json(run.path / "environment.json") or {}
    flat = {**facts, **facts.get("versions", {})}
    rows = [[key, str(value)] for key, value in flat.items() if key not in ("schema", "versions") and value]
    return PageSection("Environment", [Table(["", ""], rows)], folded=True)


def files_section(run: RunDirectory) -> PageSection:
    """Links to the files of the run; checkpoints and samples in a store are named."""
    note = "Links work where this page lies in the run directory."
    elsewhere = [url for url in (run.checkpoints, run.samples) if "://" in url]
    if elsewhere:
        note += f" Elsewhere: {', '.join(elsewhere)}."
    return PageSection("Files", [file_links(run.path, run.report, byte_size)], note, folded=True)
