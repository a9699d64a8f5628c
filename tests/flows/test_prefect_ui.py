"""The flow-run page in a real browser, in both of Prefect's user interfaces."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.support.demo_project import Demo
from tests.support.page_checks import SCREENSHOTS
from tests.support.ui_driver import BROWSER, DRIVER, press, sign_in, text_of, wait

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

STAGES = ["shard", "train[2]", "sample[2]", "evaluate", "report"]

pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with chromedriver on this machine"),
]


def green_pixels(browser: "WebDriver") -> int:
    """Of the graph's canvas, which holds a green bar for each stage that is complete."""
    picture = Image.open(io.BytesIO(browser.find_element(By.TAG_NAME, "canvas").screenshot_as_png))
    return sum(
        count
        for count, (red, green, blue) in picture.convert("RGB").getcolors(maxcolors=2**24) or []
        if green > 120 and green > 1.5 * red and green > 1.5 * blue
    )


@pytest.fixture(scope="module", params=["", "/v2"], ids=["first UI", "second UI"])
def site(request: pytest.FixtureRequest, demo: Demo, window: "WebDriver") -> str:
    sign_in(window, demo.port, demo.secret)
    return f"http://127.0.0.1:{demo.port}{request.param}"


def keep(browser: "WebDriver", site: str, name: str) -> Path:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}{'-v2' if site.endswith('v2') else ''}.png"
    browser.save_screenshot(str(path))
    return path


def test_the_flow_run_page_shows_name_bars_artifacts_and_result(demo: Demo, browser: "WebDriver", site: str):
    message = demo.run(demo.run_id)["state"]["message"]
    browser.get(f"{site}/runs/flow-run/{demo.run_id}")
    wait(browser, lambda: "digits-s0" in text_of(browser) and "5 Task runs" in text_of(browser))
    wait(browser, lambda: green_pixels(browser) > 500)
    wait(browser, lambda: message in text_of(browser))  # the log's last line
    assert "Completed" in text_of(browser)
    keep(browser, site, "flow-run")

    press(browser, "Task Runs")
    wait(browser, lambda: all(stage in text_of(browser) for stage in STAGES))
    press(browser, "Artifacts")
    shown = ["sample-grid", "loss-curve", "scores", "dataset-card", "run-directory", "train-progress"]
    wait(browser, lambda: all(key in text_of(browser) for key in shown))
    assert "1,280 of 1,280 images" in text_of(browser)
    keep(browser, site, "flow-run-artifacts")


def test_the_ui_asks_for_the_password_once(demo: Demo, browser: "WebDriver", site: str):
    browser.get(f"{site}/dashboard")
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    field = '//input[@type="password"]'
    wait(browser, lambda: browser.find_element(By.XPATH, field).send_keys(demo.password + Keys.ENTER) is None)
    wait(browser, lambda: browser.execute_script("return localStorage['prefect-password']") == demo.secret)
    browser.get(f"{site}/runs/flow-run/{demo.run_id}")
    wait(browser, lambda: "digits-s0" in text_of(browser))
    assert browser.find_elements(By.XPATH, field) == []


@pytest.mark.parametrize("key", ["sample-grid", "loss-curve"])
def test_pictures_are_drawn(demo: Demo, browser: "WebDriver", site: str, key: str):
    query = {"flow_runs": {"id": {"any_": [demo.run_id]}}, "artifacts": {"key": {"any_": [key]}}}
    (artifact,) = demo.api("/artifacts/filter", query)
    browser.get(f"{site}/artifacts/artifact/{artifact['id']}")
    widths = (
        "return [...document.images].filter(i => i.src.startsWith('data:image/')).map(i => i.naturalWidth)"
    )
    wait(browser, lambda: max(browser.execute_script(widths), default=0) > 200)
    keep(browser, site, key)


def open_form(demo: Demo, browser: "WebDriver", site: str, flow: str) -> None:
    (deployment,) = demo.api("/deployments/filter", {"flows": {"name": {"any_": [flow]}}})
    browser.get(f"{site}/deployments/deployment/{deployment['id']}/run")


def test_the_form_shows_the_presets_values_with_their_meaning(demo: Demo, browser: "WebDriver", site: str):
    open_form(demo, browser, site, "train-imagenet64")
    wait(browser, lambda: "Images in one optimizer step" in text_of(browser))
    keep(browser, site, "form")
    values = "return [...document.querySelectorAll('input, textarea')].map(i => i.value)"
    assert "321536000" in [value.replace(",", "") for value in browser.execute_script(values)]


def test_the_form_of_one_stage_shows_the_keys_of_that_stage(demo: Demo, browser: "WebDriver", site: str):
    open_form(demo, browser, site, "shard-dataset")
    wait(browser, lambda: "Largest fraction of unreadable images" in text_of(browser))
    keep(browser, site, "form-shard")
    assert "Images in one optimizer step" not in text_of(browser)
