"""The pages of the comparisons in a real browser, on a phone and on a desktop, light and dark."""

from pathlib import Path

import pytest

from fm_core.commands import stage_function
from tests.support.page_checks import THEMES, WIDTHS, check_page
from tests.support.tiny_toy2d import CELLS, configured, place

widths = pytest.mark.parametrize("width", WIDTHS)
themes = pytest.mark.parametrize("theme", THEMES)
MAP = {"name": "map", "title": "Map", "objective": "split-meanflow", "path": "optimal-transport", "steps": 2}


@pytest.fixture(scope="module")
def in_2d(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy2d")
    few = {"experiments": ["ddpm", "fm-ot", "map"], "nfe": [1, 2, 4, 8]}
    stage_function("reproduce")(configured(root, [*CELLS, MAP], few_steps=few))
    return place(root, "report.html")


@themes
@widths
def test_the_page_of_a_comparison_on_images_can_be_read(few_compared, browser, width, theme):
    check_page(browser, Path(few_compared[1].paths["report"]), "comparison", width, theme)


@themes
@widths
def test_the_page_of_a_comparison_in_2d_can_be_read(in_2d, browser, width, theme):
    check_page(browser, in_2d, "comparison-2d", width, theme)
