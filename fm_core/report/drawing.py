"""Plots that are drawn once and rendered as SVG for pages, or as PNG where SVG cannot be used.

The colors of the light theme are those of matplotlib's output. In an SVG they are replaced with the CSS
variables of the page, so that a plot follows the page into the dark theme; its background is transparent.
"""

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Canvas

P = ParamSpec("P")
R = TypeVar("R")
INK, MUTED, LINE = "#1b1f24", "#57606a", "#d8dee4"
"""Colors of text, of secondary lines, and of grids."""
SERIES = ("#0b62c4", "#b35300", "#1a7f37", "#8250df", "#c4202b", "#0a7f86", "#bf3989")
"""Colors of lines, in order."""
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, start=1)
}
"""Color of the light theme -> variable of the page's style sheet."""
PANEL = (4.4, 2.9)
"""Width and height of a panel in inches: 422 x 278 pixels of a page, legible on a phone."""
WIDE = 40 * 16
"""Width in pixels of a page above which a plot scrolls on a narrow screen instead of being scaled down."""
PNG_DPI, RASTER_DPI = 110, 160
"""Resolution of a PNG, and of the parts of an SVG that are drawn as pixels."""


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that draws with the colors and sizes of all plots."""

    @wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(cast(Any, _style())):
            return function(*arguments, **options)

    return run


@dataclass(frozen=True)
class Drawing:
    """A plot."""

    figure: "Canvas"

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height in pixels of a page."""
        width, height = self.figure.get_size_inches()
        return round(width * 96), round(height * 96)

    @property
    def wide(self) -> bool:
        """Whether the plot is too wide for the screen of a phone."""
        return self.pixels[0] > WIDE

    @styled
    def png(self) -> bytes:
        """Render as a PNG file on a white background."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=PNG_DPI)
        return buffer.getvalue()

    @styled
    def svg(self, description: str) -> "Markup":
        """Render as an SVG element of a page, in the colors of the page.

        `description` is its text for screen readers.
        """
        from markupsafe import Markup, escape
        from matplotlib import rcParams

        # Ids are the same at each rendering, and unique among the plots of a page.
        rcParams["svg.hashsalt"] = hashlib.sha256(description.encode()).hexdigest()
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, dpi=RASTER_DPI, metadata={"Date": None})
        _, _, body = buffer.getvalue().partition("<defs>")
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        # The style sheet of the file would apply to the entire page; the ids of groups repeat in each plot.
        body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.DOTALL)
        body = re.sub(r'<g id="[^"]*"', "<g", body)
        body = re.sub(r"((?:fill|stroke): )(#[0-9a-f]{6})\b", _variable, body)
        width, height = (round(float(size) * 72, 2) for size in self.figure.get_size_inches())
        start = (
            f'<svg class="plot" role="img" aria-label="{escape(description)}" viewBox="0 0 {width} {height}" '
            f'width="{self.pixels[0]}" height="{self.pixels[1]}" '
            'style="stroke-linejoin: round; stroke-linecap: butt"><defs>'
        )
        # matplotlib escapes the labels.
        return Markup(start + re.sub(r">\s+<", "><", body.strip()))


def new_axes(
    columns: int = 1, size: tuple[float, float] = PANEL, rows: int = 1
) -> "tuple[Canvas, list[Axes]]":
    """Return a figure with panels of `size` inches each, row by row."""
    # matplotlib is imported only when something is drawn, which `fm compare` does not do.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]


def plain_text(text: str) -> str:
    """Return a label whose dollar signs do not start a formula of matplotlib."""
    return text.replace("$", r"\$")


def plain_log_axis(axis: "Axis") -> None:
    """Make an axis with plain numbers at 1, 2 and 5 times each power of ten, at most eight labels."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def count_axis(axis: "Axis") -> None:
    """Make an axis of counts with labels such as 150k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(EngFormatter(sep=""))


def _variable(match: re.Match[str]) -> str:
    variable = VARIABLES.get(match[2])
    return f"{match[1]}var({variable})" if variable else match[0]


def _style() -> dict[str, Any]:
    from cycler import cycler

    return {
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.labelsize": 9,
        "axes.titlesize": 9.5,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.color": MUTED,
        "ytick.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "axes.prop_cycle": cycler(color=list(SERIES)),
    }
