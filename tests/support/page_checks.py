"""Checks of a page in a real browser: overflow, contrast, pictures; and its screenshots."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support import ROOT

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

SCREENSHOTS = ROOT / "build" / "test-artifacts"
WIDTHS = {"phone": 390, "desktop": 1280}
THEMES = ("light", "dark")
LEAST_CONTRAST = 4.5
"""Contrast of text with its background that WCAG 2 asks for at level AA."""
LEAST_SIDE = 48
"""Least displayed width and height in pixels of a picture."""
MEASURE = """
const shown = e => e.checkVisibility ? e.checkVisibility() : e.offsetParent !== null;
const parsed = text => {
  const numbers = text.match(/[\\d.]+/g).map(Number);
  return numbers.length > 3 ? numbers : [...numbers, 1];
};
const luminance = ([r, g, b]) => {
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
};
const background = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = parsed(getComputedStyle(e).backgroundColor);
    if (color[3] === 1) return color;
    if (color[3] > 0) throw new Error('a background is transparent in part');
  }
  throw new Error('the page has no background');
};
const texts = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
  if (!text || !shown(element) || element.closest('defs, script, style')) continue;
  const style = getComputedStyle(element);
  const color = parsed(element.closest('svg') ? style.fill : style.color);
  const [a, b] = [luminance(color), luminance(background(element))].sort((x, y) => y - x);
  texts.push({text: text.slice(0, 60), contrast: (a + 0.05) / (b + 0.05)});
}
const pictures = [...document.querySelectorAll('img, svg.plot')].filter(shown).map(e => {
  const box = e.getBoundingClientRect();
  const image = e.tagName === 'IMG';
  return {
    name: e.alt || e.getAttribute('aria-label'),
    width: box.width, height: box.height,
    decoded: !image || (e.complete && e.naturalWidth > 0),
    factor: image && e.classList.contains('enlarged') ? box.width / e.naturalWidth : null,
    image,
  };
});
const outside = [...document.body.querySelectorAll('*')].filter(e => {
  if (!shown(e) || e.closest('.scroll, .row, pre, svg')) return false;
  return e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5;
}).map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 40));
return {
  width: window.innerWidth,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  outside, texts, pictures,
};
"""


def open_page(browser: "WebDriver", page: Path, width: int, theme: str) -> None:
    """Load a page with a screen of a width and a preferred color scheme."""
    phone = width < 600
    metrics = {
        "width": width,
        "height": 844 if phone else 900,
        "deviceScaleFactor": 1,
        "mobile": phone,
    }
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.resolve().as_uri())
    browser.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.images].map(i => i.decode().catch(() => {}))).then(() => done());"
    )


def measure(browser: "WebDriver") -> dict[str, Any]:
    """Overflow in pixels, texts with their contrast, and pictures with their displayed sizes."""
    return browser.execute_script(MEASURE)


def unfold(browser: "WebDriver") -> None:
    """Open all that is folded."""
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")


def screenshot(browser: "WebDriver", name: str) -> Path:
    """Save a picture of the entire page below build/test-artifacts."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path = SCREENSHOTS / f"{name}.png"
    path.write_bytes(base64.b64decode(shot["data"]))
    return path


def check_page(browser: "WebDriver", page: Path, name: str, width: str, theme: str) -> dict[str, Any]:
    """Check a page in one width and theme, as it opens and unfolded; return what was measured then."""
    open_page(browser, page, WIDTHS[width], theme)
    try:
        opened = measure(browser)
        screenshot(browser, f"{name}-{width}-{theme}")
        unfold(browser)
        unfolded = measure(browser)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    problems = [*problems_of(opened, WIDTHS[width]), *problems_of(unfolded, WIDTHS[width])]
    assert not problems, problems
    assert len(unfolded["texts"]) > len(opened["texts"]) > 20
    return unfolded


def problems_of(measured: dict[str, Any], width: int) -> list[str]:
    """What is wrong with a page, from what was measured in a screen of a width."""
    problems = [] if measured["width"] == width else [f"the screen has {measured['width']} pixels"]
    if measured["overflow"]:
        problems.append(f"the page is {measured['overflow']} pixels too wide")
    problems += [f"outside of the screen: {element}" for element in measured["outside"]]
    problems += [f"contrast: {text}" for text in measured["texts"] if text["contrast"] < LEAST_CONTRAST]
    problems += [] if measured["pictures"] else ["no picture"]
    for picture in measured["pictures"]:
        factor = picture["factor"]
        if not picture["decoded"] or min(picture["width"], picture["height"]) < LEAST_SIDE:
            problems.append(f"too small, or not decoded: {picture}")
        if factor is not None and factor != int(factor):
            problems.append(f"not enlarged by an integer factor: {picture}")
    return problems
