"""Self-contained HTML pages from templates: sections with tables, plots, images and links to files.

A page needs no other file and no script, and follows the light or dark theme of the browser. Tables and plots
that are wider than the screen scroll in their own frame. The templates escape all text.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

from fm_core.report.drawing import Drawing
from fm_core.report.file_links import FileLinks
from fm_core.report.gallery import Gallery

if TYPE_CHECKING:
    from jinja2 import Environment

FINGERPRINT_MARK = "<!-- made from "
"""Start of the comment at the end of a page, which contains the fingerprint of the page's content."""
PAGE_VERSION = 3
"""Version of the design, part of the fingerprints: pages of earlier versions are written again."""
NUMBER = re.compile(r"[-+±]?\d[\d.,]*(e[-+]?\d+)?( ?%)?( (s|min|h|d)\b.*| (±|to) .*)?( \(.*\))?")
"""A cell that counts as a number: with a unit of time, an error, a range or a remark."""
MAX_PAGE_BYTES = 3_000_000
"""Size that no page exceeds; the budgets of galleries and the limits of tables keep it."""


@dataclass(frozen=True)
class Table:
    """A table with a header row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """Return the table as HTML; columns of numbers are right-aligned."""
        return _macro("table", self)

    def number_columns(self) -> list[bool]:
        """For each column, whether more than half of its cells with a text are numbers."""
        columns = [[row[column] for row in self.rows if row[column]] for column in range(len(self.head))]
        return [2 * sum(bool(NUMBER.fullmatch(cell)) for cell in cells) > len(cells) for cells in columns]

    def markdown(self) -> str:
        """Return the table as Markdown, without a trailing line break."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        rows.insert(1, ["---"] * len(self.head))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@dataclass(frozen=True)
class Figure:
    """A plot, or an image at its own size, with a caption."""

    picture: Drawing | str
    """A plot, or an image as a data: URI."""
    caption: str

    @property
    def drawing(self) -> Drawing | None:
        """The plot; None for an image."""
        return self.picture if isinstance(self.picture, Drawing) else None

    @property
    def wide(self) -> bool:
        """Whether the figure takes the width of the page."""
        return self.drawing is None or self.drawing.wide

    def image(self) -> bytes:
        """The picture as an image file."""
        if isinstance(self.picture, Drawing):
            return self.picture.png()
        return base64.b64decode(self.picture.partition(",")[2])

    def html(self) -> str:
        """Return the figure as HTML."""
        return _macro("figure", self)


Part = Table | Figure | Gallery | FileLinks


@dataclass(frozen=True)
class PageSection:
    """A heading with a note, tables, pictures, and preformatted text."""

    title: str
    parts: Sequence[Part]
    note: str = ""
    text: str = ""
    """Preformatted text at the end, such as a protocol; folded, unless the section is."""
    folded: bool = False
    """Whether only the title is visible until the reader opens the section."""

    def groups(self) -> list[tuple[str, list[Part]]]:
        """The parts in order, where successive pictures are one group of kind "pictures"."""
        kinds = groupby(
            self.parts, lambda part: "pictures" if isinstance(part, Figure | Gallery) else "other"
        )
        return [(kind, list(group)) for kind, group in kinds]

    def pictures(self) -> list[tuple[bytes, str]]:
        """Each plot and each gallery as an image file with its caption, for displays other than pages."""
        pictures = [part for part in self.parts if isinstance(part, Figure | Gallery)]
        return [
            (part.sheet() if isinstance(part, Gallery) else part.image(), part.caption) for part in pictures
        ]

    def html(self) -> str:
        """Return the section as HTML."""
        return _macro("section", self, 1)


@dataclass(frozen=True)
class Fact:
    """A number at the top of a page."""

    name: str
    value: str
    detail: str = ""


def page(title: str, lead: str, sections: Sequence[PageSection], facts: Sequence[Fact] = ()) -> str:
    """Return a page as HTML."""
    template = _environment().get_template("page.html.jinja")
    return template.render(title=title, lead=lead, sections=sections, facts=facts) + "\n"


def page_pictures(page_name: str, sections: Sequence[PageSection]) -> dict[str, tuple[bytes, str]]:
    """Name -> image file and caption of each picture of a page; several of one title are numbered.

    A name consists of `page_name` and the title of the section, in lower case with hyphens; sections with one
    title are numbered together. Unlike those of the page, the pictures do not follow a dark theme.
    """
    by_name = dict[str, list[tuple[bytes, str]]]()
    for section in sections:
        name = re.sub(r"[^a-z0-9]+", "-", f"{page_name} {section.title}".lower()).strip("-")
        pictures = [(content, f"{section.title}: {caption}") for content, caption in section.pictures()]
        by_name.setdefault(name, []).extend(pictures)
    return {
        f"{name}-{number}" if len(pictures) > 1 else name: picture
        for name, pictures in by_name.items()
        for number, picture in enumerate(pictures, start=1)
    }


@cache
def _environment() -> "Environment":
    # Imported only when a page is written, which `fm compare` does not do.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("fm_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=False,
    )


def _macro(name: str, *arguments: object) -> str:
    module = _environment().get_template("parts.html.jinja").module
    return str(getattr(module, name)(*arguments))
