"""Progress of a stage on the terminal."""

import pytest
from rich.console import Console

import flows.progress_report
from fm_core.run.progress import Progress
from fm_core.terminal import ProgressBar, describe


def test_brackets_in_messages_are_not_markup(capsys):
    bar = ProgressBar()
    bar.console = Console(stderr=True, force_terminal=True, width=200)
    with bar:
        bar.observe(Progress("train", 1, 2, "images", "restart 1: [/third_party/gloo/pair.cc:1] closed"))
    assert "[/third_party/gloo/pair.cc:1]" in capsys.readouterr().err


def test_counts_rate_and_time_left_are_shown():
    text = describe(Progress("train", 500, 2_000, "images", "loss 0.5", rate=100.0))
    assert text == "500/2,000 images, 100 images/s, 0:00:15 left, loss 0.5"


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.4, "0.4"),
        (0.0123, "0.0123"),
        (12.34, "12.3"),
        (999.4, "999"),
        (999.6, "1,000"),
        (54321.0, "54,321"),
    ],
)
def test_slow_and_fast_rates_have_three_digits(rate, text):
    progress = Progress("train", 500, 2_000, "images", "", rate=rate)
    assert f", {text} images/s, " in describe(progress)
    assert f", {text} images/s, " in flows.progress_report.describe(progress)


def test_without_a_terminal_there_is_a_line_now_and_then(capsys):
    with ProgressBar() as bar:
        for done in (0, 1, 2, 3):
            bar.observe(Progress("shard", done, 3, "images"))
    assert capsys.readouterr().err.splitlines() == ["shard: 0/3 images", "shard: 3/3 images"]
