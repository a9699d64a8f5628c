"""The report of a tiny run in a real browser, on a phone and on a desktop, light and dark."""

import pytest

from tests.support.page_checks import THEMES, WIDTHS, check_page


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_fits_its_screen_and_can_be_read(tiny, browser, width, theme):
    measured = check_page(browser, tiny.path / "report.html", "report", width, theme)
    images = [picture for picture in measured["pictures"] if picture["image"]]
    assert len(images) >= 8 + 2 * 4
    # Samples of 8 x 8 pixels, and times of their trajectories.
    assert {picture["factor"] for picture in images} == {10, 6}
    assert sum(picture["width"] == 80 for picture in images) >= 20 + 2 * 4
    plots = [picture["name"] for picture in measured["pictures"] if not picture["image"]]
    assert any("training loss against images seen" in name for name in plots)
    assert any("Fréchet distance" in name for name in plots)
