"""What the paper's comparison shows in the Prefect UI: tables, verdicts on the claims, figures."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_markdown_artifact

from flows.milestones import slug
from flows.pictures import picture
from fm_core.config import RunConfig
from fm_core.stages.result import StageResult

if TYPE_CHECKING:
    from fm_core.report.html import Section


def say_cost(config: RunConfig) -> None:
    """Write a line to the run's log of what the comparison will take. UserError if it cannot be run so."""
    from fm_core.reproduce.cost_estimate import estimate

    get_run_logger().info("%s", estimate(config).headline)


def tables(config: RunConfig, result: StageResult) -> None:
    """The tables of the comparison's page, verdicts on the paper's claims among them."""
    from fm_core.reproduce.reproduce import shown

    report = Path(result.paths["report"]).resolve()
    content = told(shown(config), f"# {config.run.name}\n\nThe whole page: `{report}`")
    create_markdown_artifact(content, key="comparison", description=result.summary)


def figures(config: RunConfig, result: StageResult) -> None:
    """The figures of the comparison's page."""
    from fm_core.reproduce.reproduce import shown

    for key, uri, caption in pictures(shown(config)):
        create_image_artifact(uri, key=key, description=caption)


def told(sections: Sequence["Section"], head: str) -> str:
    """The tables of a page in Markdown, each under its heading and remark."""
    from fm_core.report.html import Table

    parts = [head]
    for section in sections:
        found = [part.markdown() for part in section.parts if isinstance(part, Table)]
        if found:
            parts += [f"## {section.title}", *([section.note] if section.note else []), *found]
    return "\n\n".join(parts) + "\n"


def pictures(sections: Sequence["Section"]) -> list[tuple[str, str, str]]:
    """Key, data: URI and caption of each figure of a page; several of one section are numbered."""
    from fm_core.report.html import Figure

    found: list[tuple[str, str, str]] = []
    for section in sections:
        drawn = [part for part in section.parts if isinstance(part, Figure)]
        for number, figure in enumerate(drawn, start=1):
            key = slug(f"comparison {section.title}") + (f"-{number}" if len(drawn) > 1 else "")
            png = base64.b64decode(figure.uri.partition(",")[2])
            found.append((key, picture(png), f"{section.title}: {figure.caption}"))
    return found
