"""Sections of a report: what is shown of images of any size, within the size limit of a page."""

from types import SimpleNamespace

import pytest
import torch

from fm_core.config import RunConfig
from fm_core.report.gallery import Gallery
from fm_core.report.html import MAX_PAGE_BYTES, PageSection, page
from fm_core.run.directory import RunDirectory
from fm_core.stages import report_sections
from fm_core.stages.report_sections import (
    cost_section,
    neighbors_section,
    samples_section,
    training_seconds,
    training_section,
)
from fm_core.storage.atomic_files import append_line, write_json

BATCH = 40
LOSS = {"loss": 0.5, "loss_by_quarter_of_t": [0.1, 0.2, 0.3, 0.4]}


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class NoiseSamples:
    """Samples of random noise, which no encoding makes small."""

    def __init__(self, side: int, images: int = 64, labels: list[int] | None = None) -> None:
        self.images, self.labels = images, labels
        self.batches = -(-images // BATCH)
        self.pixels, self.path = noise(images, 3, side, side), noise(5, 8, 3, side, side)

    def read_batch(self, number: int, shape: tuple[int, int, int]) -> torch.Tensor:
        return self.pixels[number * BATCH : (number + 1) * BATCH]

    def read_labels(self, number: int) -> torch.Tensor | None:
        labels = self.labels
        return None if labels is None else torch.tensor(labels[number * BATCH : (number + 1) * BATCH])

    def trajectory(self) -> torch.Tensor:
        return self.path


def manifest_of(side: int, class_names: tuple[str, ...] | None = None) -> SimpleNamespace:
    return SimpleNamespace(image_shape=(3, side, side), levels=256, class_names=class_names)


@pytest.mark.parametrize("side", [64, 256])
def test_a_report_of_random_noise_is_smaller_than_three_megabytes(side, monkeypatch):
    monkeypatch.setattr(report_sections, "first_images", lambda *_: (noise(40, 3, side, side), None))
    config, samples = RunConfig(), NoiseSamples(side)
    sections = [
        *samples_section(manifest_of(side), samples),
        *neighbors_section(config, manifest_of(side), samples),
    ]
    galleries = [part for section in sections for part in section.parts if isinstance(part, Gallery)]
    assert len(galleries) >= 3
    if side == 64:
        assert len(galleries[0].units) == 64
    assert all(len(gallery.units) >= 1 for gallery in galleries)
    # Half a megabyte is left for plots, tables and links.
    assert len(page("noise", "", sections).encode()) < MAX_PAGE_BYTES - 500_000


def test_samples_have_the_names_of_their_classes():
    names = ("<b>cat</b>", "dog")
    samples = NoiseSamples(8, images=3, labels=[1, 0, 2])
    (gallery,) = samples_section(manifest_of(8, names), samples)[0].parts
    assert [unit.label for unit in gallery.units] == ["dog", "<b>cat</b>", "2"]
    html = PageSection("Samples", [gallery]).html()
    assert "&lt;b&gt;cat&lt;/b&gt;" in html
    assert "<b>" not in html
    assert not any(unit.label for unit in samples_section(manifest_of(8), NoiseSamples(8))[0].parts[0].units)


@pytest.fixture
def run(tmp_path) -> SimpleNamespace:
    """The files of a run whose training has not ended."""
    metrics = tmp_path / "train" / "metrics.jsonl"
    metrics.parent.mkdir()
    for step in (1, 2):
        append_line(metrics, {"step": step, "images_seen": 100 * step, "seconds": 50.0 * step, **LOSS})
    history = tmp_path / "stages.jsonl"
    return SimpleNamespace(path=tmp_path, metrics=metrics, history=history, train_done=tmp_path / "DONE.json")


def test_the_distance_during_training_is_drawn_where_checkpoints_were_scored(run):
    assert len(training_section(run).parts) == 1
    line = {
        "images_seen": 100,
        "frechet_distance": 3.5,
        "stderr": 0.5,
        "features": "classifier",
        "images": 50,
    }
    append_line(run.path / "evaluation" / "beside.jsonl", line)
    append_line(run.metrics.with_name("held_out.jsonl"), {"step": 1, "images_seen": 100, "loss": 0.6})
    loss, distance = training_section(run).parts
    assert "validation images" in loss.caption
    assert "50 samples" in distance.caption
    assert "Fréchet distance (classifier features)" in distance.html()


def test_the_cost_is_that_of_the_files_that_exist(run):
    samples = SimpleNamespace(control=run.path / "samples", images=1_000)
    done = {"nfe": {"mean": 40.0}}
    (table,) = cost_section(run, 200, samples, done).parts
    assert (table.head, table.rows) == (["", "time", "images/s"], [["train", "1 min 40 s", "2"]])
    write_json(run.train_done, {"seconds": 7200.0, "processes": 8})
    write_json(run.path / "environment.json", {"devices": ["GPU"] * 8})
    call = {"stage": "sample", "state": "done", "seconds": 10.0}
    append_line(run.history, call)
    (table,) = cost_section(run, 200, samples, done).parts
    assert table.head == ["", "time", "processes", "device hours", "images/s", "NFE"]
    assert table.rows == [
        ["train", "2 h 0 min", "8", "16", "0.0278", ""],
        ["sample", "10 s", "", "", "100", "40"],
    ]
    append_line(run.history, {**call, "state": "failed"})
    append_line(run.history, {**call, "state": "verified"})
    (table,) = cost_section(run, 200, samples, done).parts
    assert table.rows[1] == ["sample", "20 s", "", "", "", "40"]


def test_the_time_of_training_is_that_of_the_last_line_until_it_is_done(tmp_path):
    run = RunDirectory(RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "r"}}))
    assert training_seconds(run) == 0
    run.metrics.parent.mkdir(parents=True)
    for seconds in (1.5, 2.5, 4.0):
        append_line(run.metrics, {"seconds": seconds})
        assert training_seconds(run) == seconds
    write_json(run.train_done, {"seconds": 7.0})
    assert training_seconds(run) == 7
