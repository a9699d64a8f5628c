"""Artifacts of comparisons and sweeps: which pictures and tables they show."""

from pathlib import Path
from typing import Any

import pytest

from flows import artifacts as module
from flows.artifacts import comparison_pictures, sweep_pictures, sweep_tables
from fm_core.config import RunConfig
from fm_core.report.html import PageSection, Table
from fm_core.run.results import StageResult
from fm_core.storage.atomic_files import write_json

SECTIONS = [PageSection("Scores", [Table(["value", "score"], [["1.0", "2.5"]])])]


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is created, by key."""
    content: dict[str, Any] = {}
    monkeypatch.setattr(
        module,
        "create_image_artifact",
        lambda uri, key, description: content.update({key: (uri, description)}),
    )
    monkeypatch.setattr(
        module,
        "create_markdown_artifact",
        lambda markdown, key, description: content.update({key: (markdown, description)}),
    )
    monkeypatch.setattr("fm_core.report.html.page_pictures", pictures)
    return content


def pictures(prefix: str, sections: list[PageSection]) -> dict[str, tuple[bytes, str]]:
    return {f"{prefix}-{number}": (b"<svg></svg>", section.title) for number, section in enumerate(sections)}


def result(folder: Path, stage: str, **record: object) -> StageResult:
    write_json(folder / "results.json", record)
    paths = {"results": str(folder / "results.json"), "report": str(folder / "report.html")}
    return StageResult(stage=stage, state="done", seconds=0.0, summary="compared", paths=paths)


def test_every_picture_of_a_comparison_is_an_artifact(tmp_path, monkeypatch, created):
    monkeypatch.setattr("fm_core.reproduce.reproduce.page_sections", lambda config: SECTIONS)
    comparison_pictures(RunConfig(), result(tmp_path, "reproduce"))
    assert created == {"comparison-0": (module.image_uri(b"<svg></svg>"), "Scores")}


def test_the_artifacts_of_a_sweep_are_made_from_its_results(tmp_path, monkeypatch, created):
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "fm_core.sweep.sweep_page.sweep_sections", lambda results: seen.append(results) or SECTIONS
    )
    swept = result(tmp_path, "sweep", points=[1])
    sweep_tables(RunConfig(), swept)
    sweep_pictures(RunConfig(), swept)
    assert [results["points"] for results in seen] == [[1], [1]]
    text, description = created["sweep"]
    assert (text.splitlines()[0], description) == ("# Sweep of run", "compared")
    assert "2.5" in text
    assert set(created) == {"sweep", "sweep-0"}
