"""Texts of the flows: progress lines, artifact tables and the message of the final state."""

import io

import pytest
from PIL import Image

from flows.artifacts import MAX_IMAGE_BYTES, flatten_record, image_uri, tables_as_markdown
from flows.pipeline import result_message
from flows.progress_report import describe, percentage
from fm_core.report.gallery import Gallery, Unit, data_uri
from fm_core.report.html import Figure, PageSection, Table, page_pictures
from fm_core.report.plots import ErrorBar, error_bar_plot
from fm_core.run.progress import Progress, duration
from fm_core.run.results import StageResult


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (79, "1 min 19 s"), (15_000, "4 h 10 min"), (260_000, "3 d 0 h")],
)
def test_a_duration_has_two_units_at_most(seconds: float, text: str):
    assert duration(seconds) == text


def test_progress_is_described_with_step_loss_rate_and_time_left():
    progress = Progress("train", 64_000, 128_000, "images", "step 500, loss 0.31", 812.0)
    assert describe(progress) == (
        "step 500, loss 0.31, 64,000 of 128,000 images, 812 images/s, ETA 1 min 19 s"
    )
    assert percentage(progress) == 50


def test_a_stage_that_has_not_begun_is_at_zero():
    assert percentage(Progress("train", 0, 0, "", "starting")) == 0
    assert describe(Progress("train", 0, 0, "", "starting")) == "starting"


def test_flattened_records_have_dotted_names_and_long_lists_are_counted():
    record = {"a": {"b": 1.23456789, "c": [1, 8, 8]}, "d": list(range(9)), "e": None}
    assert dict(flatten_record(record)) == {"a.b": "1.23457", "a.c": "1, 8, 8", "d": "9 entries", "e": None}


def test_a_large_image_is_made_small_enough_for_an_artifact():
    noise = Image.effect_noise((1200, 1200), 90)
    encoded = io.BytesIO()
    noise.save(encoded, "PNG")
    assert len(encoded.getvalue()) > MAX_IMAGE_BYTES
    address = image_uri(encoded.getvalue())
    assert address.startswith("data:image/jpeg;base64,")
    assert len(address) < 200_000


def test_the_artifacts_of_a_comparison_are_the_tables_and_figures_of_its_report():
    encoded = io.BytesIO()
    Image.effect_noise((30, 20), 90).save(encoded, "PNG")
    uri = data_uri(encoded.getvalue())
    claims = Table(["claim", "measured"], [["Samples are better", "worse: 3 | 2"]])
    sections = [
        PageSection("The paper's claims", [claims], "ranges are quantiles"),
        PageSection("Configuration", [], text="seed: 1"),
        PageSection("While training", [Figure(uri, "left and right")]),
        PageSection("Sampling paths", [Figure(uri, "of image 0"), Figure(uri, "of image 1")]),
    ]
    text = tables_as_markdown(sections, "# run")
    assert text.startswith(
        "# run\n\n## The paper's claims\n\nranges are quantiles\n\n| claim | measured |\n| --- |"
    )
    assert "| Samples are better | worse: 3 \\| 2 |" in text
    assert "Configuration" not in text
    assert "While training" not in text
    content = encoded.getvalue()
    assert page_pictures("comparison", sections) == {
        "comparison-while-training": (content, "While training: left and right"),
        "comparison-sampling-paths-1": (content, "Sampling paths: of image 0"),
        "comparison-sampling-paths-2": (content, "Sampling paths: of image 1"),
    }


def test_the_pictures_of_a_report_include_its_plots_and_galleries():
    encoded = io.BytesIO()
    Image.effect_noise((8, 8), 90).save(encoded, "PNG")
    gallery = Gallery([Unit("a", [data_uri(encoded.getvalue())])] * 3, "three", 80, 80, enlarged=True)
    plot = Figure(error_bar_plot("distance", [ErrorBar("samples", 2.0, 0.5)]), "with its error")
    sections = [PageSection("Samples", [gallery]), PageSection("Scores", [plot])]
    pictures = page_pictures("report", sections)
    assert {key: caption for key, (_, caption) in pictures.items()} == {
        "report-samples": "Samples: three",
        "report-scores": "Scores: with its error",
    }
    for content, _ in pictures.values():
        assert Image.open(io.BytesIO(content)).width > 200


def test_sections_of_one_title_keep_all_of_their_pictures():
    uris = [data_uri(name) for name in (b"first", b"second", b"third")]
    sections = [
        PageSection("Scores", [Figure(uris[0], "a")]),
        PageSection("Scores", [Figure(uris[1], "b"), Figure(uris[2], "c")]),
    ]
    assert page_pictures("report", sections) == {
        "report-scores-1": (b"first", "Scores: a"),
        "report-scores-2": (b"second", "Scores: b"),
        "report-scores-3": (b"third", "Scores: c"),
    }


def result(stage: str, state: str = "done", summary: str = "", **paths: str) -> StageResult:
    return StageResult.model_validate(
        {"stage": stage, "state": state, "seconds": 1.0, "summary": summary or stage, "paths": paths}
    )


def test_the_final_message_is_the_score_and_the_report():
    results = [result("train"), result("evaluate", summary="distance 3.1"), result("report", report="r.html")]
    assert result_message(results) == "distance 3.1; report: r.html"


def test_the_final_message_says_when_everything_was_complete():
    results = [result("train", "verified"), result("report", "verified", report="r.html")]
    assert result_message(results) == "report; nothing to do, everything was complete; report: r.html"
