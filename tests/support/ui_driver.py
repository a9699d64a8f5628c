"""Headless browser that drives the Prefect UI."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from selenium.webdriver.common.by import By

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    # Software WebGL: without it the graph of a flow run is drawn for two to three times the CPU time.
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--window-size=1400,1500",
]


@contextmanager
def start_browser(profile: Path) -> "Iterator[WebDriver]":
    """A browser with its own profile; requires chromium and chromedriver."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = BROWSER or ""
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def sign_in(browser: "WebDriver", port: int, secret: str) -> None:
    """Give the UI of a server its password, as its login page does."""
    browser.get(f"http://127.0.0.1:{port}/api/health")
    browser.execute_script("localStorage.setItem('prefect-password', arguments[0])", secret)


def text_of(browser: "WebDriver") -> str:
    return browser.find_element(By.TAG_NAME, "body").text


def wait(browser: "WebDriver", until: Callable[[], object], seconds: float = 300) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    ignored = Exception  # elements come and go while a page is drawn
    WebDriverWait(browser, seconds, ignored_exceptions=[ignored]).until(lambda _: until())


def press(browser: "WebDriver", name: str, kind: str = "*") -> None:
    """Click the last element of a kind whose text is exactly `name`."""

    def pressed() -> bool:
        browser.find_elements(By.XPATH, f"//{kind}[normalize-space()='{name}']")[-1].click()
        return True

    wait(browser, pressed)


def press_cancel(browser: "WebDriver", page: str) -> None:
    """Cancel a flow run on its page of the second UI."""
    browser.get(page)
    press(browser, "Open menu", "button")
    press(browser, "Cancel", "*[@role='menuitem']")
    press(browser, "Cancel Flow Run", "button")
