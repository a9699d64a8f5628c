"""Self-contained HTML pages: sections with tables and figures."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

FINGERPRINT_MARK = "<!-- made from "
"""Start of the comment at the end of a page, which contains the fingerprint of the page's content."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2024; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; }
th { color: #60646c; font-weight: 600; } tr + tr td { border-top: 1px solid #e5e7eb; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { image-rendering: pixelated; max-width: 100%; } img.plot { image-rendering: auto; }
p.note { color: #60646c; } pre { background: #f4f5f6; padding: .8rem; overflow: auto; font-size: 12px; }
figure { display: inline-block; margin: 0 1.5rem 0 0; } figcaption { color: #60646c; }
"""


@dataclass(frozen=True)
class Table:
    """A table with a header row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """Return the table as HTML; cells that look like numbers are right-aligned."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.head)
        rows = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in self.rows)
        return f"<table><tr>{head}</tr>{rows}</table>"

    def markdown(self) -> str:
        """Return the table as Markdown, without a trailing line break."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        rows.insert(1, ["---"] * len(self.head))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@dataclass(frozen=True)
class Figure:
    """An image with a caption."""

    uri: str
    """The image as a data: URI."""
    caption: str
    plot: bool = False
    """Whether the image is a plot. Plots are smoothed when they are scaled; images of samples are not."""

    def html(self) -> str:
        """Return the figure as HTML."""
        kind = ' class="plot"' if self.plot else ""
        caption = escape(self.caption, quote=True)
        image = f'<img{kind} src="{self.uri}" alt="{caption}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


@dataclass(frozen=True)
class PageSection:
    """A heading with a note, tables, figures, and preformatted text."""

    title: str
    parts: Sequence[Table | Figure]
    note: str = ""
    text: str = ""
    """Preformatted text at the end."""

    def html(self) -> str:
        """Return the section as HTML."""
        parts = "".join(part.html() for part in self.parts)
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        text = f"<pre>{escape(self.text)}</pre>" if self.text else ""
        return f"<h2>{escape(self.title)}</h2>{note}{parts}{text}"


def page(title: str, lead: str, sections: Sequence[PageSection]) -> str:
    """Return the page as HTML."""
    body = "".join(section.html() for section in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><p>{escape(lead)}</p>{body}</body></html>\n"
    )


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Encode bytes as a data: URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _cell(text: str) -> str:
    number = text[:1].isdigit() or text[:1] in ("-", "±")
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"
