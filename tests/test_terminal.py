"""What is shown of a stage's progress."""

from rich.console import Console

from fm_core.run.progress import Progress
from fm_core.terminal import Bar, describe


def test_brackets_in_what_is_shown_are_no_markup(capsys):
    bar = Bar()
    bar.console = Console(stderr=True, force_terminal=True, width=200)
    with bar:
        bar.observe(Progress("train", 1, 2, "images", "restart 1: [/third_party/gloo/pair.cc:1] closed"))
    assert "[/third_party/gloo/pair.cc:1]" in capsys.readouterr().err


def test_counts_rate_and_time_left_are_told():
    told = describe(Progress("train", 500, 2_000, "images", "loss 0.5", rate=100.0))
    assert told == "500/2,000 images, 100 images/s, 0:00:15 left, loss 0.5"
